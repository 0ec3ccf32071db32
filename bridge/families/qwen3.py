"""Qwen3 (dense): an RMSNorm on each head of queries and keys before rope."""

from __future__ import annotations

from megatron_embed.bridge.families.base import COMMON_FIXED, FP32, Family, LayerSize, Row

_ATTENTION, _HF_ATTENTION = "decoder.layers.{layer}.self_attention", "layers.{layer}.self_attn"


def _layer_activations(size: LayerSize) -> int:
    """Return bytes of the norms' input, of a factor per head, and of the output, ``T w (q + k)``, where it is kept."""
    widths = size.queries + size.keys
    output = size.tokens * widths * size.width if size.keeps_attention_input else 0
    return size.projected + size.tokens * (widths // size.head_dim) * FP32 + output


QWEN3 = Family(
    name="qwen3",
    title="Qwen3",
    config_class="Qwen3Config",
    model_class="Qwen3Model",
    fixed={**COMMON_FIXED, "attention_bias": False, "use_sliding_window": False},
    not_compared={"max_window_layers": "the layers from which on a sliding window, which is refused, would be used"},
    # It also tells megatron-core to sum these norms' gradients, of which each tensor-parallel rank holds a part.
    layer_options={"qk_layernorm": True},
    layer_rows=(
        Row(f"{_ATTENTION}.q_layernorm.weight", (f"{_HF_ATTENTION}.q_norm.weight",), "copy", None, (("head",),)),
        Row(f"{_ATTENTION}.k_layernorm.weight", (f"{_HF_ATTENTION}.k_norm.weight",), "copy", None, (("head",),)),
    ),
    layer_activations=_layer_activations,
)
