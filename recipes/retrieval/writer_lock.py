"""A lock that lets one run at a time write a folder or a file. The kernel releases it however the process ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from megatron_embed.bridge.errors import UserError
from megatron_embed.bridge.ranks import on_first_rank

#: name of the lock file in the folder that it protects
LOCK = ".lock"
#: error numbers of file systems without locks, where runs are not kept apart
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def writing(what: Path, lock: Path) -> Iterator[None]:
    """Keep other runs from writing ``what`` until the block ends. Every rank must enter; rank 0 holds the lock.

    Args:
        lock: the file to lock; its folder is created if missing. The file names its holder and is removed in the end. A
            killed run leaves it behind, unlocked.

    Raises:
        UserError: another run, which the message names, is writing ``what``, or the lock cannot be written; raised on
            every rank.
    """
    held: list[int | None] = []
    on_first_rank(lambda: held.append(_take(what, lock)))
    try:
        yield
    finally:
        for file in held:
            if file is not None:
                lock.unlink(missing_ok=True)
                os.close(file)


def refuse_if_written(what: Path, lock: Path) -> None:
    """Refuse ``what`` as :func:`writing` would, without creating or locking anything. Every rank must call it.

    Raises:
        UserError: another run, which the message names, is writing ``what``; raised on every rank.
    """
    on_first_rank(lambda: _look(what, lock))


def _look(what: Path, lock: Path) -> None:
    try:
        file = os.open(lock, os.O_RDONLY)
    except OSError:  # nobody has written there, or writing() will say why nobody can
        return
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _refusal(what, _holder(file)) from None
    except OSError:  # a file system without locks
        pass
    finally:
        os.close(file)


def _refusal(what: Path, holder: str) -> UserError:
    return UserError(f"{what}: is being written by {holder}; wait until it ends, or name another")


def _take(what: Path, lock: Path) -> int | None:
    """Return the descriptor of the locked file, to be held open, or None if the file system has no locks."""
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(lock, os.O_CREAT | os.O_RDWR, 0o666)
        except OSError as error:
            raise UserError(f"{what}: cannot be written to ({error.strerror})") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(file)
            os.close(file)
            if isinstance(error, BlockingIOError):
                raise _refusal(what, holder) from None
            if error.errno not in _NO_LOCKS:
                raise
            lock.unlink(missing_ok=True)
            return None
        if _is_at(lock, file):
            os.ftruncate(file, 0)
            os.write(file, json.dumps(_this_run()).encode())
            return file
        os.close(file)  # the holder ended and removed the file after this process had opened it


def _is_at(lock: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(lock))
    except FileNotFoundError:
        return False


def _this_run() -> dict[str, str | int]:
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since}


def _holder(file: int) -> str:
    try:
        found = json.loads(os.pread(file, 4096, 0))
        return f"process {found['pid']} on {found['host']}, since {found['since']}"
    except (ValueError, KeyError, TypeError, OSError):  # the holder has not written its name yet
        return "another run"
