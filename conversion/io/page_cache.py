"""Files brought into the page cache before they are wanted. Imports nothing that takes long."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

import psutil


def read_ahead(file: Path, position: int, count: int) -> int:
    """Bring a part of a file into the page cache; returns the bytes, where the system can tell. Nothing is copied."""
    left = count
    with contextlib.suppress(OSError), file.open("rb", buffering=0) as source, open(os.devnull, "wb") as null:
        while left and (done := os.sendfile(null.fileno(), source.fileno(), position, left)):
            position, left = position + done, left - done
    return count - left


def begin_reading(folder: str | os.PathLike[str], pattern: str) -> None:
    """Read the files below ``folder`` that match (those of the last folder that has any) while a program still loads
    its libraries, as far as half of the available memory takes them."""
    threading.Thread(target=_read, args=(Path(folder).expanduser(), pattern), daemon=True).start()


def _read(folder: Path, pattern: str) -> None:
    with contextlib.suppress(OSError):
        files = sorted(path for path in folder.rglob(pattern) if path.is_file())
        left = psutil.virtual_memory().available // 2
        for file in files:
            if file.parent == files[-1].parent:
                left -= read_ahead(file, 0, min(left, file.stat().st_size))
