"""The values that the recipes of full fine-tuning share."""

from __future__ import annotations

from megatron_embed.recipes.config.schema import ModelSection, OptimizerSection, RecipeConfig, TrainSection


def full_training(
    recipe: str, hf_model: str, *, tensor_parallel: int = 1, lr: float = 5e-6, micro_batch_tokens: int = 16384
) -> RecipeConfig:
    """Return a recipe that trains all weights of a model from the hub, with 128 queries a step.

    Args:
        recipe: name of the recipe function.
        tensor_parallel: GPUs of a replica.
    """
    return RecipeConfig(
        recipe=recipe,
        model=ModelSection(hf_model=hf_model, tensor_model_parallel_size=tensor_parallel),
        train=TrainSection(global_batch_size=128, micro_batch_tokens=micro_batch_tokens),
        optimizer=OptimizerSection(lr=lr),
    )
