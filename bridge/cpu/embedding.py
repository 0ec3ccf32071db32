"""The embedding table on a CPU. Its gradient goes straight into DDP's buffer.

The table is most of a small model, but a batch touches few of its rows. torch's backward makes a dense gradient as
large as the table, filled with zeros, which DDP then adds to its buffer. Here backward adds only the rows of the batch,
in the buffer's precision (fp32 where the parameters have 16 bits). CUDA keeps the dense gradient: it costs little
there, and this sum would use atomics, in another order at every step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from torch import Tensor


class CpuWordEmbedding(VocabParallelEmbedding):
    """megatron-core's table, with a lookup whose backward touches only the rows of the batch."""

    def forward(self, input_: Tensor) -> Tensor:
        """Map ids ``[b, s]`` to ``[b, s, hidden]``, or ``[s / TP, b, hidden]`` with ``reduce_scatter_embeddings``."""
        rows = input_
        if self.tp_group.size() > 1:
            elsewhere = (input_ < self.vocab_start_index) | (input_ >= self.vocab_end_index)
            rows = (input_ - self.vocab_start_index).masked_fill(elsewhere, 0)
        in_buffer = torch.is_grad_enabled() and hasattr(self.weight, "main_grad")
        found = _LookUp.apply(rows, self.weight) if in_buffer else F.embedding(rows, self.weight)
        if self.tp_group.size() > 1:
            found = found.masked_fill(elsewhere[..., None], 0.0)
        if self.reduce_scatter_embeddings:
            found_SBH = found.transpose(0, 1).contiguous()
            return reduce_scatter_to_sequence_parallel_region(found_SBH, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(found, group=self.tp_group)


class _LookUp(torch.autograd.Function):
    """``weight[rows]``. Backward adds to ``weight.main_grad`` and tells DDP, as megatron-core's fused linears do."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.weight = weight
        return F.embedding(rows, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (rows,), weight = ctx.saved_tensors, ctx.weight
        into: Tensor = weight.main_grad
        into.index_add_(0, rows.flatten(), grads[0].flatten(0, -2).to(into.dtype))
        weight.grad_added_to_main_grad = True
        # Nothing reads or writes this tensor: under overlapped reduction its presence tells DDP that this is ready.
        return None, torch.empty_like(weight)
