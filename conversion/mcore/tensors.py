"""Reader and writer of Megatron checkpoints, tensor by tensor, without a model, process group or whole copy in memory.

The format is torch's distributed checkpoint (DCP) as megatron-core writes it: ``.metadata`` gives, for each chunk of
each tensor, the ``.distcp`` file and its bytes there, and a chunk is the output of ``torch.save`` for a tensor. Layers
of one kind are one tensor with a leading layer axis: ``decoder.layers.mlp.linear_fc2.weight`` is
``[layers, hidden, ffn]``, with one chunk for each layer and tensor-parallel slice.
"""

from __future__ import annotations

import math
import mmap
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_embed.bridge.errors import UserError, reason
from megatron_embed.conversion.files.block_writer import BlockWriter
from megatron_embed.conversion.files.checksums import Checksums, DamagedCheckpoint, FileSums, Summing
from megatron_embed.conversion.files.prefetch import fault_in, one_ahead
from megatron_embed.conversion.files.progress import byte_bar
from megatron_embed.conversion.files.stored import Stored, Values, addresses, write_values
from megatron_embed.conversion.mcore.folder import check_lengths, with_older
from megatron_embed.conversion.mcore.safe_loading import safe_metadata

_ALIGNED = 64


@dataclass(frozen=True)
class Chunk:
    """A box of one checkpoint tensor: its place, and the function that reads it in its turn."""

    key: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    #: number of the file group, such as the rank that would own the chunk
    rank: int
    read: Callable[[], Values]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_chunks(folder: Path, chunks: Sequence[Chunk], *, progress: bool = False) -> dict[str, FileSums]:
    """Write ``*.distcp`` and ``.metadata`` into ``folder``; read each chunk while the previous one is written.

    torch's own writer does the same from a plan, but keeps the last tensor of every name until the end of the file:
    with one name per layer this is the whole model.

    Returns:
        The checksums of the ``*.distcp`` files, by name.
    """
    state: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    streams: dict[int, BlockWriter] = {}
    sums: dict[str, Summing] = {}
    with ExitStack() as open_files:
        disk = open_files.enter_context(ThreadPoolExecutor(1, "disk"))
        total = sum(chunk.nbytes for chunk in chunks)
        advance = open_files.enter_context(byte_bar("import", total, enabled=progress))
        # closing the iterator ends the thread that reads
        read = open_files.enter_context(closing(one_ahead((chunk, fault_in(chunk.read())) for chunk in chunks)))
        for chunk, values in read:
            if chunk.rank not in streams:
                name = f"__{chunk.rank}_0.distcp"
                file = BlockWriter(folder / name, disk, sums.setdefault(name, Summing()))
                streams[chunk.rank] = open_files.enter_context(file)
            entry = state.setdefault(
                chunk.key, TensorStorageMetadata(TensorProperties(chunk.dtype), torch.Size(chunk.global_shape), [])
            )
            assert entry.size == torch.Size(chunk.global_shape), chunk.key
            index = MetadataIndex(chunk.key, chunk.offsets, len(entry.chunks))
            entry.chunks.append(ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.shape)))
            storage[index] = _save(streams[chunk.rank], chunk, values)
            del values
            advance(chunk.nbytes)
    for key, entry in state.items():
        held = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
        assert held == math.prod(entry.size), f"{key}: chunks hold {held} of {math.prod(entry.size)} values"
    metadata = Metadata(state, {}, storage, StorageMeta(), CURRENT_DCP_VERSION)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return {name: each.result() for name, each in sums.items()}


def _save(stream: BlockWriter, chunk: Chunk, values: Values) -> _StorageInfo:
    # torch.save aligns the values to its own start; with an aligned start, the values can be mapped
    stream.write(b"\0" * (-stream.tell() % _ALIGNED))
    start = stream.tell()
    around = _Around(stream, lambda: write_values(stream, values, chunk.shape, chunk.dtype))
    with without_crc32(), torch.serialization.skip_data():
        torch.save(torch.empty(chunk.shape, dtype=chunk.dtype), around)
    return _StorageInfo(stream.path.name, start, stream.tell() - start)


class _Around:
    """Stream for ``torch.save``: it passes on the bytes around a tensor's values, and writes the values at the skip."""

    def __init__(self, stream: BlockWriter, write_values: Callable[[], None]) -> None:
        self.write, self.tell, self._values = stream.write, stream.tell, write_values

    def flush(self) -> None:
        """Ignore torch's flush at the end of each tensor, so that blocks are filled further."""

    def seek(self, skipped: int, whence: int) -> int:
        assert whence == os.SEEK_CUR
        until = self.tell() + skipped
        self._values()
        assert self.tell() == until, (self.tell(), until)
        return until


