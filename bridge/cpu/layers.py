"""Layer classes for a CPU."""

from __future__ import annotations

from torch import Tensor

from megatron_embed.bridge.cpu.attention import CpuAttention
from megatron_embed.bridge.cpu.embedding import CpuWordEmbedding
from megatron_embed.bridge.cpu.kernels import rms_norm, swiglu
from megatron_embed.bridge.cpu.linear import ColumnParallelLinear, RowParallelLinear
from megatron_embed.bridge.layers import Layers, RMSNorm, SwiGLU


class CpuRMSNorm(RMSNorm):
    """RMSNorm with an explicit gradient."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[..., hidden]``; return the same shape."""
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)


class CpuSwiGLU(SwiGLU):
    """SwiGLU with an explicit gradient."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., 2 n]``, gate then up, to ``[..., n]``."""
        return swiglu(x)


def cpu_layers() -> Layers:
    """Return the layer classes for a CPU."""
    return Layers(
        kind="cpu",
        column=ColumnParallelLinear,
        row=RowParallelLinear,
        attention=CpuAttention,
        activation=CpuSwiGLU,
        norm=CpuRMSNorm,
        table=CpuWordEmbedding,
    )
