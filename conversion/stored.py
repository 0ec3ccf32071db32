"""Tensors that need not be read to be written: where their rows lie in files, for the kernel to copy.

Packing and slicing only move whole rows, so the functions that do it to tensors do it to the rows' addresses as well:
an int64 tensor of the tensor's shape with one column. Rows that follow one another are copied in one go.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeAlias

import torch
from torch import Tensor

from megatron_embed.bridge.errors import UserError

#: an address is the file's number times this, plus the position in the file
_FILE = 1 << 44
_STEP = 8 << 20


@dataclass(frozen=True)
class Stored:
    """A tensor's bytes in files, row by row in the order in which they shall be written."""

    files: Sequence[Path]
    #: address of each row, in any shape
    rows: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype

    def runs(self) -> Iterator[tuple[Path, int, int]]:
        """(file, position, bytes) of all that lies in one piece, in order."""
        size = math.prod(self.shape) * self.dtype.itemsize // self.rows.numel()
        rows = self.rows.reshape(-1)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + (rows.diff() != size).nonzero().reshape(-1)])
        counts = torch.diff(starts, append=torch.tensor([len(rows)]))
        for address, count in zip(rows[starts].tolist(), counts.tolist(), strict=True):
            yield self.files[address // _FILE], address % _FILE, count * size

    def copy_into(self, stream: BinaryIO) -> None:
        """Write them at the stream's position; nothing passes through this process's memory."""
        stream.flush()
        for file, position, left in self.runs():
            with file.open("rb", buffering=0) as source:
                while left:
                    if not (done := _copy(stream.fileno(), source.fileno(), position, left)):
                        raise UserError(f"{file}: ends within its tensors; fetch or write it again")
                    position, left = position + done, left - done
        stream.seek(os.lseek(stream.fileno(), 0, os.SEEK_CUR))  # past what the stream does not know of


def _copy(target: int, source: int, position: int, count: int) -> int:
    """As :func:`os.sendfile`, also where a file system does not offer that."""
    try:
        return os.sendfile(target, source, position, count)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        return os.write(target, os.pread(source, min(count, _STEP), position))


#: a tensor, or where it lies as it is
Values: TypeAlias = Tensor | Stored


def addresses(file: int, position: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Of the rows of a tensor (at least one dimension) that lies in file number ``file``: its shape with one column."""
    count, size = math.prod(shape[:-1]), shape[-1] * dtype.itemsize
    return (torch.arange(count) * size + (file * _FILE + position)).reshape(*shape[:-1], 1)


def write_values(stream: BinaryIO, values: Values, shape: Sequence[int], dtype: torch.dtype) -> None:
    """A tensor's bytes, cast to ``dtype``, at the stream's position."""
    assert tuple(values.shape) == tuple(shape), (tuple(values.shape), tuple(shape))
    if isinstance(values, Stored):
        assert values.dtype == dtype, (values.dtype, dtype)
        values.copy_into(stream)
    else:
        tensor = values.to(dtype).contiguous()
        stream.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
