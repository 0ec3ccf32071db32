"""Qwen3 (dense): each head of queries and keys passes an RMSNorm before rope."""

from __future__ import annotations

from megatron_embed.bridge.families.base import COMMON_FIXED, Family, Row

_ATTENTION, _HF_ATTENTION = "decoder.layers.{layer}.self_attention", "layers.{layer}.self_attn"

QWEN3 = Family(
    name="qwen3",
    title="Qwen3",
    config_class="Qwen3Config",
    model_class="Qwen3Model",
    fixed={**COMMON_FIXED, "attention_bias": False, "use_sliding_window": False},
    qk_norm=True,
    layer_rows=(
        Row(f"{_ATTENTION}.q_layernorm.weight", (f"{_HF_ATTENTION}.q_norm.weight",), "copy", None, (("head",),)),
        Row(f"{_ATTENTION}.k_layernorm.weight", (f"{_HF_ATTENTION}.k_norm.weight",), "copy", None, (("head",),)),
    ),
)
