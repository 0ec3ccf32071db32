"""Elementwise chains with explicit gradients: SwiGLU, RMSNorm, rope.

On a CPU nothing fuses such chains, and autograd's own backward passes over memory about twice as often as necessary
(casts, concatenations, a tensor per operation). Every pass counts, so these functions write results into existing
tensors and compute cheap values again instead of keeping them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(x: Tensor) -> Tensor:
    """Return ``silu(a) · b`` of ``x [..., 2 n]`` with halves ``a``, ``b`` (Shazeer 2020); backward keeps only ``x``."""
    return _SwiGLU.apply(x)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,), (grad,) = ctx.saved_tensors, grads
        gate, up = x.chunk(2, dim=-1)
        into = torch.empty_like(x)
        into_gate, into_up = into.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=into_up)
        torch.ops.aten.silu_backward(grad * up, gate, grad_input=into_gate)
        return into


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return ``x / sqrt(mean(x²) + eps) · weight`` over the last dimension (Zhang and Sennrich 2019).

    The computation is in fp32, or in the dtype of ``x`` where that is wider, and rounds once, as torch's own does.
    """
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        states = x.to(wide)
        inverse = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
        inverse = inverse.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        # a wider copy of 16-bit states belongs to this function, which may overwrite it
        normed = states * inverse if states is x else states.mul_(inverse)
        return normed.mul_(weight.to(wide)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse = ctx.saved_tensors
        (grad,) = grads
        wide_weight = weight.to(inverse.dtype)
        normed = x.to(inverse.dtype) * inverse
        share = grad * normed  # each token's share of the weight's gradient
        weight_grad = share.flatten(0, -2).sum(0)
        along = (share @ wide_weight).unsqueeze(-1).div_(x.shape[-1])
        into = (grad * wide_weight).addcmul_(normed, along, value=-1).mul_(inverse)
        return into.to(x.dtype), weight_grad.to(weight.dtype), None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of the last dimension: ``x cos + rotate_half(x) sin`` (Su et al. 2021, HF's half layout).

    Args:
        x: ``[..., D]``; never changed in place, because recomputation needs it.
        cos, sin: broadcastable to ``x``; the two halves of each are equal. They get no gradient.
    """
    return _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grads[0], cos, sin, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    result = x * cos
    (first, second), (sin, _) = x.chunk(2, dim=-1), sin.chunk(2, dim=-1)
    into_first, into_second = result.chunk(2, dim=-1)
    into_first.addcmul_(second, sin, value=-direction)
    into_second.addcmul_(first, sin, value=direction)
    return result
