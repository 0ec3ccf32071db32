"""Progress of long work: a bar on a terminal, elsewhere plain lines in the log; and what a conversion reports."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from tqdm import tqdm

_LOG = logging.getLogger(__name__)
_EVERY = 30.0  # seconds between lines, so that a day's log stays readable


@contextmanager
def progress(what: str, total: int, *, done: int = 0, unit: str = "text") -> Iterator[Callable[[int], object]]:
    """Show how much of ``total`` is done; the caller passes each further amount to the yielded function."""
    if sys.stderr.isatty():
        with tqdm(total=total, initial=done, desc=what, unit=unit, file=sys.stderr) as bar:
            yield bar.update
        return
    lines = _Lines(what, total, done, unit)
    yield lines.advance


class _Lines:
    def __init__(self, what: str, total: int, done: int, unit: str) -> None:
        self.what, self.total, self.done, self.unit = what, total, done, unit
        self.began = self.said = time.monotonic()
        self.first = done

    def advance(self, more: int) -> None:
        self.done += more
        now = time.monotonic()
        if now - self.said < _EVERY and self.done < self.total:
            return
        self.said = now
        rate = (self.done - self.first) / max(now - self.began, 1e-9)
        left = time_left(self.total - self.done, rate)
        _LOG.info(f"{self.what}: {self.done:,} of {self.total:,} {self.unit}s, {rate:,.0f} a second, {left} left")


def time_left(remaining: float, rate: float) -> str:
    """Return the time for the remaining amount at a rate per second, as ``0:01:30``."""
    return str(timedelta(seconds=round(remaining / rate))) if rate > 0 else "?"


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