@contextmanager
def without_crc32() -> Iterator[None]:
    """Switch off torch.save's CRC-32 sums, which take half of its time and which torch.load never checks."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class CheckpointReader:
    """Tensors of a Megatron checkpoint, read whole or in part on request; only the chunks concerned are read.

    No code of the checkpoint is run: an allow-list guards the metadata, and chunks are loaded as tensors only.

    Data are compared with the checkpoint's checksums first, if it has any.

    Raises:
        UserError: files are incomplete, damaged or foreign.
    """

    def __init__(self, iter_dir: Path) -> None:
        self.path = iter_dir
        self._metadata = safe_metadata(iter_dir)
        try:
            self._checks = Checksums.read(iter_dir)
            if self._checks is None:
                check_lengths(iter_dir, self._metadata)
        except DamagedCheckpoint as error:
            raise with_older(error, iter_dir) from None
        storage = self._metadata.storage_data
        self._storage: Mapping[MetadataIndex, _StorageInfo] = storage
        #: the files that the addresses of :meth:`addresses` refer to
        self.files: list[Path] = []
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted, without objects that are no tensors."""
        return sorted(self._tensors)

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the global shape."""
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """Return the stored dtype."""
        return self._tensors[key].properties.dtype

    def read(self, key: str, index: Sequence[slice] | None = None) -> Tensor:
        """Read the whole tensor, or the box that ``index`` (slices of its leading dimensions) names."""
        size = self._tensors[key].size
        tensor = self._assemble(key, _box(size, index or ()), self._load)
        assert tensor is not None
        return tensor

    def addresses(self, key: str, index: Sequence[slice] | None = None, *, dtype: torch.dtype) -> Tensor | None:
        """Return the addresses in :attr:`files` of the rows of a tensor or a box of it.

        Return None if rows are divided, the dtype is another one, or the values cannot be copied as stored.
        """
        entry = self._tensors[key]
        whole = all(chunk.sizes[-1:] == entry.size[-1:] for chunk in entry.chunks)
        if self.dtype(key) != dtype or not math.prod(entry.size) or not entry.size or not whole:
            return None
        return self._assemble(key, [*_box(entry.size[:-1], index or ()), (0, 1)], self._addresses)

    def values(self, key: str, dtype: torch.dtype) -> Values:
        """Return a tensor's place in files if it is stored in this dtype and in whole rows, else the tensor itself."""
        rows = self.addresses(key, dtype=dtype)
        return self.read(key) if rows is None else Stored(self.files, rows, self.shape(key), dtype)

    def _assemble(
        self,
        key: str,
        box: list[tuple[int, int]],
        load: Callable[[str, ChunkStorageMetadata, _StorageInfo], Tensor | None],
    ) -> Tensor | None:
        """Assemble a box (in global coordinates) from the results of ``load`` for each chunk."""
        shape = [stop - start for start, stop in box]
        parts = [(c, inner) for c in self._tensors[key].chunks if (inner := _overlap(c, box)) is not None]
        covered = sum(math.prod(stop - start for start, stop in inner) for _, inner in parts)
        if covered != math.prod(shape):
            raise UserError(
                f"{self.path}: {key} is incomplete: its chunks hold {covered} of the {math.prod(shape)} values wanted; "
                f"take a checkpoint that was saved to its end"
            )
        out = None if parts else torch.empty(shape, dtype=self.dtype(key))
        for chunk, inner in parts:
            info = self._storage.get(MetadataIndex(key, chunk.offsets))
            if info is None or getattr(info, "transform_descriptors", None):
                raise UserError(
                    f"{self.path}: {key}: .metadata does not say in which file its chunk at {chunk.offsets} is stored; "
                    f"take a checkpoint that was saved to its end"
                )
            loaded = load(key, chunk, info)
            if loaded is None:
                return None
            part = loaded[tuple(slice(a - at, b - at) for (a, b), at in zip(inner, chunk.offsets, strict=True))]
            if len(parts) == 1:  # a single part needs no copy
                return part
            out = torch.empty(shape, dtype=part.dtype) if out is None else out
            out[tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(inner, box, strict=True))] = part
        return out

    def _load(self, key: str, chunk: ChunkStorageMetadata, info: _StorageInfo) -> Tensor:
        with self._open(key, info) as (stream, view):
            described, at = _describe(stream, view, info)
            if at is None:
                described = torch.load(view, map_location="cpu", weights_only=True)
            self._check(key, chunk, info, described)
            return described if at is None else _mapped(stream, described, at)

    def _addresses(self, key: str, chunk: ChunkStorageMetadata, info: _StorageInfo) -> Tensor | None:
        with self._open(key, info) as (stream, view):
            described, at = _describe(stream, view, info)
        if at is None or described.dtype != self.dtype(key):
            return None
        self._check(key, chunk, info, described)
        path = self.path / info.relative_path
        if path not in self.files:
            self.files.append(path)
        return addresses(self.files.index(path), at, chunk.sizes, described.dtype)

    def _check(self, key: str, chunk: ChunkStorageMetadata, info: _StorageInfo, tensor: Any) -> None:
        if not isinstance(tensor, Tensor) or tensor.shape != chunk.sizes:
            found = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise UserError(f"{self.path / info.relative_path}: {key}: found {found}, wanted shape {list(chunk.sizes)}")

    @contextmanager
    def _open(self, key: str, info: _StorageInfo) -> Iterator[tuple[BinaryIO, Any]]:
        """Yield the file, and the chunk's part of it."""
        file = PurePosixPath(str(info.relative_path))
        if len(file.parts) != 1 or file.name in ("", ".", ".."):
            raise UserError(f"{self.path}: {key} is said to lie in {str(file)!r}, outside of the checkpoint; refused")
        try:
            if self._checks is not None:
                self._checks.check(file.name, info.offset, info.offset + info.length)
            with (self.path / file).open("rb") as stream:
                yield stream, _create_file_view(stream, info.offset, info.length)
        except DamagedCheckpoint as error:
            raise with_older(error, self.path) from None
        except FileNotFoundError:
            raise UserError(
                f"{self.path / file}: no such file, but {key} is stored in it; copy the whole checkpoint"
            ) from None
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
            raise UserError(
                f"{self.path / file}: {key}: damaged, or more than a tensor ({reason(error)}); refused"
            ) from None


