"""megatron-core's parallel linear layers with oneDNN's fp32 product where MKL, which torch calls, has no good one.

MKL takes its fast kernels on Intel's processors only. On an AMD processor with AVX-512 oneDNN, which torch carries as
well (and itself uses for 16-bit types), multiplies fp32 matrices about twice as fast, in the same precision.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor

#: multiplications from which oneDNN's product is worth its start (some 20 µs)
_LARGE = 1 << 22


@functools.cache
def onednn_is_faster() -> bool:
    """Whether fp32 products go to oneDNN: torch has it, and this is an AMD processor with AVX-512."""
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    has_it = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return amd and has_it and torch.backends.cpu.get_cpu_capability() == "AVX512"


def onednn_takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the product of these two goes to oneDNN: fp32 on a CPU, and large enough."""
    on_cpu = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    return on_cpu and x.numel() * weight.shape[0] >= _LARGE and onednn_is_faster()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x weightᵀ`` by oneDNN, its gradients too: ``[..., in]``, ``[out, in]`` → ``[..., out]``, all fp32 on a CPU."""
    return _Linear.apply(x, weight)


def _times_transposed(a: Tensor, b: Tensor) -> Tensor:
    """``a bᵀ``; either may be a transposed view."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return product


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _times_transposed(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)
        of_x, of_weight = ctx.needs_input_grad
        return (
            _times_transposed(grad, weight.t()).view_as(x) if of_x else None,
            _times_transposed(grad.t(), x.flatten(0, -2).t()) if of_weight else None,
        )


class _OneDNN:
    """What both layers change. Sequence-parallel layers stay megatron-core's, which keep only their own tokens."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plain = kwargs.get("bias") is None and not kwargs["sequence_parallel"]
        if not plain or not onednn_takes(input, weight):
            return super()._forward_impl(input, weight, *args, **kwargs)  # type: ignore[misc]
        if kwargs["allreduce_dgrad"]:
            input = copy_to_tensor_model_parallel_region(input, group=kwargs["tp_group"])
        return linear(input, weight)


class ColumnParallelLinear(_OneDNN, layers.ColumnParallelLinear):
    """megatron-core's; its weight is cut by output features."""


class RowParallelLinear(_OneDNN, layers.RowParallelLinear):
    """megatron-core's; its weight is cut by input features."""
