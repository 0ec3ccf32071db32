"""Messages for a folder that cannot be written to, and for a disk that refuses data."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_embed.bridge.errors import UserError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def explain_unwritten(error: BaseException, folder: Path, needed: int | None = None) -> str | None:
    """Return why the disk of ``folder`` refused data; None if the error is about something else.

    Args:
        needed: total bytes to write, if known.
    """
    cause = system_error(error)
    if cause is None or cause.errno is None:
        return None
    reason = os.strerror(cause.errno).lower()
    if cause.errno not in NO_SPACE:
        return f"cannot be written ({reason})"
    while not folder.exists():
        folder = folder.parent
    wanted = "" if needed is None else f"at least {_size(needed)} needed, "
    return f"{reason}: {wanted}{_size(shutil.disk_usage(folder).free)} free; make room, or take another folder"


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Raise an error that names the folder and its free space if the disk has no room for the writes inside."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise UserError(f"{folder}: {explain_unwritten(error, folder)}") from error


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made or written to; leave nothing there.

    Raises:
        UserError: the message names the folder and the system's reason.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; wanted a folder, which is made if it is not there")
    above = folder
    try:
        above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({above}: {error.strerror}); give another folder") from None


def system_error(error: BaseException) -> OSError | None:
    """Return the system's error that other layers have wrapped, if there is one."""
    chain: list[BaseException | None] = [error]
    while (last := chain[-1]) is not None and last not in chain[:-1]:
        if isinstance(last, OSError):
            return last
        chain.append(last.__cause__ or last.__context__)
    return None


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} GB"
