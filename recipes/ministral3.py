"""Recipes for Ministral 3. Each is a function without parameters."""

from __future__ import annotations

from typing import Any

from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.recipes.config.full_training import full_training
from megatron_embed.recipes.config.schema import DataSection, ModelSection, OptimizerSection, RecipeConfig, TrainSection

_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "llama_4_scaling_beta": 0.1,
}
_COMMON: dict[str, Any] = {
    "vocab_size": 131072,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "rope_parameters": _YARN,
}
_SIZES: dict[str, dict[str, Any]] = {
    "3B": {"num_hidden_layers": 26, "hidden_size": 3072, "intermediate_size": 9216, "tie_word_embeddings": True},
    "8B": {"num_hidden_layers": 34, "hidden_size": 4096, "intermediate_size": 14336, "tie_word_embeddings": False},
    "14B": {
        "num_hidden_layers": 40,
        "hidden_size": 5120,
        "intermediate_size": 16384,
        "tie_word_embeddings": False,
        "rope_parameters": {**_YARN, "rope_theta": 1e9},
    },
}
#: hub id → encoder, see :data:`megatron_embed.recipes.SIZES`
SIZES: dict[str, EncoderConfig] = {
    f"mistralai/Ministral-3-{size}-{kind}-2512": EncoderConfig(**{**_COMMON, **own})
    for size, own in _SIZES.items()
    for kind in ("Base", "Instruct", "Reasoning")
}


def ministral3_3b_embed_config() -> RecipeConfig:
    """3B: one GPU a replica, 128 queries a step, full fine-tuning."""
    return full_training("ministral3_3b_embed_config", "mistralai/Ministral-3-3B-Base-2512")


def ministral3_8b_embed_config() -> RecipeConfig:
    """8B: two GPUs a replica."""
    return full_training(
        "ministral3_8b_embed_config", "mistralai/Ministral-3-8B-Base-2512", tensor_parallel=2, micro_batch_tokens=8192
    )


def ministral3_14b_embed_config() -> RecipeConfig:
    """14B: four GPUs a replica."""
    return full_training("ministral3_14b_embed_config", "mistralai/Ministral-3-14B-Base-2512", tensor_parallel=4)


def ministral3_tiny_embed_config() -> RecipeConfig:
    """tiny: some million parameters in fp32 on a laptop; model.hf_model must be given."""
    return RecipeConfig(
        recipe="ministral3_tiny_embed_config",
        model=ModelSection(precision="fp32"),
        data=DataSection(query_max_length=128, passage_max_length=128),
        train=TrainSection(
            global_batch_size=32, train_iters=200, micro_batch_tokens=4096, eval_interval=100, save_interval=100
        ),
        optimizer=OptimizerSection(lr=1e-4),
    )
