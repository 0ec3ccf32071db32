"""Recipes for Llama. Each is a function without parameters; a sibling is the difference."""

from __future__ import annotations

from megatron_embed.recipes.config import ModelSection, OptimizerSection, RecipeConfig, TrainSection


def llama32_1b_embed_config() -> RecipeConfig:
    """Llama 3.2 1B: one GPU a replica, 128 queries a step, full fine-tuning."""
    return RecipeConfig(
        recipe="llama32_1b_embed_config",
        model=ModelSection(hf_model="meta-llama/Llama-3.2-1B"),
        train=TrainSection(global_batch_size=128),
        optimizer=OptimizerSection(lr=5e-6),
    )


def llama31_8b_embed_config() -> RecipeConfig:
    """Llama 3.1 8B: two GPUs a replica."""
    cfg = llama32_1b_embed_config()
    cfg.recipe = "llama31_8b_embed_config"
    cfg.model.hf_model = "meta-llama/Llama-3.1-8B"
    cfg.model.tensor_model_parallel_size = 2
    return cfg
