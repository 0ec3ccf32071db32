"""Attention on a CPU, and for encoding there: whole matrix products by oneDNN, equally long sequences together.

torch's kernel multiplies blocks too small for a matrix product's speed, with MKL's products; from some hundred tokens
a sequence on it takes 1.3 to 2 times as long, in 16 bits up to 3 times where many are equally long.
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

#: mean length from which this is the faster way; the products of shorter sequences are not worth their calls
_LONG = 96
#: length up to which it is in fp32, where torch's kernel gains again
_LONGEST = 4096
#: scores held at once, 8 MiB
_SCORES = 1 << 21


class CpuAttention(SdpaAttention):
    """Attention on a CPU: training in fp32 inside, encoding by whole products where these are faster."""

    rotate = staticmethod(kernels.rotate)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, info: SequenceInfo) -> Tensor:
        """See :meth:`CoreAttention.attend`."""
        # A training step computes twice what it does not keep: the faster kernels of encoding must not be one of these.
        if not self.training and not torch.is_grad_enabled():
            if info.runs is not None and products_are_faster(query, info.runs):
                query, key, value = (x.squeeze(1) for x in (query, key, value))
                return attention_by_products(query, key, value, info.runs, self.softmax_scale).unsqueeze(1)
            return super().attend(query, key, value, info)
        # The CPU kernel's backward is 5 × slower in 16 bits than in fp32.
        wide = torch.promote_types(query.dtype, torch.float32)
        return super().attend(query.to(wide), key.to(wide), value.to(wide), info).to(query.dtype)


def products_are_faster(query: Tensor, runs: Sequence[Run]) -> bool:
    """Return whether to compute this packed row here: oneDNN's products are fast, and sequences long enough."""
    suitable = query.dtype in (torch.float32, torch.bfloat16)
    if query.dtype == torch.float32 and max(run.keys for run in runs) > _LONGEST:
        return False
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
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    output = query.new_empty(query.shape)
    wide = query.dtype == torch.float32
    attend: Callable[..., Tensor] = _one_by_one if wide else _together
    products: Callable[[], AbstractContextManager[None]] = nullcontext if wide else _batches_by_onednn
    with products():
        for q, k, v, into in _parts(query, key, value, runs, output):
            # A softmax goes row by row, so the heads that share keys may follow one another token by token.
            sequences, groups, tokens, sharing, size = q.shape
            rows = _copy(q, torch.float32).view(sequences * groups, tokens * sharing, size)
            into.copy_(attend(rows, k, v, scale).view(q.shape))
    return output.flatten(1)


def _parts(
    query: Tensor, key: Tensor, value: Tensor, runs: Sequence[Run], output: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Queries ``[N, G, T, H / G, D]``, keys fp32 and values ``[N G, K, D]``, and the queries' place in the output.

    As many sequences of a run at once as ``_SCORES`` allow; of one too long for it, some queries at a time.
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
    """``[B, M, D]``, ``[B, K, D]`` twice → ``[B, M, D]``; torch would send a batch of fp32 products to MKL."""
    return torch.stack(
        [
            times_transposed(times_transposed(q, k).softmax(-1), v.t())
            for q, k, v in zip(query * scale, key, value, strict=True)
        ]
    )


def _together(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The same of fp32 queries and keys that hold bf16 numbers, and bf16 values."""
    scores = torch.baddbmm(query.new_empty(()), query, key.mT, beta=0, alpha=scale)
    return torch.bmm(scores.softmax(-1).to(value.dtype), value)


@contextmanager
def _batches_by_onednn() -> Iterator[None]:
    """Within, batched fp32 products are oneDNN's, which may round what they multiply to bf16 (where a CPU has AMX).

    Of bf16 numbers in fp32 that is exact: products and sums are fp32 either way. The setting is the process's own.
    """
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _copy(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy in another dtype, in one pass."""
    return torch.empty(x.shape, dtype=dtype).copy_(x)
