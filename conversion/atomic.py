"""An output folder that is there whole, or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_embed.bridge.errors import UserError

_LOCK = ".writing"


@contextmanager
def atomic_output(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Build a folder under another name beside ``path`` and rename it at the end.

    Whatever ends the block early, ``path`` is as before. A killed process leaves only the folder under the other name,
    ``.NAME.partial-…``, which the next run for the same path removes.

    Args:
        path: where the folder shall be.
        overwrite: replace what is there (a folder that looks like a model or a checkpoint), at the very end.

    Yields:
        The folder to write into.

    Raises:
        UserError: something is there already.
    """
    target = Path(os.path.abspath(Path(path).expanduser()))
    _restore(target)
    if os.path.lexists(target) and not _is_empty(target):
        if not overwrite:
            raise UserError(f"{path}: exists already; give another path, or --overwrite to replace it")
        _refuse_foreign(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clean(target)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    lock = os.open(partial / _LOCK, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        partial.chmod(0o777 & ~_umask())  # mkdtemp is private, a model folder need not be
        yield partial
        _sync(partial)
        (partial / _LOCK).unlink()
        _replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _is_empty(target: Path) -> bool:
    return target.is_dir() and not target.is_symlink() and next(target.iterdir(), None) is None


def _refuse_foreign(target: Path) -> None:
    """--overwrite removes a folder with all that is in it: only one that was written as an output before."""
    marks = ("config.json", "latest_checkpointed_iteration.txt", ".metadata")
    if target.is_symlink() or not target.is_dir() or not any((target / mark).exists() for mark in marks):
        raise UserError(f"{target}: is no model or checkpoint folder, so --overwrite does not remove it; move it away")


def _replace(partial: Path, target: Path) -> None:
    if not os.path.lexists(target) or _is_empty(target):
        partial.replace(target)
        return
    old = target.parent / f".{target.name}.replaced"
    target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _restore(target: Path) -> None:
    """Finish what a process killed between the two renames left: the old folder comes back, or goes."""
    old = target.parent / f".{target.name}.replaced"
    if old.is_dir():
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(target)


def _clean(target: Path) -> None:
    """Remove what killed processes left. A living one holds its folder's lock."""
    for stale in target.parent.glob(f".{target.name}.partial-*"):
        try:
            lock = os.open(stale / _LOCK, os.O_RDWR)
        except FileNotFoundError:
            shutil.rmtree(stale, ignore_errors=True)
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(stale, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)


def _sync(folder: Path) -> None:
    """On the disk before it gets its name: after a power cut a complete name must not hold empty files."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
