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
    groups, sharing = key.shape[1], heads // key.shape[1]
    # Head by head, so that each sequence's rows are one contiguous matrix. A softmax goes row by row, so the heads that
    # share keys may follow one another token by token.
    queries = _copy(query.view(tokens, groups, sharing, size).permute(1, 0, 2, 3), torch.float32).flatten(1, 2)
    keys = _copy(key.permute(1, 0, 2), torch.float32).mul_(size**-0.5 if scale is None else scale)
    values = _copy(value.permute(1, 0, 2), value.dtype).mT
    output = query.new_empty(tokens, groups, sharing, size)
    asking = [run.queries for run in runs for _ in range(run.sequences)]
    asked = [run.keys for run in runs for _ in range(run.sequences)]
    for group in range(groups):
        # All sequences are cut in one call: each product is so short that a Python call more would show.
        rows = queries[group].split([count * sharing for count in asking])
        columns, contents = keys[group].split(asked), values[group].split(asked, dim=1)
        for q, k, v, into in zip(rows, columns, contents, output[:, group].split(asking), strict=True):
            step = max(1, _SCORES // (len(k) * sharing))
            parts = [(q, into)] if step >= len(into) else zip(q.split(step * sharing), into.split(step), strict=True)
            for part, target in parts:
                weights = times_transposed(part, k).softmax(-1).to(value.dtype)
                target.copy_(times_transposed(weights, v).view_as(target))
    return output.view(tokens, heads * size)


def _copy(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy in another dtype, in one pass."""
    return torch.empty(x.shape, dtype=dtype).copy_(x)
