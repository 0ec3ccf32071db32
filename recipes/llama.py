"""Recipes for Llama. Each is a function without parameters."""

from __future__ import annotations

from typing import Any

from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.recipes.config.full_training import full_training
from megatron_embed.recipes.config.schema import RecipeConfig

_KINDS = ("", "-Instruct")
_COMMON: dict[str, Any] = {
    "family": "llama",
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "original_max_position_embeddings": 8192},
}
_1B: dict[str, Any] = {"num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64}
_8B: dict[str, Any] = {"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "head_dim": 128}
#: hub id → encoder, see :data:`megatron_embed.recipes.SIZES`
SIZES: dict[str, EncoderConfig] = {
    **{f"meta-llama/Llama-3.2-1B{kind}": EncoderConfig(**_COMMON, **_1B, tie_word_embeddings=True) for kind in _KINDS},
    **{f"meta-llama/Llama-3.1-8B{kind}": EncoderConfig(**_COMMON, **_8B, tie_word_embeddings=False) for kind in _KINDS},
}


def llama32_1b_embed_config() -> RecipeConfig:
    """Llama 3.2 1B: one GPU a replica, 128 queries a step, full fine-tuning."""
    return full_training("llama32_1b_embed_config", "meta-llama/Llama-3.2-1B")


def llama31_8b_embed_config() -> RecipeConfig:
    """Llama 3.1 8B: two GPUs a replica."""
    return full_training(
        "llama31_8b_embed_config", "meta-llama/Llama-3.1-8B", tensor_parallel=2, micro_batch_tokens=8192
    )
