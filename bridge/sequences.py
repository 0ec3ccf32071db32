"""TokenBatch: the token ids of one micro-batch, and the place of each sequence in them.

Legend: ``n`` sequences, ``b`` rows, ``s`` columns. Padded: one sequence per row (``b = n``). Packed: one row
(``b = 1``) with the sequences end to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Run(NamedTuple):
    """Neighbouring sequences of a packed row that are equally long.

    ``queries`` is less than ``keys`` only where a sequence crosses the edge of a context-parallel slice.
    """

    sequences: int
    queries: int
    keys: int


@dataclass(frozen=True)
class TokenBatch:
    """Ids of a micro-batch, with the facts about them that attention and pooling need.

    Attributes:
        input_ids: ``[b, s]`` int64.
        positions: ``[b, s]`` int64, each token's position within its own sequence; 0 on padding.
        lengths: tokens of each of the ``n`` sequences.
        mask: ``[b, s]`` bool, True on real tokens; None where there is no padding. Padded form only.
        packed: whether the sequences lie end to end in one row.
        padding: columns at the end of a packed row that belong to no sequence.
        left_padded: whether some row begins with padding.
    """

    input_ids: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    mask: Tensor | None
    packed: bool
    padding: int = 0
    left_padded: bool = False

    @property
    def real_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def total_tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def max_length(self) -> int:
        return max(self.lengths)

    @classmethod
    def from_padded(cls, input_ids: Tensor, attention_mask: Tensor) -> TokenBatch:
        """Build a batch from a tokenizer's ``[b, s]`` ids and mask, padded on either side."""
        mask = attention_mask.bool()
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        lengths = tuple(mask.sum(dim=1).tolist())
        full = bool(mask.all())
        left = not full and not bool(mask[:, 0].all())
        return cls(input_ids, positions, lengths, None if full else mask, packed=False, left_padded=left)

    @classmethod
    def pad(cls, sequences: Sequence[Sequence[int]], *, pad_id: int, multiple_of: int = 1) -> TokenBatch:
        """Put one sequence in each row, padded on the right to the longest; round columns up to ``multiple_of``."""
        longest = max(len(ids) for ids in sequences)
        columns = -(-longest // multiple_of) * multiple_of
        input_ids = torch.full((len(sequences), columns), pad_id, dtype=torch.long)
        mask = torch.zeros(len(sequences), columns, dtype=torch.bool)
        for row, ids in enumerate(sequences):
            input_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
            mask[row, : len(ids)] = True
        return cls.from_padded(input_ids, mask)

    @classmethod
    def pack(cls, sequences: Sequence[Sequence[int]], *, pad_id: int, multiple_of: int = 1) -> TokenBatch:
        """Put the sequences end to end in one row; no sequence attends to the tail that fills up to ``multiple_of``."""
        lengths = tuple(len(ids) for ids in sequences)
        padding = -sum(lengths) % multiple_of
        ids = [token for sequence in sequences for token in sequence] + [pad_id] * padding
        positions = torch.cat([torch.arange(n) for n in (*lengths, padding)])
        return cls(torch.tensor([ids]), positions[None], lengths, None, packed=True, padding=padding)

    def to(self, device: torch.device) -> TokenBatch:
        """Return the batch on another device."""
        if self.input_ids.device == device:
            return self
        mask = None if self.mask is None else to_device(self.mask, device)
        return replace(
            self, input_ids=to_device(self.input_ids, device), positions=to_device(self.positions, device), mask=mask
        )


def to_device(values: Tensor | Sequence[int], device: torch.device, *, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor of the host, or a list's numbers, on a device without waiting for what it computes.

    A copy from ordinary memory makes the host wait for the GPU's queue; one from pinned memory joins the queue.
    """
    tensor = values if isinstance(values, Tensor) else torch.tensor(values, dtype=dtype)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
