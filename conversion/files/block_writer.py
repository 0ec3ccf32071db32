"""Writer of large files past the page cache, in blocks: one block is filled while the previous one goes to the disk.

Python's own streams copy every byte into the page cache, a page at a time, and the disk gets the bytes later: for files
of gigabytes this takes more processor time than everything else. ``O_DIRECT`` takes the bytes from this process's
memory, but needs addresses, positions and sizes in whole sectors, so all data passes through blocks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.files.checksums import Summing

#: small enough to stay in a processor's cache between filling and writing
BLOCK = 2 << 20
#: sector size of today's disks; writes inside a file are whole blocks, only the last one is rounded up to sectors
_SECTOR = 4096
_DIRECT = getattr(os, "O_DIRECT", 0)


class BlockWriter:
    """A new file, written from start to end. It is a context manager; :meth:`close` reports whether all was written.

    Args:
        path: the file to make.
        disk: the thread that writes blocks; several files may share one.
        sums: if given, that thread also adds up the file's checksums.

    Raises:
        OSError: a full disk or the like; any method may raise it, :meth:`close` at the latest.
    """

    def __init__(self, path: Path, disk: ThreadPoolExecutor, sums: Summing | None = None) -> None:
        self.path = path
        self._disk, self._sums = disk, sums
        self._file = _open(path)
        # one block is filled while the other is written; mapped memory begins at a page
        self._block, self._other = (memoryview(mmap.mmap(-1, BLOCK)) for _ in range(2))
        self._filled = self._start = 0
        self._writing: Future[None] | None = None

    def tell(self) -> int:
        """Return the number of bytes written so far."""
        return self._start + self._filled

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes; return their number."""
        view = memoryview(data).cast("B")
        for at, part in self._room(len(view)):
            part[:] = view[at : at + len(part)]
        return len(view)

    def copy_from(self, source: Path, position: int, count: int) -> None:
        """Append a part of another file.

        Raises:
            UserError: the other file ends before that part does.
        """
        with source.open("rb", buffering=0) as stream:
            for at, part in self._room(count):
                done = 0
                while done < len(part):
                    if not (got := os.preadv(stream.fileno(), [part[done:]], position + at + done)):
                        raise UserError(f"{source}: ends within its tensors; fetch or write it again")
                    done += got

    def close(self) -> None:
        """Write the remaining bytes, and wait until all are written."""
        if self._file < 0:
            return
        try:
            size = self.tell()
            if self._filled:
                self._pass_on(self._filled)
            self._wait()
            os.ftruncate(self._file, size)
        finally:
            self._abandon()

    def __enter__(self) -> BlockWriter:
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._abandon()

    def _abandon(self) -> None:
        """Close the file in its present state."""
        if self._file >= 0:
            with contextlib.suppress(OSError):
                self._wait()
            os.close(self._file)
            self._file = -1

    def _room(self, count: int) -> Iterator[tuple[int, memoryview]]:
        """Yield (number of bytes before it, memory to fill) for the next ``count`` bytes."""
        at = 0
        while at < count:
            size = min(count - at, BLOCK - self._filled)
            yield at, self._block[self._filled : self._filled + size]
            at += size
            self._filled += size
            if self._filled == BLOCK:
                self._pass_on(BLOCK)

    def _pass_on(self, size: int) -> None:
        self._wait()
        self._writing = self._disk.submit(self._write, self._block, size, self._start)
        self._block, self._other = self._other, self._block
        self._start, self._filled = self._start + size, 0

    def _write(self, block: memoryview, size: int, position: int) -> None:
        if self._sums is not None:
            self._sums.update(block[:size])
        _write(self._file, block[: -(-size // _SECTOR) * _SECTOR], position)

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


def _open(path: Path) -> int:
    """Open the file for writing, past the page cache where its file system supports this."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        return os.open(path, flags, 0o666)


def _write(file: int, block: memoryview, position: int) -> None:
    done = 0
    while done < len(block):
        try:
            done += os.pwrite(file, block[done:], position + done)
        except OSError as error:
            flags = fcntl.fcntl(file, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & _DIRECT:
                raise
            # The file system wants other sizes, or wrote only part of a block; the page cache accepts any size.
            fcntl.fcntl(file, fcntl.F_SETFL, flags & ~_DIRECT)
