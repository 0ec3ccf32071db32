"""Attention on a CPU. Encoding uses oneDNN's whole matrix products over groups of equally long sequences.

torch's kernel multiplies blocks that are too small for the full speed of a matrix product, and it uses MKL's products.
From about a hundred tokens a sequence it takes 1.3 to 2 times as long; in 16 bits, where many sequences are equally
long, up to 3 times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from megatron_embed.bridge.attention import SdpaAttention, SequenceInfo
from megatron_embed.bridge.cpu import kernels
from megatron_embed.bridge.cpu.linear import onednn_is_faster, times_transposed
from megatron_embed.bridge.sequences import Run

#: mean length in tokens from which whole products are faster; for shorter sequences the calls cost more than they save
_LONG = 96
#: length in tokens up to which whole products are faster in fp32; beyond it torch's kernel gains again
_LONGEST = 4096
#: number of scores held at once (8 MiB in fp32)
_SCORES = 1 << 21


class CpuAttention(SdpaAttention):
    """Attention on a CPU: training computes in fp32, encoding uses whole products where these are faster."""

    rotate = staticmethod(kernels.rotate)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, info: SequenceInfo) -> Tensor:
        """See :meth:`CoreAttention.attend`."""
        # Recomputation runs a training step's layers twice, the first time without gradients, and both runs must use
        # the same kernel. So a training step never uses the faster kernels of encoding.
        if not self.training and not torch.is_grad_enabled():
            if info.runs is not None and products_are_faster(query, info.runs):
                query, key, value = (x.squeeze(1) for x in (query, key, value))
                return attention_by_products(query, key, value, info.runs, self.softmax_scale).unsqueeze(1)
            return super().attend(query, key, value, info)
        # The CPU kernel's backward is 5 × slower in 16 bits than in fp32.
        wide = torch.promote_types(query.dtype, torch.float32)
        return super().attend(query.to(wide), key.to(wide), value.to(wide), info).to(query.dtype)


def products_are_faster(query: Tensor, runs: Sequence[Run]) -> bool:
    """Return whether whole products are faster for this packed row: oneDNN is fast and the sequences long enough."""
    suitable = query.dtype in (torch.float32, torch.bfloat16)
    if query.dtype == torch.float32 and max(run.keys for run in runs) > _LONGEST:
        return False
    mean = sum(run.sequences * run.keys for run in runs) / sum(run.sequences for run in runs)
    return suitable and mean >= _LONG and onednn_is_faster()


def attention_by_products(
    query: Tensor, key: Tensor, value: Tensor, runs: Sequence[Run], scale: float | None = None
) -> Tensor:
    """Return ``softmax(scale · q kᵀ) v`` for every sequence of a packed row, without gradients.

    Scores and softmax are fp32. In 16 bits the softmax weights are rounded before the product with the values, as in
    torch's own kernel.

    Args:
        query: ``[Q, H, D]``, the queries of all sequences end to end.
        key, value: ``[K, G, D]``; each KV head serves ``H / G`` query heads.
        runs: the sequences' lengths.
        scale: by default ``1 / sqrt(D)``.

    Returns:
        ``[Q, H * D]``.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    output = query.new_empty(query.shape)
    wide = query.dtype == torch.float32
    attend: Callable[..., Tensor] = _one_by_one if wide else _together
    products: Callable[[], AbstractContextManager[None]] = nullcontext if wide else _batches_by_onednn
    with products():
        for q, k, v, into in _parts(query, key, value, runs, output):
            # Softmax treats each row alone, so the heads that share keys become further rows, token by token.
            sequences, groups, tokens, sharing, size = q.shape
            rows = _copy(q, torch.float32).view(sequences * groups, tokens * sharing, size)
            into.copy_(attend(rows, k, v, scale).view(q.shape))
    return output.flatten(1)


def _parts(
    query: Tensor, key: Tensor, value: Tensor, runs: Sequence[Run], output: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield queries ``[N, G, T, H / G, D]``, keys (fp32) and values ``[N G, K, D]``, and the queries' output slice.

    Each part holds as many sequences of a run as ``_SCORES`` allows, or some queries of one that is too long for it.
    """
    heads, groups = query.shape[1], key.shape[1]
    asking = [run.sequences * run.queries for run in runs]
    asked = [run.sequences * run.keys for run in runs]
    rows = zip(query.split(asking), key.split(asked), value.split(asked), output.split(asking), strict=True)
    for run, (q, k, v, into) in zip(runs, rows, strict=True):
        tokens = max(1, _SCORES // (run.keys * heads))
        together = max(1, tokens // run.queries)
        by_sequence = [
            x.unflatten(0, (run.sequences, -1)).unflatten(2, (groups, -1)).transpose(1, 2).split(together)
            for x in (q, k, v, into)
        ]
        for qs, ks, vs, places in zip(*by_sequence, strict=True):
            keys, values = (
                _copy(x, dtype).flatten(2, 3).flatten(0, 1) for x, dtype in ((ks, torch.float32), (vs, v.dtype))
            )
            for part, place in zip(qs.split(tokens, dim=2), places.split(tokens, dim=2), strict=True):
                yield part, keys, values, place


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attend one matrix at a time, because torch would send a batch of fp32 products to MKL.

    Queries ``[B, M, D]`` and keys and values ``[B, K, D]`` give ``[B, M, D]``.
    """
    return torch.stack(
        [
            times_transposed(times_transposed(q, k).softmax(-1), v.t())
            for q, k, v in zip(query * scale, key, value, strict=True)
        ]
    )


def _together(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Compute :func:`_one_by_one` in batches, for fp32 queries and keys that hold bf16 numbers, and bf16 values."""
    scores = torch.baddbmm(query.new_empty(()), query, key.mT, beta=0, alpha=scale)
    return torch.bmm(scores.softmax(-1).to(value.dtype), value)


@contextmanager
def _batches_by_onednn() -> Iterator[None]:
    """Compute batched fp32 products by oneDNN inside. It may round the factors to bf16 (where a CPU has AMX).

    For bf16 numbers in fp32 this is exact: products and sums are fp32 either way. The setting is process-wide.
    """
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _copy(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a contiguous copy in another dtype, made in one pass."""
    return torch.empty(x.shape, dtype=dtype).copy_(x)
