"""Weights for encoding alone, laid out for oneDNN once in place of once per product."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core.transformer.mlp import MLP
from torch import Tensor
from torch.nn import Identity, Module

from megatron_embed.bridge.cpu.layers import CpuSwiGLU
from megatron_embed.bridge.cpu.linear import ColumnParallelLinear, RowParallelLinear, onednn_is_faster, onednn_is_there


def pack_weights(stages: Iterable[Module]) -> None:
    """Lay out the linear layers' weights for oneDNN, where that is faster. Afterwards the layers can only encode.

    The plain weights' memory is freed, so that no weight is in memory twice. A gated MLP's first layer becomes two
    products: the gate's product applies SiLU while the result is in registers, and each output is half as large.
    """
    for stage in stages:
        for module in list(stage.modules()):
            if isinstance(module, MLP) and isinstance(module.activation_func, CpuSwiGLU) and _helps(module.linear_fc1):
                _pack_gated(module)
            elif isinstance(module, ColumnParallelLinear | RowParallelLinear) and _helps(module):
                module.packed = _packed(module.weight.detach())
                _give_back(module.weight)


def _pack_gated(mlp: MLP) -> None:
    layer = mlp.linear_fc1
    gate, up = layer.weight.detach().chunk(2)
    layer.packed_gate, layer.packed = _packed(gate), _packed(up)
    mlp.activation_func = Identity()
    _give_back(layer.weight)


def _packed(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def _give_back(weight: Tensor) -> None:
    weight.untyped_storage().resize_(0)


def _helps(layer: Module) -> bool:
    """Return whether packing a layer's weight helps; False for a packed one."""
    if (
        not isinstance(layer, ColumnParallelLinear | RowParallelLinear)
        or layer.sequence_parallel
        or layer.bias is not None
        or layer.packed is not None
    ):
        return False
    weight = layer.weight
    if not onednn_is_there():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32 and onednn_is_faster()
