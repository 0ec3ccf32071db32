"""Megatron checkpoints written and read tensor by tensor, with no model, no process group and no whole copy in memory.

The format is torch's distributed checkpoint (DCP) as megatron-core writes it: ``.metadata`` says which chunk of which
tensor lies at which bytes of which ``.distcp`` file, and each chunk there is what ``torch.save`` makes of a tensor.
Layers of one kind are one tensor with a leading layer axis: ``decoder.layers.mlp.linear_fc2.weight`` is
``[layers, hidden, ffn]``, one chunk for each layer and tensor-parallel slice.
"""

from __future__ import annotations

import math
import mmap
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

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

from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.checkpoint_folder import safe_metadata
from megatron_embed.conversion.prefetch import fault_in, one_ahead

_ALIGNED = 64


@dataclass(frozen=True)
class Chunk:
    """A box of one checkpoint tensor: where it lies, and how to get it when its turn comes."""

    key: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    #: file group, such as the rank whose share it would be
    rank: int
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_chunks(folder: Path, chunks: Iterable[Chunk], *, on_chunk: Callable[[Chunk], object] | None = None) -> None:
    """Write ``*.distcp`` and ``.metadata`` into ``folder``; a chunk is read while the one before it is written.

    torch's own writer does the same from a plan, but keeps the last tensor of every name it wrote until the end of the
    file: with a name for each layer that is the whole model.
    """
    state: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    streams: dict[int, Any] = {}
    read = one_ahead((chunk, fault_in(chunk.read())) for chunk in chunks)  # the thread ends with the iterator
    try:
        for chunk, tensor in read:
            if chunk.rank not in streams:
                streams[chunk.rank] = (folder / f"__{chunk.rank}_0.distcp").open("wb")
            entry = state.setdefault(
                chunk.key, TensorStorageMetadata(TensorProperties(chunk.dtype), torch.Size(chunk.global_shape), [])
            )
            assert entry.size == torch.Size(chunk.global_shape), chunk.key
            index = MetadataIndex(chunk.key, chunk.offsets, len(entry.chunks))
            entry.chunks.append(ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.shape)))
            storage[index] = _save(streams[chunk.rank], chunk, tensor)
            del tensor
            if on_chunk is not None:
                on_chunk(chunk)
    finally:
        read.close()
        for stream in streams.values():
            stream.close()
    for key, entry in state.items():
        held = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
        assert held == math.prod(entry.size), f"{key}: chunks hold {held} of {math.prod(entry.size)} values"
    metadata = Metadata(state, {}, storage, StorageMeta(), CURRENT_DCP_VERSION)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _save(stream: Any, chunk: Chunk, tensor: Tensor) -> _StorageInfo:
    assert tuple(tensor.shape) == chunk.shape, (chunk.key, tuple(tensor.shape), chunk.shape)
    tensor = tensor.to(chunk.dtype).contiguous()
    if tensor.untyped_storage().nbytes() != tensor.nbytes:
        tensor = tensor.clone()  # a view would be saved with all that it is a view of
    # torch.save aligns the values to its own start; aligned as a whole, they can be mapped
    stream.write(b"\0" * (-stream.tell() % _ALIGNED))
    start = stream.tell()
    with _without_checksums():
        torch.save(tensor, stream)
    return _StorageInfo(Path(stream.name).name, start, stream.tell() - start)


