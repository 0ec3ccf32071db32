"""Rows that can be used and look odd: counted, told, and an error where ``--strict`` is given."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes.datasets.pair import Pair

_LOG = logging.getLogger(__name__)

NO_TEXT = "rows have no text; their vectors are the prompt's"
REPEATED_PAIRS = "repeated pairs"
JSON_LOOKING = "lines look like JSON in a file of plain lines"


@dataclass
class OddRows:
    """What looks odd in one file.

    Attributes:
        found: remark → how many rows, and the line of the first.
    """

    path: str
    found: dict[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def again(cls, path: str, found: Mapping[str, Sequence[int]]) -> OddRows:
        """From ``found`` as JSON gives it back."""
        return cls(path, {remark: (count, line) for remark, (count, line) in found.items()})

    def add(self, remark: str, line: int, count: int = 1) -> None:
        """Count rows, of which the first stands on ``line``."""
        before, first = self.found.get(remark, (0, line))
        self.found[remark] = before + count, first

    def counts(self) -> dict[str, int]:
        """Remark → how many rows."""
        return {remark: count for remark, (count, _) in self.found.items()}

    def remarks(self) -> list[str]:
        """One line of text a remark."""
        return [f"{count:,} {remark}, first line {line}" for remark, (count, line) in self.found.items()]


def of_text(text: str) -> list[str]:
    """What is odd about a text."""
    found = []
    if "\0" in text:
        found.append("rows hold NUL characters")
    if "\ufffd" in text:
        found.append("rows hold U+FFFD, what a wrong encoding leaves")
    return found


def of_pair(pair: Pair) -> list[str]:
    """What is odd about a row of training data. All rows are asked at a first start: loops, for they are quick."""
    found: list[str] = []
    for text in (pair.query, *pair.positives, *pair.negatives):
        if "\0" in text or "\ufffd" in text:
            found.extend(remark for remark in of_text(text) if remark not in found)
    positives = {text.strip() for text in pair.positives}  # the same text as text_id has it
    for text in pair.negatives:
        if text.strip() in positives:
            found.append("rows have a positive among their negatives")
            break
    return found


def report(odd: Iterable[OddRows], *, strict: bool = False) -> None:
    """Log what looks odd.

    Raises:
        UserError: anything does, with ``strict``.
    """
    found = [f"{rows.path}: {remark}" for rows in odd for remark in rows.remarks()]
    if found and strict:
        raise UserError("; ".join(found))
    for remark in found:
        _LOG.warning(remark)
