"""Training recipes. Names load on first use, so that `--list` and `--help` need neither torch nor megatron-core."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import megatron_embed.bridge  # noqa: F401  first: megatron-core's warnings are quieted before a module here imports it

if TYPE_CHECKING:
    from collections.abc import Callable

    from megatron_embed.recipes.config import RecipeConfig
    from megatron_embed.recipes.encoder import Encoder
    from megatron_embed.recipes.llama import llama31_8b_embed_config, llama32_1b_embed_config
    from megatron_embed.recipes.ministral3 import (
        ministral3_3b_embed_config,
        ministral3_8b_embed_config,
        ministral3_14b_embed_config,
        ministral3_tiny_embed_config,
    )
    from megatron_embed.recipes.training import train

    RECIPES: dict[str, Callable[[], RecipeConfig]]

#: recipe function → the module of its family
_RECIPE_MODULES = {
    "ministral3_3b_embed_config": "ministral3",
    "ministral3_8b_embed_config": "ministral3",
    "ministral3_14b_embed_config": "ministral3",
    "ministral3_tiny_embed_config": "ministral3",
    "llama32_1b_embed_config": "llama",
    "llama31_8b_embed_config": "llama",
}
#: other exported name → its module
_MODULES = {
    "Encoder": "megatron_embed.recipes.encoder",
    "RecipeConfig": "megatron_embed.recipes.config",
}

__all__ = [
    "RECIPES",
    "Encoder",
    "RecipeConfig",
    "llama31_8b_embed_config",
    "llama32_1b_embed_config",
    "ministral3_3b_embed_config",
    "ministral3_8b_embed_config",
    "ministral3_14b_embed_config",
    "ministral3_tiny_embed_config",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "RECIPES":
        return {recipe: __getattr__(recipe) for recipe in _RECIPE_MODULES}
    if name == "train":  # the module is callable: see train.py
        return importlib.import_module(f"{__name__}.train")
    if name in _RECIPE_MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_RECIPE_MODULES[name]}"), name)
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
