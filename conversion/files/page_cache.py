"""Reading of files into the page cache before they are needed. This module imports nothing that takes long."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

import psutil


def read_ahead(file: Path, position: int, count: int) -> int:
    """Bring a part of a file into the page cache without copying it; return the bytes, where the system can tell."""
    left = count
    with contextlib.suppress(OSError), file.open("rb", buffering=0) as source, open(os.devnull, "wb") as null:
        while left and (done := os.sendfile(null.fileno(), source.fileno(), position, left)):
            position, left = position + done, left - done
    return count - left


def begin_reading(folder: str | os.PathLike[str], pattern: str) -> None:
    """Start to read the matching files below ``folder`` while a program still loads its libraries.

    This reads the files of the last folder that has any, up to half of the available memory.
    """
    threading.Thread(target=_read, args=(Path(folder).expanduser(), pattern), daemon=True).start()


def _read(folder: Path, pattern: str) -> None:
    with contextlib.suppress(OSError):
        files = sorted(path for path in folder.rglob(pattern) if path.is_file())
        left = psutil.virtual_memory().available // 2
        for file in files:
            if file.parent == files[-1].parent:
                left -= read_ahead(file, 0, min(left, file.stat().st_size))
