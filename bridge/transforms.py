"""Pure tensor functions between the two layouts. Each inverse follows its function.

``hidden`` is the model width, ``groups`` the number of KV heads (on this tensor-parallel rank, when given its slices).
Every function works on a whole weight and on a tensor-parallel slice of it alike: slicing each Hugging Face weight
evenly and packing the slices gives exactly Megatron's slice of the packed weight.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack_qkv(q: Tensor, k: Tensor, v: Tensor, *, groups: int, head_dim: int) -> Tensor:
    """Fuse the projections into megatron-core's ``linear_qkv``: for each KV head its queries, its key, its value.

    Args:
        q: ``[heads * head_dim, hidden]``; ``k``, ``v``: ``[groups * head_dim, hidden]``; biases lack ``hidden``.

    Returns:
        ``[(heads + 2 * groups) * head_dim, hidden]``.
    """
    hidden = q.shape[1:]
    parts = (
        q.reshape(groups, -1, *hidden),
        k.reshape(groups, head_dim, *hidden),
        v.reshape(groups, head_dim, *hidden),
    )
    return torch.cat(parts, dim=1).reshape(-1, *hidden)


def unpack_qkv(qkv: Tensor, *, groups: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Invert :func:`pack_qkv`."""
    hidden = qkv.shape[1:]
    per_group = qkv.reshape(groups, -1, *hidden)
    queries = per_group.shape[1] - 2 * head_dim
    q, k, v = per_group.split([queries, head_dim, head_dim], dim=1)
    return q.reshape(-1, *hidden), k.reshape(-1, *hidden), v.reshape(-1, *hidden)


def pack_gate_up(gate: Tensor, up: Tensor) -> Tensor:
    """Build ``linear_fc1`` of a gated MLP: gate rows, then up rows. ``[ffn, hidden]`` twice → ``[2 * ffn, hidden]``."""
    return torch.cat((gate, up), dim=0)


def unpack_gate_up(fc1: Tensor) -> tuple[Tensor, Tensor]:
    """Invert :func:`pack_gate_up`."""
    gate, up = fc1.chunk(2, dim=0)
    return gate, up


def even_range(size: int, *, rank: int, world: int) -> slice:
    """Return the part of an evenly split dimension that ``rank`` of ``world`` holds."""
    if size % world:
        raise ValueError(f"a dimension of {size} cannot be split evenly over {world} ranks")
    step = size // world
    return slice(rank * step, (rank + 1) * step)


def padded_vocab_size(vocab_size: int, *, world: int) -> int:
    """Return the smallest multiple of the tensor-parallel size that holds the vocabulary (997 at TP 2 → 998)."""
    return -(-vocab_size // world) * world


def pad_vocab(embedding: Tensor, *, rows: int) -> Tensor:
    """Append zero rows to ``[vocab, hidden]`` to a total of ``rows``; no token id reaches them."""
    missing = rows - embedding.shape[0]
    return embedding if missing == 0 else torch.nn.functional.pad(embedding, (0, 0, 0, missing))


def dequantize_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    """Return an FP8 weight with one scale as bfloat16: the product in float32, rounded once."""
    return (weight.float() * scale.float().reshape(())).to(torch.bfloat16)
