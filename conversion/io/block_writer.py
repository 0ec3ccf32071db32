"""A large file written past the page cache, in blocks: one is filled while the one before it goes to the disk.

Python's own streams copy every byte into the page cache, a page at a time, and the disk gets them later: for files of
gigabytes this takes more processor time than all else. ``O_DIRECT`` takes the bytes from this process's memory; what
it wants in return is addresses, positions and sizes in whole sectors, so all that is written passes through blocks.
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
from megatron_embed.conversion.io.checksums import Summing

#: small enough to stay in a processor's cache between being filled and being written
BLOCK = 2 << 20
#: sectors of today's disks; writes in the middle of a file are blocks, only the last one is rounded up to this
_SECTOR = 4096
_DIRECT = getattr(os, "O_DIRECT", 0)


class BlockWriter:
    """A new file, written from its start to its end. A context manager; :meth:`close` tells whether all was written.

    Args:
        path: the file to make.
        disk: the thread that writes blocks; several files may share one.
        sums: given, that thread adds up the file's checksums too.

    Raises:
        OSError: by any method: a full disk and its like, at the latest by :meth:`close`.
    """

    def __init__(self, path: Path, disk: ThreadPoolExecutor, sums: Summing | None = None) -> None:
        self.path = path
        self._disk, self._sums = disk, sums
        self._file = _open(path)
        # two blocks: one is filled, one is being written; mapped memory begins at a page
        self._block, self._other = (memoryview(mmap.mmap(-1, BLOCK)) for _ in range(2))
        self._filled = self._start = 0
        self._writing: Future[None] | None = None

    def tell(self) -> int:
        """Bytes written so far."""
        return self._start + self._filled

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes; returns how many."""
        view = memoryview(data).cast("B")
        for at, part in self._room(len(view)):
            part[:] = view[at : at + len(part)]
        return len(view)

    def copy_from(self, source: Path, position: int, count: int) -> None:
        """Append a part of another file.

        Raises:
            UserError: that file ends before.
        """
        with source.open("rb", buffering=0) as stream:
            for at, part in self._room(count):
                done = 0
                while done < len(part):
                    if not (got := os.preadv(stream.fileno(), [part[done:]], position + at + done)):
                        raise UserError(f"{source}: ends within its tensors; fetch or write it again")
                    done += got

    def close(self) -> None:
        """Write what is left, and wait until all is written."""
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
        """Close the file as it is."""
        if self._file >= 0:
            with contextlib.suppress(OSError):
                self._wait()
            os.close(self._file)
            self._file = -1

    def _room(self, count: int) -> Iterator[tuple[int, memoryview]]:
        """(bytes before it, memory to fill) for the next ``count`` bytes."""
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
    """The file, for writing past the page cache where its file system can do that."""
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
            # a file system that wants other sizes, or part of a block was written: the page cache takes anything
            fcntl.fcntl(file, fcntl.F_SETFL, flags & ~_DIRECT)
