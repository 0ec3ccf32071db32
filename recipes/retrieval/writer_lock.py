"""One run at a time writes a folder or a file: a lock that the kernel takes back, whatever ends the process."""

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
from megatron_embed.recipes.encoding.rank_zero import on_first_rank

#: what the lock is called in the folder that it is for
LOCK = ".lock"
#: of file systems without locks; there, runs are not kept apart
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def writing(what: Path, lock: Path) -> Iterator[None]:
    """Keep other runs from writing ``what`` until the block ends. Every rank must enter; rank 0 holds the lock.

    Args:
        lock: the file that is locked, in a folder that is made where it is missing. It says who holds it, and is gone
            in the end; where a run was killed it stays, locked by nobody.

    Raises:
        UserError: on every rank, another run is writing it, which is named; or the lock cannot be written.
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


def _take(what: Path, lock: Path) -> int | None:
    """The locked file, to be held open; None where the file system has no locks."""
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
                raise UserError(f"{what}: is being written by {holder}; wait until it ends, or name another") from None
            if error.errno not in _NO_LOCKS:
                raise
            lock.unlink(missing_ok=True)
            return None
        if _is_at(lock, file):
            os.ftruncate(file, 0)
            os.write(file, json.dumps(_this_run()).encode())
            return file
        os.close(file)  # whoever held it ended, and removed it, after we had opened it


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
    except (ValueError, KeyError, TypeError, OSError):  # it has the lock and has not signed it yet
        return "another run"
