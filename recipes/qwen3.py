"""Recipes for Qwen3 (dense). Each is a function without parameters; a sibling is the difference."""

from __future__ import annotations

from megatron_embed.recipes.config import ModelSection, OptimizerSection, RecipeConfig, TrainSection


def qwen3_0p6b_embed_config() -> RecipeConfig:
    """Qwen3 0.6B: one GPU a replica, 128 queries a step, full fine-tuning."""
    return RecipeConfig(
        recipe="qwen3_0p6b_embed_config",
        model=ModelSection(hf_model="Qwen/Qwen3-0.6B-Base"),
        train=TrainSection(global_batch_size=128),
        optimizer=OptimizerSection(lr=1e-5),
    )


def qwen3_4b_embed_config() -> RecipeConfig:
    """Qwen3 4B: two GPUs a replica."""
    cfg = qwen3_0p6b_embed_config()
    cfg.recipe = "qwen3_4b_embed_config"
    cfg.model.hf_model = "Qwen/Qwen3-4B-Base"
    cfg.model.tensor_model_parallel_size = 2
    cfg.optimizer.lr = 5e-6
    return cfg


def qwen3_8b_embed_config() -> RecipeConfig:
    """Qwen3 8B: two GPUs a replica."""
    cfg = qwen3_4b_embed_config()
    cfg.recipe = "qwen3_8b_embed_config"
    cfg.model.hf_model = "Qwen/Qwen3-8B-Base"
    return cfg
