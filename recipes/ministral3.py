"""Recipes for Ministral 3. Each is a function without parameters; a sibling is the difference."""

from __future__ import annotations

from megatron_embed.recipes.config import DataSection, ModelSection, OptimizerSection, RecipeConfig, TrainSection


def ministral3_3b_embed_config() -> RecipeConfig:
    """3B: one GPU a replica, 128 queries a step, full fine-tuning."""
    return RecipeConfig(
        recipe="ministral3_3b_embed_config",
        model=ModelSection(hf_model="mistralai/Ministral-3-3B-Base-2512"),
        train=TrainSection(global_batch_size=128),
        optimizer=OptimizerSection(lr=5e-6),
    )


def ministral3_8b_embed_config() -> RecipeConfig:
    """8B: two GPUs a replica."""
    cfg = ministral3_3b_embed_config()
    cfg.recipe = "ministral3_8b_embed_config"
    cfg.model.hf_model = "mistralai/Ministral-3-8B-Base-2512"
    cfg.model.tensor_model_parallel_size = 2
    return cfg


def ministral3_14b_embed_config() -> RecipeConfig:
    """14B: four GPUs a replica."""
    cfg = ministral3_3b_embed_config()
    cfg.recipe = "ministral3_14b_embed_config"
    cfg.model.hf_model = "mistralai/Ministral-3-14B-Base-2512"
    cfg.model.tensor_model_parallel_size = 4
    return cfg


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
