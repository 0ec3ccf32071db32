"""What conversions report while they run and at their end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm


@dataclass(frozen=True)
class Converted:
    """What was written, and what should be said about it, one line each."""

    path: Path
    notes: list[str] = field(default_factory=list)


@contextmanager
def byte_bar(label: str, total: int, *, enabled: bool, unit: str = "B") -> Iterator[Callable[[int], object]]:
    """A progress bar over bytes, or what else ``unit`` says; call what it yields with how much was just done."""
    hidden = None if enabled else True  # None: where stderr is no terminal, whose records would fill a log
    with tqdm(total=total, desc=label, unit=unit, unit_scale=unit == "B", disable=hidden, leave=False) as bar:
        yield bar.update
