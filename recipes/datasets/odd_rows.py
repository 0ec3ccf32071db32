"""Rows that are usable but look odd. They are counted and reported, and are an error with ``--strict``."""

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
    """The odd rows of one file.

    Attributes:
        found: remark → (number of rows, line of the first one).
    """

    path: str
    found: dict[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def again(cls, path: str, found: Mapping[str, Sequence[int]]) -> OddRows:
        """Rebuild odd rows from ``found`` as read from JSON."""
        return cls(path, {remark: (count, line) for remark, (count, line) in found.items()})

    def add(self, remark: str, line: int, count: int = 1) -> None:
        """Count ``count`` rows with a remark; the first one is on ``line``."""
        before, first = self.found.get(remark, (0, line))
        self.found[remark] = before + count, first

    def counts(self) -> dict[str, int]:
        """Return remark → number of rows."""
        return {remark: count for remark, (count, _) in self.found.items()}

    def remarks(self) -> list[str]:
        """Return one line of text for each remark."""
        return [f"{count:,} {remark}, first line {line}" for remark, (count, line) in self.found.items()]


def of_text(text: str) -> list[str]:
    """Return the remarks on a text."""
    found = []
    if "\0" in text:
        found.append("rows hold NUL characters")
    if "\ufffd" in text:
        found.append("rows hold U+FFFD, what a wrong encoding leaves")
    return found


def of_pair(pair: Pair) -> list[str]:
    """Return the remarks on a row of training data. It uses fast plain loops, because a first start checks all rows."""
    found: list[str] = []
    for text in (pair.query, *pair.positives, *pair.negatives):
        if "\0" in text or "\ufffd" in text:
            found.extend(remark for remark in of_text(text) if remark not in found)
    if pair.negatives:
        positives = {text.strip() for text in pair.positives}  # text_id also ignores white space around a text
        if any(text.strip() in positives for text in pair.negatives):
            found.append("rows have a positive among their negatives")
    return found


def report(odd: Iterable[OddRows], *, strict: bool = False) -> None:
    """Log odd rows.

    Raises:
        UserError: there are odd rows, and ``strict`` is True.
    """
    found = [f"{rows.path}: {remark}" for rows in odd for remark in rows.remarks()]
    if found and strict:
        raise UserError("; ".join(found))
    for remark in found:
        _LOG.warning(remark)
