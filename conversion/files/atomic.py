"""Atomic outputs: a folder or file exists as a whole or not at all."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, BinaryIO

from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.files.replaceable import refuse_to_remove

if TYPE_CHECKING:
    import numpy as np

_LOCK = ".writing"


@contextmanager
def atomic_output(
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    sources: Iterable[Path] = (),
    refuse: Callable[[Path], None] = refuse_to_remove,
) -> Iterator[Path]:
    """Build a folder under another name beside ``path`` and rename it at the end.

    If anything ends the block early, ``path`` stays as before. A killed process leaves only the folder under the other
    name, ``.NAME.partial-…``, which the next run for the same path removes.

    Args:
        path: the folder to make.
        overwrite: replace an existing folder at the very end.
        sources: folders from which the output is or once was made; see :func:`refuse_sources`.
        refuse: function that raises an error for a folder that may not be replaced.

    Yields:
        The folder to write into.

    Raises:
        UserError: ``path`` exists already, or it is, holds or lies in a source.
    """
    refuse_sources(path, sources)
    target = _real(path)
    _restore(target)

    def check() -> None:
        if os.path.lexists(target) and not _is_empty(target):
            if not overwrite:
                raise UserError(f"{path}: exists already; give another path, or --overwrite to replace it")
            refuse(target)

    check()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clean(target)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another path") from None
    lock = os.open(partial / _LOCK, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        partial.chmod(0o777 & ~_umask())  # mkdtemp makes a private folder; a model folder need not be private
        yield partial
        _sync(partial)
        (partial / _LOCK).unlink()
        check()  # somebody may have put something there meanwhile
        _replace(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(lock)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file ``NAME.partial`` beside ``path`` and rename it at the end, when all of it is on the disk.

    If anything ends the block early, ``path`` stays as before. Only one process at a time may write a path.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def save_array(file: BinaryIO, values: np.ndarray) -> None:
    """Write an array into an open ``.npy`` file; raise every failure.

    numpy writes into real files by itself. On a full disk it does not say which error it met, and for the last 4 KiB
    it does not even say that it met one.
    """
    import numpy as np

    np.save(SimpleNamespace(write=file.write), values, allow_pickle=False)


def refuse_sources(path: str | os.PathLike[str], sources: Iterable[Path]) -> None:
    """Refuse an output that is a source, holds one or lies in one.

    ``--overwrite`` would remove a source that the output holds, and an output inside a source would become part of it.
    The output may also not hold a file to which a source links, as a hub cache's folders link to its blobs.

    Args:
        sources: model and checkpoint folders; those that do not exist are skipped.

    Raises:
        UserError: the message names the output and the source.
    """
    target = Path(path).expanduser().resolve()
    for source in sources:
        real = source.expanduser().resolve()
        if not real.is_dir():
            continue
        if target != real and real in target.parents:
            raise UserError(f"{path}: lies in the source {source}; give an output path outside of it")
        linked = [entry.resolve() for entry in real.iterdir() if entry.is_symlink()]
        for held in (real, *linked):
            if target in (held, *held.parents):
                raise UserError(f"{path}: holds the source {source}; give another output path")


def _real(path: str | os.PathLike[str]) -> Path:
    """Return the path of a folder to make, with links in its parents followed but not a link at the path itself."""
    target = Path(path).expanduser()
    return target.parent.resolve() / target.name if target.name not in ("", "..") else target.resolve()


def _is_empty(target: Path) -> bool:
    return target.is_dir() and not target.is_symlink() and next(target.iterdir(), None) is None


def _replace(partial: Path, target: Path) -> None:
    if not os.path.lexists(target) or _is_empty(target):
        partial.replace(target)
        return
    old = target.parent / f".{target.name}.replaced"
    try:
        target.rename(old)
        partial.rename(target)
    except BaseException:  # Ctrl-C too
        if not os.path.lexists(target):
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _restore(target: Path) -> None:
    """Finish the work of a process that was killed between the two renames: restore or remove the old folder."""
    old = target.parent / f".{target.name}.replaced"
    if old.is_dir():
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(target)


def _clean(target: Path) -> None:
    """Remove the folders of killed processes. A live process holds its folder's lock."""
    for stale in target.parent.glob(f".{glob.escape(target.name)}.partial-*"):
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
    """Sync a folder's files to the disk before its rename: a final name must not hold empty files after a power cut."""
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
