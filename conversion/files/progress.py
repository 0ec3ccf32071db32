"""Reports of a conversion, during its run and at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm


@dataclass(frozen=True)
class Converted:
    """The written folder, and notes about it, one line each."""

    path: Path
    notes: list[str] = field(default_factory=list)


@contextmanager
def byte_bar(label: str, total: int, *, enabled: bool, unit: str = "B") -> Iterator[Callable[[int], object]]:
    """Show a progress bar in bytes, or in ``unit``; the caller passes each further amount to the yielded function."""
    hidden = None if enabled else True  # None hides it where stderr is no terminal, because bars would fill a log
    with tqdm(total=total, desc=label, unit=unit, unit_scale=unit == "B", disable=hidden, leave=False) as bar:
        yield bar.update
