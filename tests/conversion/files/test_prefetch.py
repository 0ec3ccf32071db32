"""Reading one ahead: the same items, never more than one too many, errors where they belong, no thread left."""

from __future__ import annotations

import pickle
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.hf_files import Source

from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.exporting import export_hf
from megatron_embed.conversion.files.prefetch import fault_in, one_ahead
from megatron_embed.conversion.hf import safetensors_writer
from megatron_embed.conversion.importing import import_hf
from megatron_embed.conversion.mcore import tensors as tensor_stream
from megatron_embed.conversion.mcore.tensors import CheckpointReader, Chunk, write_chunks


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("one-ahead")]


def test_same_items_in_order() -> None:
    assert list(one_ahead(range(100))) == list(range(100))
    assert list(one_ahead([None, 0, False])) == [None, 0, False]
    assert list(one_ahead([])) == []
    assert not readers()


def test_no_more_than_three_exist() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(50):
            made.append(number)
            yield number

    for number in one_ahead(items()):
        assert len(made) <= number + 3


@pytest.mark.parametrize("error", [UserError("bad sector"), KeyboardInterrupt()])
def test_what_is_raised_there_is_raised_here(error: BaseException) -> None:
    def items() -> Iterator[int]:
        yield 1
        raise error

    seen = []

    def consume() -> None:
        for item in one_ahead(items()):
            seen.append(item)  # noqa: PERF402

    with pytest.raises(type(error)):
        consume()
    assert seen == [1]
    assert not readers()


def test_stopping_early_ends_the_thread() -> None:
    stream = one_ahead(iter(int, 1))  # endless
    assert [next(stream) for _ in range(3)] == [0, 0, 0]
    stream.close()
    assert not readers()


@pytest.mark.parametrize("kind", ["import", "export"])
def test_a_write_that_fails_ends_the_thread(
    kind: str, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_hf(source("model"), tmp_path / "m", progress=False)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_stream, "_save", full)
    monkeypatch.setattr(safetensors_writer, "write_values", full)

    def run() -> None:
        if kind == "import":
            import_hf(source("model"), tmp_path / "out", progress=False)
        else:
            export_hf(tmp_path / "m", tmp_path / "out", progress=False)

    with pytest.raises(OSError, match="No space left"):
        run()
    assert not readers()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_faulting_in_changes_nothing() -> None:
    for tensor in (torch.arange(10_000), torch.zeros(0), torch.tensor(3.0), torch.ones(9, 9).T[1:]):
        assert fault_in(tensor) is tensor


def test_checksums_are_off_only_while_chunks_are_written(tmp_path: Path) -> None:
    (tmp_path / "with").mkdir()
    chunk = Chunk("a", (3,), (0,), (3,), torch.float32, 0, lambda: torch.ones(3))
    write_chunks(tmp_path / "with", [chunk])
    assert torch.serialization.get_crc32_options()
    torch.save(torch.ones(3), tmp_path / "x.pt")
    assert zipfile.ZipFile(tmp_path / "x.pt").testzip() is None


@pytest.mark.parametrize("chunks", ["ours", "torch's"])
def test_chunks_are_views_of_the_file_where_they_can_be(chunks: str, tmp_path: Path) -> None:
    """Ours are aligned, and mapped; what torch wrote elsewhere is read. Changing a tensor never changes the file."""
    folder, values = tmp_path / "with", torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    folder.mkdir()
    pieces = [
        Chunk("pad", (3,), (0,), (3,), torch.float32, 0, lambda: torch.ones(3)),
        Chunk("a", (3, 4), (0, 0), (3, 4), torch.bfloat16, 0, lambda: values),
        Chunk("scalar", (), (), (), torch.float32, 0, lambda: torch.tensor(2.0)),
    ]
    write_chunks(folder, pieces)
    path = folder / "__0_0.distcp"
    if chunks == "torch's":
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        path.write_bytes(b"\0" * 13 + path.read_bytes())
        for info in metadata.storage_data.values():
            info.offset += 13
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    before = path.read_bytes()
    reader = CheckpointReader(folder)
    found = reader.read("a")
    assert torch.equal(found, values)
    assert float(reader.read("scalar")) == 2.0
    with Path("/proc/self/maps").open() as maps:
        assert any(str(path) in line for line in maps) == (chunks == "ours")
    found.zero_()
    assert path.read_bytes() == before


def test_only_a_chunks_own_pages_are_mapped(tmp_path: Path) -> None:
    """A private view of a file larger than the memory would be refused, so a chunk maps no more than itself."""
    (tmp_path / "with").mkdir()
    pieces = [
        Chunk(f"t{i}", (5000,), (0,), (5000,), torch.float32, 0, lambda i=i: torch.full((5000,), float(i)))  # type: ignore[misc]
        for i in range(20)
    ]
    write_chunks(tmp_path / "with", pieces)
    path = tmp_path / "with" / "__0_0.distcp"
    reader = CheckpointReader(tmp_path / "with")
    for i in range(20):
        tensor = reader.read(f"t{i}")
        assert torch.equal(tensor, torch.full((5000,), float(i)))
        lines = [
            line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line
        ]
        assert sum(int(stop, 16) - int(start, 16) for start, stop in lines) <= tensor.nbytes + 2 * 4096
        del tensor
