"""The classes that layers are built of on a CPU."""

from __future__ import annotations

from torch import Tensor

from megatron_embed.bridge.cpu.attention import CpuAttention
from megatron_embed.bridge.cpu.embedding import CpuWordEmbedding
from megatron_embed.bridge.cpu.kernels import rms_norm, swiglu
from megatron_embed.bridge.cpu.linear import ColumnParallelLinear, RowParallelLinear
from megatron_embed.bridge.layers import Layers, RMSNorm, SwiGLU


class CpuRMSNorm(RMSNorm):
    """RMSNorm with its gradient written out."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden]`` → the same shape."""
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)


class CpuSwiGLU(SwiGLU):
    """SwiGLU with its gradient written out."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., 2 n]``, gate then up, → ``[..., n]``."""
        return swiglu(x)


def cpu_layers() -> Layers:
    """Return the classes of a CPU's layers."""
    return Layers(
        kind="cpu",
        column=ColumnParallelLinear,
        row=RowParallelLinear,
        attention=CpuAttention,
        activation=CpuSwiGLU,
        norm=CpuRMSNorm,
        table=CpuWordEmbedding,
    )
