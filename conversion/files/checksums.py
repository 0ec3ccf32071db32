"""Checksums of a checkpoint's files: written with the checkpoint, checked by every reader.

Neither torch's distributed checkpoint nor megatron-core has any: a flipped byte would give a slightly different model.
``checksums.json`` in the iteration folder holds, for each file, its size and an XXH3 sum of every 2 MiB block. With
sums of blocks a reader checks only what it reads, such as the weights in a file that also holds the optimizer's state.
A checkpoint without that file (an older one, or another program's) is read without checks.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from megatron_embed.bridge.errors import UserError

CHECKSUMS = "checksums.json"
#: bytes per sum
BLOCK = 2 << 20
_FORM = {"algorithm": "xxh3_64", "block": BLOCK}
#: ending of files that are checked block by block while they are read; all others are small and are checked at once
_IN_BLOCKS = ".distcp"


class DamagedCheckpoint(UserError):
    """Error for a checkpoint file that has changed since it was written: other bytes, cut short, or missing.

    Attributes:
        damage: the message without the part that names a sound checkpoint.
        older: the newest sound checkpoint before it, after a search for it.
    """

    older: Path | None = None

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.damage = message


@dataclass(frozen=True)
class FileSums:
    """Wanted size and sums of a file."""

    bytes: int
    #: one per block, in order
    sums: list[str] = field(default_factory=list)


class Summing:
    """Accumulator of a file's sums, whose bytes come piece by piece."""

    def __init__(self) -> None:
        self._bytes = 0
        self._sums: list[str] = []
        self._block = xxhash.xxh3_64()

    def update(self, data: Any) -> None:
        """Add the next bytes (anything with a contiguous buffer)."""
        view = memoryview(data).cast("B")
        at = 0
        while at < len(view):
            part = view[at : at + BLOCK - self._bytes % BLOCK]
            self._block.update(part)
            self._bytes += len(part)
            at += len(part)
            if self._bytes % BLOCK == 0:
                self._sums.append(self._block.hexdigest())
                self._block.reset()

    def result(self) -> FileSums:
        """Return size and sums of all bytes so far."""
        rest = [self._block.hexdigest()] if self._bytes % BLOCK else []
        return FileSums(self._bytes, [*self._sums, *rest])


def write_checksums(folder: Path, known: Mapping[str, FileSums]) -> None:
    """Write ``checksums.json`` for all files in ``folder``; files in ``known`` (by name) are not read again."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != CHECKSUMS:
            files[name] = asdict(known[name] if name in known else _sums_of(path))
    text = json.dumps({**_FORM, "files": files, "own": _own_sum(files)}, indent=1)
    (folder / CHECKSUMS).write_text(text, encoding="utf-8")


class Checksums:
    """The checksums of one iteration folder, and the blocks that were found right."""

    def __init__(self, folder: Path, files: Mapping[str, FileSums]) -> None:
        self.folder, self._files = folder, files
        self._right: set[tuple[str, int]] = set()
        # a block stays in the processor's cache until it is summed; conversions read in two threads
        self._buffer, self._lock = memoryview(bytearray(BLOCK)), threading.Lock()

    @classmethod
    def read(cls, folder: Path) -> Checksums | None:
        """Read the checksums of an iteration folder; return None if it has none.

        Raises:
            DamagedCheckpoint: ``checksums.json`` itself is damaged.
        """
        path = folder / CHECKSUMS
        try:
            values = json.loads(path.read_bytes())
            if {key: values[key] for key in _FORM} != _FORM or values["own"] != _own_sum(values["files"]):
                raise ValueError("its own checksum differs")
            return cls(folder, {name: FileSums(**entry) for name, entry in values["files"].items()})
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedCheckpoint(f"{path}: damaged: not as it was written ({error})") from None

    def check_files(self) -> None:
        """Check that every file has its full size, and that all files but the tensors' have their written contents.

        Raises:
            DamagedCheckpoint: the message names the first file that fails.
        """
        for name, wanted in self._files.items():
            path = self.folder / name
            if not path.is_file():
                raise DamagedCheckpoint(f"{path}: no such file, but the checkpoint was written with it")
            found = path.stat().st_size
            if found != wanted.bytes:
                raise DamagedCheckpoint(f"{path}: damaged: found {found:,} bytes, wanted {wanted.bytes:,}{_hint(name)}")
            if not name.endswith(_IN_BLOCKS):
                self.check(name, 0, wanted.bytes)

    def check(self, name: str, start: int, stop: int) -> None:
        """Check that bytes ``start`` to before ``stop`` of a file are as written. Each block is read once.

        Raises:
            DamagedCheckpoint: they are not.
        """
        wanted = self._files.get(name)
        with self._lock:
            blocks = range(start // BLOCK, -(-stop // BLOCK) if start < stop else 0)
            unread = [block for block in blocks if (name, block) not in self._right]
            if wanted is None or not unread:
                return
            file = os.open(self.folder / name, os.O_RDONLY)
            try:
                for block in unread:
                    self._check_block(file, name, block, wanted)
            finally:
                os.close(file)

    def check_all(self, *, part: int = 0, parts: int = 1) -> None:
        """Run :meth:`check_files`, and check all blocks of every file, or the ``part``-th of ``parts`` shares of them.

        Raises:
            DamagedCheckpoint: the message names the first file that is not as it was written.
        """
        self.check_files()
        for name, wanted in self._files.items():
            size = -(-len(wanted.sums) // parts) * BLOCK  # bytes per share
            self.check(name, min(part * size, wanted.bytes), min((part + 1) * size, wanted.bytes))

    def _check_block(self, file: int, name: str, block: int, wanted: FileSums) -> None:
        start = block * BLOCK
        stop = min(start + BLOCK, wanted.bytes)
        done = 0
        while done < stop - start and (got := os.preadv(file, [self._buffer[done : stop - start]], start + done)):
            done += got
        found = xxhash.xxh3_64_hexdigest(self._buffer[:done])
        if found != wanted.sums[block]:
            raise DamagedCheckpoint(
                f"{self.folder / name}: damaged: bytes {start:,} to {stop - 1:,} are not those that were written "
                f"(checksum {found}, wanted {wanted.sums[block]}){_hint(name)}"
            )
        self._right.add((name, block))


def _sums_of(path: Path) -> FileSums:
    summing = Summing()
    with path.open("rb", buffering=0) as stream:
        while data := stream.read(BLOCK):
            summing.update(data)
    return summing.result()


def _own_sum(files: Any) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(files, sort_keys=True).encode())


def _hint(name: str) -> str:
    """Return a hint for text files beside the tensors, which a user may have edited."""
    return "" if name.endswith((_IN_BLOCKS, ".metadata", ".pt")) else f"; changed on purpose? Then remove {CHECKSUMS}"
