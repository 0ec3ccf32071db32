"""What reading a data file through has found, kept for the next start as plain arrays that are mapped, not read.

An entry belongs to files as they were: their paths, sizes, times and first and last bytes. Whatever is amiss with the
cache, a start goes on without it: an entry that is damaged is built again, and nothing is ever unpickled.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.atomic import atomic_output
from megatron_embed.recipes.vectors import save_array

#: raised whenever other things are kept, or rows are understood in another way
VERSION = 5
#: Smaller files are read in less than a second: small runs and tests leave nothing behind in a home folder.
LEAST_BYTES = 16 << 20

_BLOCK = 1 << 16  # bytes at either end of a file that are part of its stamp
_complained: set[Path] = set()
_FACTS, _DIGESTS = "facts.json", "digests.json"


@dataclass(frozen=True)
class Index:
    """What was found: arrays (none of them empty; read-only where they are mapped) and facts that JSON can hold."""

    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


def indexed(kind: str, files: Sequence[Path], build: Callable[[], Index]) -> Index:
    """What ``build`` finds in files, or found at an earlier start.

    Of several processes that want the same at once, on one machine, the first builds it and the others wait for it.
    What ``build`` raises is raised anew at every start: then nothing is kept.

    Args:
        kind: tells apart what is kept of the same files.
        files: all that the answer depends on; without any, or where they are small, nothing is kept.
    """
    before = stamps(files)
    if not before or sum(size for _, size, *_ in before) < LEAST_BYTES:
        return build()
    place = cache_folder() / f"index-{VERSION}" / f"{kind}-{_digest([path for path, *_ in before])}" / _digest(before)
    if (found := _load(place)) is not None:
        return found
    with _turn(place.parent):
        if (found := _load(place)) is not None:
            return found
        built = build()
        if stamps(files) != before:  # written to meanwhile
            return built
        _store(place, built)
    return _load(place) or built  # mapped, so that what was built need not stay in memory


def cache_folder() -> Path:
    """``$MEGATRON_EMBED_CACHE``, or ``megatron-embed`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if named := os.environ.get("MEGATRON_EMBED_CACHE"):
        return Path(os.path.abspath(os.path.expanduser(named)))
    above = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.path.abspath(above)) / "megatron-embed"


def stamps(files: Sequence[Path]) -> list[tuple[str, int, int, str]]:
    """(absolute path, size, time of the last change, hash of first and last bytes) of each; [] if one is not there."""
    found = []
    try:
        for path in files:
            with path.open("rb") as file:
                state = os.fstat(file.fileno())
                ends = hashlib.sha256(file.read(_BLOCK))
                file.seek(max(state.st_size - _BLOCK, 0))
                ends.update(file.read(_BLOCK))
            found.append((os.path.abspath(path), state.st_size, state.st_mtime_ns, ends.hexdigest()))
    except OSError:
        return []  # build meets the same, and says it
    return found


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """The first to come goes ahead; those that come meanwhile wait, then go on side by side.

    So that one of a machine's ranks builds, in its memory alone. Where it fails, none of the others has to wait for
    another. Without locks (read-only folders, some network folders) all go ahead.
    """
    lock = -1
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(lock, fcntl.LOCK_SH)
    try:
        yield
    finally:
        if lock >= 0:
            os.close(lock)


def _load(place: Path) -> Index | None:
    """An entry with its arrays mapped; None: there is none, or it is not what was written."""
    try:
        digests = json.loads((place / _DIGESTS).read_text(encoding="utf-8"))
        if not isinstance(digests, dict) or _FACTS not in digests:
            return None
        if any(_file_digest(place / name) != digest for name, digest in digests.items()):
            return None
        arrays = {
            name.removesuffix(".npy"): np.load(place / name, mmap_mode="r", allow_pickle=False).view(np.ndarray)
            for name in digests
            if name.endswith(".npy")
        }
        return Index(arrays, json.loads((place / _FACTS).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def _store(place: Path, index: Index) -> None:
    """Write an entry, in the place of what was kept of the same files in another state."""
    try:
        if _load(place) is not None:
            return
        shutil.rmtree(place, ignore_errors=True)  # damaged, or not there
        with atomic_output(place) as partial:
            for name, array in index.arrays.items():
                with (partial / f"{name}.npy").open("wb") as file:
                    save_array(file, array)
            (partial / _FACTS).write_text(json.dumps(dict(index.facts)), encoding="utf-8")
            digests = {path.name: _file_digest(path) for path in partial.iterdir() if path.suffix in (".npy", ".json")}
            (partial / _DIGESTS).write_text(json.dumps(digests), encoding="utf-8")
        for old in place.parent.iterdir():
            if old != place and not old.name.startswith("."):
                shutil.rmtree(old, ignore_errors=True)
    except (UserError, OSError) as error:
        if not place.exists():  # else another process was first
            _complain(error)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _complain(error: Exception) -> None:
    """Once a program and folder, whatever fails there."""
    folder = cache_folder()
    if folder not in _complained and os.environ.get("LOCAL_RANK", "0") == "0":
        hint = f"not kept in {folder} ($MEGATRON_EMBED_CACHE), so every start reads all training data: {error}"
        logging.getLogger(__name__).warning(hint)
    _complained.add(folder)
