"""The number of micro-batches whose graphs a step keeps (``loss.kept_micro_batches``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from megatron_embed.bridge.cpu import host
from megatron_embed.recipes.encoding.micro_batches import MicroBatch
from megatron_embed.recipes.planning.activations import Activations, Shape
from megatron_embed.recipes.planning.state import ModelChunk
from megatron_embed.recipes.training.device_memory import spare_memory

#: The step after which ``auto`` looks at the memory: the optimizer's state exists from the end of the first on, so the
#: second step's peak is that of every later one.
MEASURED_STEP = 2


@dataclass
class KeptCount:
    """How many of a step's micro-batches keep their graphs.

    Attributes:
        wanted: a number, or ``auto``.
        chunks: the (virtual) stages of this rank.
        spare: bytes of memory that graphs may fill on the rank with the least; ``auto`` keeps none while it is unknown.
    """

    wanted: int | Literal["auto"]
    activations: Activations
    chunks: Sequence[ModelChunk]
    recompute: str
    steps: int = 0
    spare: int | None = None

    def of(self, micro_batches: Sequence[MicroBatch]) -> int:
        """Return the number for a step; ranks with the same micro-batches and stage get the same one."""
        if self.wanted != "auto":
            return min(self.wanted, len(micro_batches))
        left, count = self.spare or 0, 0
        for micro_batch in micro_batches:
            shape = Shape.of(micro_batch.tokens)
            left -= sum(self.activations.chunk(chunk, shape, self.recompute) for chunk in self.chunks)
            if left < 0:
                break
            count += 1
        return count

    def close_step(self, mode: str) -> None:
        """Look at the memory once two cached steps are done. All ranks call it after every step."""
        self.steps += mode == "cached"
        if self.wanted == "auto" and self.spare is None and self.steps == MEASURED_STEP:
            # All ranks take the least, because tensor- and context-parallel ranks must keep the same number.
            least = torch.tensor(spare_memory(), dtype=torch.int64, device=host.device())
            dist.all_reduce(least, op=dist.ReduceOp.MIN)
            self.spare = max(0, int(least.item()))
