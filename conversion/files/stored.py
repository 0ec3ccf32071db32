"""Tensors that can be written without being read: their rows have addresses in files and are copied file to file.

Packing and slicing only move whole rows, so the functions for tensors also work on the rows' addresses: an int64 tensor
of the tensor's shape with one column. Consecutive rows are copied in one operation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from megatron_embed.conversion.files.block_writer import BlockWriter

#: an address is the file's number times this, plus the position in the file in bytes
_FILE = 1 << 44


@dataclass(frozen=True)
class Stored:
    """A tensor's bytes in files, row by row in the order of writing."""

    files: Sequence[Path]
    #: address of each row, in any shape
    rows: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype

    def runs(self) -> Iterator[tuple[Path, int, int]]:
        """Yield (file, position, bytes) of each contiguous piece, in order."""
        size = math.prod(self.shape) * self.dtype.itemsize // self.rows.numel()
        rows = self.rows.reshape(-1)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + (rows.diff() != size).nonzero().reshape(-1)])
        counts = torch.diff(starts, append=torch.tensor([len(rows)]))
        for address, count in zip(rows[starts].tolist(), counts.tolist(), strict=True):
            yield self.files[address // _FILE], address % _FILE, count * size


#: a tensor, or its place in files
Values: TypeAlias = Tensor | Stored


def addresses(file: int, position: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the addresses of the rows of a tensor (of one dimension or more) in file number ``file``.

    The result has the tensor's shape with one column.

    Args:
        position: the tensor's first byte in the file.
    """
    count, size = math.prod(shape[:-1]), shape[-1] * dtype.itemsize
    return (torch.arange(count) * size + (file * _FILE + position)).reshape(*shape[:-1], 1)


def write_values(stream: BlockWriter, values: Values, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Write a tensor's bytes at the stream's position; it must have this dtype already, see :mod:`casts`."""
    assert tuple(values.shape) == tuple(shape), (tuple(values.shape), tuple(shape))
    assert values.dtype == dtype, (values.dtype, dtype)
    if isinstance(values, Stored):
        for file, position, count in values.runs():
            stream.copy_from(file, position, count)
    else:
        tensor = values.contiguous()
        stream.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
