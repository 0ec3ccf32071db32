"""Llama 3: the common form without additions."""

from __future__ import annotations

from megatron_embed.bridge.families.base import COMMON_FIXED, Family

LLAMA = Family(
    name="llama",
    title="Llama",
    config_class="LlamaConfig",
    model_class="LlamaModel",
    bidirectional_model_type="llama_bidirec",
    # pretraining_tp > 1 sums partial products in another order; transformers no longer computes it either.
    fixed={**COMMON_FIXED, "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
)
