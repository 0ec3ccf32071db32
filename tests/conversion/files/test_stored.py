"""Tensors written without being read: the rows that are copied are the tensors' own bytes."""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.hf_files import Source

from megatron_embed.bridge import transforms
from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.files import page_cache
from megatron_embed.conversion.files.block_writer import BlockWriter
from megatron_embed.conversion.files.stored import Stored, addresses, write_values
from megatron_embed.conversion.hf.folder import HFFolder
from megatron_embed.conversion.mcore.tensors import CheckpointReader, Chunk, write_chunks
from megatron_embed.conversion.mcore.weights import chunks


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two files of random bytes."""
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(os.urandom(3000))
    return paths


def tensor_at(path: Path, position: int, shape: tuple[int, ...]) -> torch.Tensor:
    size = 2 * torch.Size(shape).numel()
    return torch.frombuffer(bytearray(path.read_bytes()[position : position + size]), dtype=torch.int16).reshape(shape)


def written(values: Stored, path: Path) -> bytes:
    with ThreadPoolExecutor(1) as disk, BlockWriter(path, disk) as stream:
        stream.write(b"before")
        write_values(stream, values, values.shape, values.dtype)
        assert stream.tell() == 6 + torch.Size(values.shape).numel() * values.dtype.itemsize
        stream.write(b"after")
    return path.read_bytes().removeprefix(b"before").removesuffix(b"after")


def test_packed_rows_of_two_files(files: list[Path], tmp_path: Path) -> None:
    shapes, places = [(16, 6), (4, 6), (4, 6)], [(0, 10), (1, 0), (1, 48)]
    parts = [tensor_at(files[file], at, shape) for (file, at), shape in zip(places, shapes, strict=True)]
    rows = [addresses(*place, shape, torch.int16) for place, shape in zip(places, shapes, strict=True)]
    wanted = transforms.pack_qkv(*parts, groups=2, head_dim=2)
    found = Stored(files, transforms.pack_qkv(*rows, groups=2, head_dim=2), (24, 6), torch.int16)
    assert written(found, tmp_path / "out") == wanted.numpy().tobytes()
    assert len(list(found.runs())) == 6  # for each group its queries, its key, its value
    half = Stored(files, rows[0][4:8], (1, 4, 6), torch.int16)
    assert written(half, tmp_path / "out") == parts[0][4:8].numpy().tobytes()
    assert list(half.runs()) == [(files[0], 10 + 4 * 12, 48)]


def test_neighbours_in_one_file_are_one_run(files: list[Path]) -> None:
    rows = torch.cat([addresses(1, 0, (3, 4), torch.int16), addresses(1, 24, (2, 4), torch.int16)])
    assert list(Stored(files, rows, (5, 4), torch.int16).runs()) == [(files[1], 0, 40)]
    vector = Stored(files, addresses(0, 8, (7,), torch.int16), (7,), torch.int16)
    assert list(vector.runs()) == [(files[0], 8, 14)]


def test_a_file_that_became_shorter(files: list[Path], tmp_path: Path) -> None:
    values = Stored(files, addresses(0, 0, (1500,), torch.int16), (1500,), torch.int16)
    os.truncate(files[0], 100)
    with pytest.raises(UserError, match="ends within its tensors"):
        written(values, tmp_path / "out")


def test_far_into_a_large_file(tmp_path: Path) -> None:
    path, at = tmp_path / "hollow", 5 << 30
    with path.open("wb") as stream:
        stream.seek(at)
        stream.write(bytes(range(64)))
    values = Stored([path], addresses(0, at, (8, 4), torch.int16), (8, 4), torch.int16)
    assert written(values, tmp_path / "out") == bytes(range(64))


def test_reading_ahead_is_never_an_error(files: list[Path], tmp_path: Path) -> None:
    assert page_cache.read_ahead(files[0], 1000, 10**9) == 2000
    assert page_cache.read_ahead(tmp_path / "none", 0, 1) == 0
    page_cache._read(tmp_path / "none", "*")
    page_cache._read(tmp_path, "*")
    page_cache.begin_reading("org/model-on-the-hub", "*")


@pytest.mark.parametrize("tp", [1, 2])
def test_only_columns_and_other_dtypes_are_read(tp: int, source: Source, tmp_path: Path) -> None:
    """Row-parallel slices are columns of HF's weights; all else is copied from file to file, either way."""
    folder = HFFolder(source("model", dtype="bfloat16"))
    config = folder.encoder_config()
    pieces = list(chunks(folder, config, dtype=torch.bfloat16, tp=tp))
    read = [piece.key for piece in pieces if not isinstance(piece.read(), Stored)]
    assert {key.split(".")[-2] for key in read} == ({"linear_proj", "linear_fc2"} if tp > 1 else set())
    others = chunks(folder, config, dtype=torch.float32, tp=tp)
    assert not any(isinstance(piece.read(), Stored) for piece in others)
    write_chunks(tmp_path, pieces)
    reader = CheckpointReader(tmp_path)
    kinds = {key: isinstance(reader.values(key, torch.bfloat16), Stored) for key in reader.names()}
    assert [key for key, kind in kinds.items() if not kind] == sorted(set(read))
    assert not any(isinstance(reader.values(key, torch.float32), Stored) for key in reader.names())


def test_a_chunk_is_what_torch_saves(tmp_path: Path) -> None:
    """Where the values are left out and written in between, the bytes are the same."""
    values = torch.randn(3, 5, 8).bfloat16()
    save_file({"x": torch.ones(4), "a": values}, tmp_path / "x.safetensors")
    at = (tmp_path / "x.safetensors").read_bytes().index(values.view(torch.uint8).numpy().tobytes())
    place = addresses(0, at, (3, 5, 8), values.dtype)
    kept = Stored([tmp_path / "x.safetensors"], place, (3, 5, 8), values.dtype)
    for name, given in {"read": values, "stored": kept}.items():
        (tmp_path / name).mkdir()
        write_chunks(tmp_path / name, [Chunk("a", (3, 5, 8), (0, 0, 0), (3, 5, 8), values.dtype, 0, lambda v=given: v)])
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(values, wanted := io.BytesIO())
    finally:
        torch.serialization.set_crc32_options(before)
    for name in ("read", "stored"):
        assert (tmp_path / name / "__0_0.distcp").read_bytes() == wanted.getvalue()
