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
def byte_bar(label: str, total: int, *, enabled: bool) -> Iterator[Callable[[int], object]]:
    """A progress bar over bytes; call what it yields with the bytes just done."""
    hidden = None if enabled else True  # None: where stderr is no terminal, whose records would fill a log
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=hidden, leave=False) as bar:
        yield bar.update
