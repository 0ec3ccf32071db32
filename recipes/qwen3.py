"""Recipes for Qwen3 (dense). Each is a function without parameters."""

from __future__ import annotations

from typing import Any

from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.recipes.config.full_training import full_training
from megatron_embed.recipes.config.schema import RecipeConfig

_COMMON: dict[str, Any] = {
    "family": "qwen3",
    "vocab_size": 151936,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
_SIZES: dict[str, dict[str, Any]] = {
    "0.6B": {
        "num_hidden_layers": 28,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "4B": {"num_hidden_layers": 36, "hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
    "8B": {"num_hidden_layers": 36, "hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False},
}
#: hub id → encoder, see :data:`megatron_embed.recipes.SIZES`
SIZES: dict[str, EncoderConfig] = {
    f"Qwen/Qwen3-{size}{kind}": EncoderConfig(**{**_COMMON, **own}, max_position_embeddings=positions)
    for size, own in _SIZES.items()
    for kind, positions in {"-Base": 32768, "": 40960}.items()
}


def qwen3_0p6b_embed_config() -> RecipeConfig:
    """Qwen3 0.6B: one GPU a replica, 128 queries a step, full fine-tuning."""
    return full_training("qwen3_0p6b_embed_config", "Qwen/Qwen3-0.6B-Base", lr=1e-5)


def qwen3_4b_embed_config() -> RecipeConfig:
    """Qwen3 4B: two GPUs a replica."""
    return full_training("qwen3_4b_embed_config", "Qwen/Qwen3-4B-Base", tensor_parallel=2)


def qwen3_8b_embed_config() -> RecipeConfig:
    """Qwen3 8B: two GPUs a replica."""
    return full_training("qwen3_8b_embed_config", "Qwen/Qwen3-8B-Base", tensor_parallel=2, micro_batch_tokens=8192)