@contextmanager
def _without_checksums() -> Iterator[None]:
    """torch.save spends half of its time on CRC-32 sums, which torch.load never looks at."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class CheckpointReader:
    """Tensors of a Megatron checkpoint, each or a part of it on demand; only the chunks in question are read.

    Nothing of the checkpoint is run: the metadata passes an allow-list, chunks are loaded as tensors only.

    Raises:
        UserError: incomplete, damaged or foreign files.
    """

    def __init__(self, iter_dir: Path) -> None:
        self.path = iter_dir
        self._metadata = safe_metadata(iter_dir)
        storage = self._metadata.storage_data
        self._storage: Mapping[MetadataIndex, _StorageInfo] = storage
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def names(self) -> list[str]:
        """Names of all tensors, sorted; objects that are no tensors are not among them."""
        return sorted(self._tensors)

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def shape(self, key: str) -> tuple[int, ...]:
        """Global shape."""
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """dtype as stored."""
        return self._tensors[key].properties.dtype

    def read(self, key: str, index: Sequence[slice] | None = None) -> Tensor:
        """The whole tensor, or the box that ``index`` (slices of its leading dimensions) names."""
        entry = self._tensors[key]
        box = _box(entry.size, index or ())
        shape = [stop - start for start, stop in box]
        parts = [(chunk, inner) for chunk in entry.chunks if (inner := _overlap(chunk, box)) is not None]
        covered = sum(math.prod(stop - start for start, stop in inner) for _, inner in parts)
        if covered != math.prod(shape):
            raise UserError(
                f"{self.path}: {key} is incomplete: its chunks hold {covered} of {math.prod(shape)} values wanted"
            )
        if len(parts) == 1:  # nothing to put together: no copy
            return self._chunk(key, *parts[0])
        out = torch.empty(shape, dtype=entry.properties.dtype)
        for chunk, inner in parts:
            where = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(inner, box, strict=True))
            out[where] = self._chunk(key, chunk, inner)
        return out

    def _chunk(self, key: str, chunk: ChunkStorageMetadata, inner: list[tuple[int, int]]) -> Tensor:
        """The part ``inner`` (in global coordinates) of one chunk."""
        info = self._storage.get(MetadataIndex(key, chunk.offsets))
        if info is None or getattr(info, "transform_descriptors", None):
            raise UserError(f"{self.path}: {key}: the metadata does not say where its chunk at {chunk.offsets} lies")
        tensor = self._load(key, info)
        if not isinstance(tensor, Tensor) or tensor.shape != chunk.sizes:
            found = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise UserError(f"{self.path / info.relative_path}: {key}: found {found}, wanted shape {list(chunk.sizes)}")
        return tensor[tuple(slice(a - at, b - at) for (a, b), at in zip(inner, chunk.offsets, strict=True))]

    def _load(self, key: str, info: _StorageInfo) -> Any:
        file = PurePosixPath(str(info.relative_path))
        if len(file.parts) != 1 or file.name in ("", ".", ".."):
            raise UserError(f"{self.path}: {key} is said to lie in {str(file)!r}, outside of the checkpoint; refused")
        try:
            with (self.path / file).open("rb") as stream:
                view: Any = _create_file_view(stream, info.offset, info.length)
                return _mapped(stream, view, info)
        except FileNotFoundError:
            raise UserError(f"{self.path / file}: no such file, though {key} lies in it") from None
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"{self.path / file}: {key}: damaged, or more than a tensor ({reason}); refused") from None


def _mapped(stream: Any, view: Any, info: _StorageInfo) -> Any:
    """What ``torch.load`` gives of a chunk, but as a view of the file: nothing is copied before it is needed.

    The chunk's own description (``weights_only``) says what the tensor is; where its one storage lies as it is in
    memory, the bytes are mapped. Any other object, and a storage at an odd place, is read by ``torch.load``.
    """
    with torch.serialization.skip_data():
        tensor = torch.load(view, map_location="cpu", weights_only=True)
    view.seek(0)
    if type(tensor) is Tensor and tensor.numel() and tensor.is_contiguous() and tensor.storage_offset() == 0:
        zipped = torch._C.PyTorchFileReader(view)
        at = info.offset + zipped.get_record_offset("data/0") if zipped.has_record("data/0") else 1
        size = tensor.untyped_storage().nbytes()
        inside = at + size <= min(info.offset + info.length, os.fstat(stream.fileno()).st_size)
        if zipped.get_all_records().count("data/1") == 0 and at % _ALIGNED == 0 and size == tensor.nbytes and inside:
            # only the chunk's pages: a private view of a whole 28 GB file is refused where memory is smaller
            first = at - at % mmap.ALLOCATIONGRANULARITY
            pages = mmap.mmap(stream.fileno(), at - first + size, access=mmap.ACCESS_COPY, offset=first)
            return torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel(), offset=at - first).view(
                tensor.shape
            )
        view.seek(0)
    return torch.load(view, map_location="cpu", weights_only=True)


def _box(size: Sequence[int], index: Sequence[slice]) -> list[tuple[int, int]]:
    full = [*index, *[slice(None)] * (len(size) - len(index))]
    return [part.indices(n)[:2] for part, n in zip(full, size, strict=True)]


def _overlap(chunk: ChunkStorageMetadata, box: list[tuple[int, int]]) -> list[tuple[int, int]] | None:
    """What a chunk and a box have in common, in global coordinates; None: nothing."""
    common = [
        (max(start, at), min(stop, at + n))
        for (start, stop), at, n in zip(box, chunk.offsets, chunk.sizes, strict=True)
    ]
    return common if all(a < b for a, b in common) else None
