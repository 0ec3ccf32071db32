"""The hand-written chains and their gradients, against the formulas in torch and transformers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.ministral3.modeling_ministral3 import apply_rotary_pos_emb

from megatron_embed.bridge.cpu.kernels import rms_norm, rotate, swiglu

EPS = 1e-5


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((output.double() * random(*output.shape, seed=9)).sum(), inputs)


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight


def plain_swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def tables(positions: Tensor, dimension: int) -> tuple[Tensor, Tensor]:
    angles = positions[:, None] * torch.logspace(0, -2, dimension // 2, dtype=torch.float64)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norm_and_its_gradients(dtype: torch.dtype) -> None:
    x, weight = random(7, 3, 16, dtype=dtype).requires_grad_(), random(16, dtype=dtype, seed=1).requires_grad_()
    exact = [value.detach().double().requires_grad_() for value in (x, weight)]
    found, wanted = rms_norm(x, weight, EPS), plain_norm(*exact)
    limit = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=limit, atol=limit)
    for a, b in zip(gradients(found, x, weight), gradients(wanted, *exact), strict=True):
        assert a.dtype == dtype
        assert ((a.double() - b).norm() / b.norm()) < limit


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_swiglu_and_its_gradient(dtype: torch.dtype) -> None:
    x = random(7, 3, 16, dtype=dtype).requires_grad_()
    before = x.detach().clone()
    exact = x.detach().double().requires_grad_()
    found, wanted = swiglu(x), plain_swiglu(exact)
    limit = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-6}[dtype]
    torch.testing.assert_close(found.double(), wanted, rtol=limit, atol=limit)
    (a,), (b,) = gradients(found, x), gradients(wanted, exact)
    assert ((a.double() - b).norm() / b.norm()) < limit
    assert found.is_contiguous()
    assert torch.equal(x, before)


def test_rope_is_that_of_transformers_and_so_is_its_gradient() -> None:
    cos, sin = tables(torch.arange(5, dtype=torch.float64), 8)
    x = random(5, 1, 3, 8).requires_grad_()
    theirs = x.detach().permute(1, 2, 0, 3).requires_grad_()
    wanted, _ = apply_rotary_pos_emb(theirs, theirs, cos[None], sin[None])
    found = rotate(x, cos[:, None, None], sin[:, None, None])
    torch.testing.assert_close(found.permute(1, 2, 0, 3), wanted, rtol=1e-14, atol=1e-14)
    weights = random(5, 1, 3, 8, seed=9)
    (a,) = torch.autograd.grad((found * weights).sum(), x)
    (b,) = torch.autograd.grad((wanted * weights.permute(1, 2, 0, 3)).sum(), theirs)
    torch.testing.assert_close(a.permute(1, 2, 0, 3), b, rtol=1e-14, atol=1e-14)
