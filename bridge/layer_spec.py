"""What a transformer layer is built of: Transformer Engine where it can run, megatron-core's own layers otherwise.

The only file that knows of Transformer Engine.
"""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_embed.bridge import host
from megatron_embed.bridge.attention import (
    BidirectionalAttention,
    SequenceInfo,
    gather_keys_and_values,
    place_queries_and_keys,
)
from megatron_embed.bridge.kernels import rms_norm, swiglu
from megatron_embed.bridge.linear import ColumnParallelLinear, RowParallelLinear
from megatron_embed.bridge.mapping import LOCAL_ALIASES


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the attribute by which megatron-core finds sequence-parallel gradients.

    megatron-core's own wrapper of the same class refuses sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=host.device())
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden]`` → the same shape."""
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)


class SwiGLU(MegatronModule):
    """The MLP's activation where megatron-core's own fused one cannot be had, see :func:`transformer_config`."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config=config)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., 2 n]``, gate then up, → ``[..., n]``."""
        return swiglu(x)


def transformer_engine_is_usable() -> bool:
    """Whether layers are built of Transformer Engine: it is installed, and this process computes on CUDA."""
    return not host.cuda_is_hidden() and importlib.util.find_spec("transformer_engine") is not None


def block_spec(num_layers: int, *, use_te: bool | None = None) -> TransformerBlockSubmodules:
    """Spec of a stage's transformer block.

    Args:
        num_layers: layers on this stage.
        use_te: force or forbid Transformer Engine; None decides by :func:`transformer_engine_is_usable`.
    """
    use_te = transformer_engine_is_usable() if use_te is None else use_te
    layer, norm = _te_layer_spec() if use_te else _local_layer_spec()
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


def _layer(attention: SelfAttentionSubmodules, mlp: MLPSubmodules, **norms: Any) -> ModuleSpec:
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=SelfAttention, params={"attn_mask_type": AttnMaskType.padding}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            mlp=ModuleSpec(module=MLP, submodules=mlp),
            mlp_bda=get_bias_dropout_add,
            **norms,
        ),
    )


def _local_layer_spec() -> tuple[ModuleSpec, Any]:
    # Checkpoints use Transformer Engine's names, where the norm belongs to the linear layer behind it.
    aliases = {local.removesuffix("weight"): te.removesuffix("weight") for local, te in LOCAL_ALIASES.items()}
    layer = _layer(
        SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear, core_attention=BidirectionalAttention, linear_proj=RowParallelLinear
        ),
        MLPSubmodules(linear_fc1=ColumnParallelLinear, activation_func=SwiGLU, linear_fc2=RowParallelLinear),
        input_layernorm=RMSNorm,
        pre_mlp_layernorm=RMSNorm,
        sharded_state_dict_keys_map=aliases,
    )
    return layer, RMSNorm


def _te_layer_spec() -> tuple[ModuleSpec, Any]:
    from megatron.core.extensions import transformer_engine as te

    layer = _layer(
        SelfAttentionSubmodules(
            linear_qkv=te.TELayerNormColumnParallelLinear,
            core_attention=TransformerEngineAttention,
            linear_proj=te.TERowParallelLinear,
        ),
        MLPSubmodules(
            linear_fc1=te.TELayerNormColumnParallelLinear, activation_func=SwiGLU, linear_fc2=te.TERowParallelLinear
        ),
    )
    return layer, te.TENorm


class TransformerEngineAttention(MegatronModule):
    """Rope and query scale by position within the sequence, then Transformer Engine's attention."""

    def __init__(self, config: TransformerConfig, layer_number: int, **kwargs: Any):
        super().__init__(config=config)
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        # Keys and values are gathered here, which a bidirectional model can do without Transformer Engine's zigzag.
        config = copy.copy(config)
        config.context_parallel_size = 1
        self.attention = TEDotProductAttention(config=config, layer_number=layer_number, **kwargs)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: SequenceInfo | None = None,
    ) -> Tensor:
        """``[S, B, H, D]``, ``[S, B, G, D]`` twice → ``[S, B, H * D]``."""
        info = packed_seq_params
        assert info is not None
        query, key = place_queries_and_keys(query, key, info)
        key, value = gather_keys_and_values(key, value, info)
        if info.runs is None:
            # Transformer Engine's masks say what to leave out; without one there is no padding.
            mask = None if info.key_mask is None else ~info.key_mask
            kind = AttnMaskType.no_mask if mask is None else AttnMaskType.padding
            return self.attention(query, key, value, mask, attn_mask_type=kind)
        query, key, value = (x.squeeze(1) for x in (query, key, value))
        output = self.attention(
            query, key, value, None, attn_mask_type=AttnMaskType.padding, packed_seq_params=info.thd
        )
        return output.reshape(output.shape[0], 1, -1)