def _describe(stream: Any, view: Any, info: _StorageInfo) -> tuple[Any, int | None]:
    """Return the tensor of a chunk without its values, and the position in the file of the values as in memory.

    The chunk's own description (``weights_only``) defines the tensor. The position is None for any other object, and
    for a storage at an unusual place; ``torch.load`` must read these.
    """
    with torch.serialization.skip_data():
        tensor = torch.load(view, map_location="cpu", weights_only=True)
    view.seek(0)
    if type(tensor) is not Tensor or not tensor.numel() or not tensor.is_contiguous() or tensor.storage_offset():
        return tensor, None
    zipped = torch._C.PyTorchFileReader(view)
    at = info.offset + zipped.get_record_offset("data/0") if zipped.has_record("data/0") else 1
    size = tensor.untyped_storage().nbytes()
    inside = at + size <= min(info.offset + info.length, os.fstat(stream.fileno()).st_size)
    alone = zipped.get_all_records().count("data/1") == 0
    view.seek(0)
    return tensor, at if alone and at % _ALIGNED == 0 and size == tensor.nbytes and inside else None


def _mapped(stream: Any, like: Tensor, at: int) -> Tensor:
    """Return a tensor that is a view of the file: nothing is copied before it is needed."""
    # Map only the chunk's pages: the system refuses a private view of a whole 28 GB file where memory is smaller.
    first = at - at % mmap.ALLOCATIONGRANULARITY
    pages = mmap.mmap(stream.fileno(), at - first + like.nbytes, access=mmap.ACCESS_COPY, offset=first)
    return torch.frombuffer(pages, dtype=like.dtype, count=like.numel(), offset=at - first).view(like.shape)


def _box(size: Sequence[int], index: Sequence[slice]) -> list[tuple[int, int]]:
    full = [*index, *[slice(None)] * (len(size) - len(index))]
    return [part.indices(n)[:2] for part, n in zip(full, size, strict=True)]


def _overlap(chunk: ChunkStorageMetadata, box: list[tuple[int, int]]) -> list[tuple[int, int]] | None:
    """Return the overlap of a chunk and a box, in global coordinates; None if there is none."""
    common = [
        (max(start, at), min(stop, at + n))
        for (start, stop), at, n in zip(box, chunk.offsets, chunk.sizes, strict=True)
    ]
    return common if all(a < b for a, b in common) else None
