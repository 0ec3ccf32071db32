"""megatron-core's parallel linear layers with oneDNN's products on a CPU, where these are the faster ones.

torch multiplies fp32 matrices with MKL, which takes its fast kernels on Intel's processors only. On an AMD processor
with AVX-512 oneDNN, which torch carries as well, does it about twice as fast, in the same precision. And whoever only
encodes can have the weights laid out once as oneDNN wants them, in place of once a product.
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


def onednn_is_there() -> bool:
    """Whether torch has oneDNN's linear layers."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def onednn_is_faster() -> bool:
    """Whether fp32 products go to oneDNN: torch has it, and this is an AMD processor with AVX-512."""
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return amd and onednn_is_there() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def onednn_takes(x: Tensor, weight: Tensor) -> bool:
    """Return whether the product of these two goes to oneDNN: fp32, and large enough."""
    wide = x.dtype == weight.dtype == torch.float32
    return wide and x.numel() * weight.shape[0] >= _LARGE and onednn_is_faster()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x weightᵀ`` by oneDNN, its gradients too: ``[..., in]``, ``[out, in]`` → ``[..., out]``, all fp32 on a CPU."""
    return _Linear.apply(x, weight)


def times_transposed(a: Tensor, b: Tensor) -> Tensor:
    """``a bᵀ`` by oneDNN; either is contiguous or the transposed view of a contiguous matrix.

    Slices of wider matrices would be multiplied by a reference kernel, a thousand times slower.
    """
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(a, b, None, "none", [], "")
    return product


def silu_of_product(a: Tensor, b: Tensor) -> Tensor:
    """``silu(a bᵀ)``, rounded once; the operands as for :func:`times_transposed`."""
    gate: Tensor = torch.ops.mkldnn._linear_pointwise.default(a, b, None, "swish", [], "")
    return gate


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight)
        return times_transposed(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].flatten(0, -2).contiguous()
        of_x, of_weight = ctx.needs_input_grad
        return (
            times_transposed(grad, weight.t()).view_as(x) if of_x else None,
            times_transposed(grad.t(), x.flatten(0, -2).t()) if of_weight else None,
        )


class _OneDNN:
    """What both layers change. Sequence-parallel layers stay megatron-core's, which keep only their own tokens."""

    weight: Tensor
    sequence_parallel: bool
    #: the weight as oneDNN wants it, see :mod:`megatron_embed.bridge.cpu.packed_weights`
    packed: Tensor | None = None
    #: where not None, this is the gate's half of the weight, ``packed`` the other one, and SwiGLU is computed here
    packed_gate: Tensor | None = None

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.packed is not None:
            assert not torch.is_grad_enabled(), "packed weights are for encoding only"
            rows = input.contiguous().flatten(0, -2)
            output = times_transposed(rows, self.packed)
            if self.packed_gate is not None:
                output.mul_(silu_of_product(rows, self.packed_gate))
            return output.unflatten(0, input.shape[:-1])
        plain = kwargs["bias"] is None and not kwargs["sequence_parallel"]
        if not plain or not onednn_takes(input, weight):
            return super()._forward_impl(input, weight, *args, **kwargs)  # type: ignore[misc]
        if kwargs["allreduce_dgrad"]:
            input = copy_to_tensor_model_parallel_region(input, group=kwargs["tp_group"])
        return linear(input, weight)


class ColumnParallelLinear(_OneDNN, layers.ColumnParallelLinear):
    """megatron-core's; its weight is cut by output features."""


class RowParallelLinear(_OneDNN, layers.RowParallelLinear):
    """megatron-core's; its weight is cut by input features."""
