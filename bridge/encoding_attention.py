"""Attention for encoding on a CPU: whole matrix products by oneDNN, sequence by sequence of a packed row.

torch's kernel multiplies blocks too small for a matrix product's speed, with MKL's products; from some hundred tokens
a sequence on it takes 1.3 to 2 times as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_embed.bridge.linear import onednn_is_faster, times_transposed

if TYPE_CHECKING:
    from megatron_embed.bridge.attention import Run

#: mean length from which this is the faster way; the products of shorter sequences are not worth their calls
_LONG = 128
#: scores held at once; 4 MiB of them stay in the caches
_SCORES = 1 << 20


def products_are_faster(query: Tensor, runs: Sequence[Run]) -> bool:
    """Whether to compute this packed row here: a CPU whose products by oneDNN are fast, and sequences long enough."""
    suitable = query.device.type == "cpu" and query.dtype in (torch.float32, torch.bfloat16)
    mean = sum(run.sequences * run.keys for run in runs) / sum(run.sequences for run in runs)
    return suitable and mean >= _LONG and onednn_is_faster()


def attention_by_products(
    query: Tensor, key: Tensor, value: Tensor, runs: Sequence[Run], scale: float | None = None
) -> Tensor:
    """``softmax(scale · q kᵀ) v`` of every sequence of a packed row, without gradients.

    Scores and softmax are fp32; in 16 bits the weights are rounded before they meet the values, as torch's own kernel
    rounds them.

    Args:
        query: ``[Q, H, D]``, the sequences' queries end to end.
        key, value: ``[K, G, D]``; each head of them serves ``H / G`` heads.
        runs: the sequences' lengths.
        scale: by default ``1 / sqrt(D)``.

    Returns:
        ``[Q, H * D]``.
    """
    tokens, heads, size = query.shape
    groups = key.shape[1]
    # Head by head, so that each sequence's rows are one contiguous matrix. A softmax goes row by row, so the heads that
    # share keys may follow one another token by token.
    queries = _copy(query.view(tokens, groups, -1, size).permute(1, 0, 2, 3), torch.float32)
    keys = _copy(key.permute(1, 0, 2), torch.float32).mul_(size**-0.5 if scale is None else scale)
    values = _copy(value.permute(1, 0, 2), value.dtype)
    output = query.new_empty(tokens, groups, heads // groups, size)
    start = key_start = 0
    sequences = [(run.queries, run.keys) for run in runs for _ in range(run.sequences)]
    for query_count, key_count in sequences:
        stop, key_stop = start + query_count, key_start + key_count
        step = max(1, _SCORES // (key_count * heads // groups))
        for group in range(groups):
            theirs, meanings = keys[group, key_start:key_stop], values[group, key_start:key_stop].t()
            for first in range(start, stop, step):
                last = min(stop, first + step)
                weights = times_transposed(queries[group, first:last].view(-1, size), theirs).softmax(-1)
                summed = times_transposed(weights.to(value.dtype), meanings)
                output[first:last, group] = summed.view(last - first, -1, size)
        start, key_start = stop, key_stop
    return output.view(tokens, heads * size)


def _copy(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy in another dtype, in one pass."""
    return torch.empty(x.shape, dtype=dtype).copy_(x)
