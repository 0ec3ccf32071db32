"""Files written past the page cache hold what was written, whatever the file system can do."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_embed.conversion.files import block_writer
from megatron_embed.conversion.files.block_writer import BLOCK, BlockWriter

SOURCE = os.urandom(3 * BLOCK + 777)


@pytest.fixture
def disk() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def write_all(path: Path, disk: ThreadPoolExecutor, source: Path, pieces: list[tuple[bool, int, int]]) -> bytes:
    """Write (from memory or from a file, position, bytes) one after the other; returns what should be there."""
    wanted = b""
    with BlockWriter(path, disk) as stream:
        for copied, position, count in pieces:
            count = min(count, len(SOURCE) - position)
            if copied:
                stream.copy_from(source, position, count)
            else:
                stream.write(SOURCE[position : position + count])
            wanted += SOURCE[position : position + count]
            assert stream.tell() == len(wanted)
    return wanted


# around a block, a sector, nothing; and far over a block
SIZES = st.one_of(st.integers(0, 20), st.integers(4090, 4100), st.integers(BLOCK - 3, BLOCK + 3), st.just(2 * BLOCK))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(st.tuples(st.booleans(), st.integers(0, 5000), SIZES), max_size=4))
def test_any_pieces(pieces: list[tuple[bool, int, int]], tmp_path: Path, disk: ThreadPoolExecutor) -> None:
    (source := tmp_path / "source").write_bytes(SOURCE)
    wanted = write_all(tmp_path / "out", disk, source, pieces)
    assert (tmp_path / "out").read_bytes() == wanted


PIECES = [(False, 0, 100), (True, 5, BLOCK), (False, 7, 2 * BLOCK)]


def refuse_direct_open(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refusing(path: str, flags: int, *args: int, **more: int) -> int:
        if flags & block_writer._DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *args, **more)

    monkeypatch.setattr(os, "open", refusing)


def refuse_direct_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    real = os.pwrite

    def refusing(file: int, data: memoryview, position: int) -> int:
        if fcntl.fcntl(file, fcntl.F_GETFL) & block_writer._DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(file, data, position)

    monkeypatch.setattr(os, "pwrite", refusing)


def write_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, position: real(file, data[:1_000_001], position))


def read_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, parts, position: real(file, [parts[0][:700_001]], position))


@pytest.mark.parametrize("how", [refuse_direct_open, refuse_direct_writes, write_in_part, read_in_part])
def test_file_systems_that_do_less(
    how: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, disk: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source := tmp_path / "source").write_bytes(SOURCE)
    how(monkeypatch)
    wanted = write_all(tmp_path / "out", disk, source, PIECES)
    assert (tmp_path / "out").read_bytes() == wanted


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_a_full_disk_is_reported(
    blocks: int, tmp_path: Path, disk: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the block that is being written while another is filled, and in the last one."""
    real = os.pwrite

    def full(file: int, data: memoryview, position: int) -> int:
        if position >= blocks * BLOCK:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data, position)

    monkeypatch.setattr(os, "pwrite", full)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="No space left"), BlockWriter(tmp_path / "out", disk) as stream:
        stream.write(SOURCE)
    assert len(os.listdir("/proc/self/fd")) == before  # closed


def test_an_error_in_between_closes_the_file(tmp_path: Path, disk: ThreadPoolExecutor) -> None:
    before = len(os.listdir("/proc/self/fd"))
    source = tmp_path / "none"
    with pytest.raises(FileNotFoundError, match="none"), BlockWriter(tmp_path / "out", disk) as stream:
        stream.write(SOURCE) and stream.copy_from(source, 0, 1)
    assert len(os.listdir("/proc/self/fd")) == before
