"""The classes that make up one kind of layers, and the kind for CUDA without Transformer Engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_embed.bridge.attention import CudaAttention

LayerKind = Literal["transformer_engine", "cuda", "cpu"]


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The classes of one kind of layers, chosen once, before the model is built.

    Attributes:
        column, row: linear layers cut by output and by input features.
        attention: core attention.
        activation: the gated MLP's activation; megatron-core ignores it where it can use its own fused one.
        norm: RMSNorm; where ``column`` has its own norm, only the norm at the end of the block.
        table: the embedding's table.
        norm_in_column: whether ``column`` computes the norm in front of it, as Transformer Engine's does.
    """

    kind: LayerKind
    column: Any
    row: Any
    attention: Any
    activation: Any
    norm: Any
    table: type[VocabParallelEmbedding] = VocabParallelEmbedding
    norm_in_column: bool = False


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the attribute by which megatron-core finds sequence-parallel gradients.

    megatron-core's own wrapper of the same torch class refuses sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused: Any):
        # the placement of megatron-core's own layers
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class SwiGLU(MegatronModule):
    """The MLP's activation where megatron-core's own fused one is off, see :func:`transformer_config`."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config=config)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., 2 n]``, gate then up, to ``[..., n]``."""
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up


def cuda_layers() -> Layers:
    """Return megatron-core's own classes, with torch's attention kernels and norm."""
    return Layers(
        kind="cuda",
        column=ColumnParallelLinear,
        row=RowParallelLinear,
        attention=CudaAttention,
        activation=SwiGLU,
        norm=RMSNorm,
    )
