"""Training recipes. Names load on first use, so `--list` and `--help` need neither torch nor megatron-core."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from megatron_embed.bridge.quiet import expected_warnings_ignored

if TYPE_CHECKING:
    from collections.abc import Callable

    from megatron_embed.bridge.config import EncoderConfig
    from megatron_embed.recipes.config.schema import RecipeConfig
    from megatron_embed.recipes.encoding.encoder import Encoder
    from megatron_embed.recipes.llama import llama31_8b_embed_config, llama32_1b_embed_config
    from megatron_embed.recipes.ministral3 import (
        ministral3_3b_embed_config,
        ministral3_8b_embed_config,
        ministral3_14b_embed_config,
        ministral3_tiny_embed_config,
    )
    from megatron_embed.recipes.qwen3 import qwen3_0p6b_embed_config, qwen3_4b_embed_config, qwen3_8b_embed_config
    from megatron_embed.recipes.training.loop import train

    RECIPES: dict[str, Callable[[], RecipeConfig]]
    SIZES: dict[str, EncoderConfig]

#: recipe function → module of its model family
_RECIPE_MODULES = {
    "ministral3_3b_embed_config": "ministral3",
    "ministral3_8b_embed_config": "ministral3",
    "ministral3_14b_embed_config": "ministral3",
    "ministral3_tiny_embed_config": "ministral3",
    "llama32_1b_embed_config": "llama",
    "llama31_8b_embed_config": "llama",
    "qwen3_0p6b_embed_config": "qwen3",
    "qwen3_4b_embed_config": "qwen3",
    "qwen3_8b_embed_config": "qwen3",
}
#: every other exported name → its module
_MODULES = {
    "Encoder": "megatron_embed.recipes.encoding.encoder",
    "RecipeConfig": "megatron_embed.recipes.config.schema",
}

__all__ = [
    "RECIPES",
    "SIZES",
    "Encoder",
    "RecipeConfig",
    "llama31_8b_embed_config",
    "llama32_1b_embed_config",
    "ministral3_3b_embed_config",
    "ministral3_8b_embed_config",
    "ministral3_14b_embed_config",
    "ministral3_tiny_embed_config",
    "qwen3_0p6b_embed_config",
    "qwen3_4b_embed_config",
    "qwen3_8b_embed_config",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "RECIPES":
        return {recipe: __getattr__(recipe) for recipe in _RECIPE_MODULES}
    if name == "SIZES":
        modules = [
            importlib.import_module(f"{__name__}.{module}") for module in dict.fromkeys(_RECIPE_MODULES.values())
        ]
        return {model: encoder for module in modules for model, encoder in module.SIZES.items()}
    if name == "train":  # the module is callable, see train.py
        return importlib.import_module(f"{__name__}.train")
    module = f"{__name__}.{_RECIPE_MODULES[name]}" if name in _RECIPE_MODULES else _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with expected_warnings_ignored():  # megatron-core warns while it is imported
        return getattr(importlib.import_module(module), name)
