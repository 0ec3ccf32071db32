"""megatron-core's parallel linear layers, with oneDNN's products on CPUs where these are faster.

torch multiplies fp32 matrices with MKL, which uses its fast kernels on Intel's processors only. torch also contains
oneDNN, which is about twice as fast on an AMD processor with AVX-512, in the same precision. A process that only
encodes can lay out the weights for oneDNN once, in place of once per product.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor

#: number of multiplications from which oneDNN's product repays its start (some 20 µs)
_LARGE = 1 << 22


def onednn_is_there() -> bool:
    """Return whether torch has oneDNN's linear layers."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def onednn_is_faster() -> bool:
    """Return whether fp32 products go to oneDNN: torch has it, and this is an AMD processor with AVX-512."""
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return amd and onednn_is_there() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def onednn_takes(x: Tensor, weight: Tensor) -> bool:
    """Return whether the product of the two goes to oneDNN: fp32 and large enough."""
    wide = x.dtype == weight.dtype == torch.float32
    return wide and x.numel() * weight.shape[0] >= _LARGE and onednn_is_faster()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x weightᵀ`` by oneDNN, with gradients: ``[..., in]``, ``[out, in]`` → ``[..., out]``, fp32 on a CPU."""
    return _Linear.apply(x, weight)


def times_transposed(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a bᵀ`` by oneDNN. Each factor is contiguous or the transposed view of a contiguous matrix.

    For slices of wider matrices oneDNN would use a reference kernel, which is a thousand times slower.
    """
    product: Tensor = torch.ops.mkldnn._linear_pointwise.default(a, b, None, "none", [], "")
    return product


def silu_of_product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``silu(a bᵀ)``, rounded once; factors as for :func:`times_transposed`."""
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
    """Mixin with oneDNN's products. Sequence-parallel layers keep megatron-core's, which save only their own tokens."""

    weight: Tensor
    sequence_parallel: bool
    #: the weight in oneDNN's layout, see :mod:`megatron_embed.bridge.cpu.packed_weights`
    packed: Tensor | None = None
    #: the gate's half of the weight or None; where it is set, ``packed`` is the other half and this layer adds SwiGLU
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
    """megatron-core's class with oneDNN's products; the weight is cut by output features."""


class RowParallelLinear(_OneDNN, layers.RowParallelLinear):
    """megatron-core's class with oneDNN's products; the weight is cut by input features."""
