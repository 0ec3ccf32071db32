"""Results of a comparison: sections of differences, each with the value found and the value wanted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

#: stands for a value that one side does not state
NOT_STATED = "not stated"


@dataclass(frozen=True)
class Difference:
    """One thing that differs between the two sides.

    Attributes:
        name: the tensor, or the file and its key.
        found: the value on the side that was made from the source.
        wanted: the source's value.
        largest: the largest absolute difference of two values for a tensor or embeddings, else None.
    """

    name: str
    found: str
    wanted: str
    largest: float | None = None


@dataclass(frozen=True)
class ComparedSection:
    """All comparisons of one kind.

    Attributes:
        name: such as ``config`` or ``tensors``.
        compared: number of things compared.
        differences: the differences.
        unequal: number of things that differ, where one difference stands for several.
        largest: the largest difference of two values, for tensors and embeddings.
    """

    name: str
    compared: int
    differences: list[Difference] = field(default_factory=list)
    largest: float | None = None
    unequal: int | None = None

    def __add__(self, other: ComparedSection) -> ComparedSection:
        """Return one section of this name with the comparisons of both."""
        return replace(self, compared=self.compared + other.compared, differences=self.differences + other.differences)

    @property
    def equal(self) -> int:
        """Return the number of things that are the same."""
        return self.compared - (len(self.differences) if self.unequal is None else self.unequal)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one with dotted keys: ``{"a": {"b": 1}}`` → ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def compare_values(section: str, found: Mapping[str, Any], wanted: Mapping[str, Any], *, where: str) -> ComparedSection:
    """Compare flat mappings key by key; a key that only one side has is a difference.

    Args:
        section: name of the section that is returned.
        where: the file that holds ``found``.
    """
    keys = dict.fromkeys([*wanted, *found])
    differences = [
        Difference(f"{where}: {key}", shown(found, key), shown(wanted, key))
        for key in keys
        if found.get(key, NOT_STATED) != wanted.get(key, NOT_STATED)
    ]
    return ComparedSection(section, len(keys), differences)


def shown(values: Mapping[str, Any], key: str) -> str:
    """Return a value in the form that messages show."""
    return repr(values[key]) if key in values else NOT_STATED
