"""Sizes of the models that the recipes name, so that their layouts can be planned before anything is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.errors import UsageError, UserError
from megatron_embed.recipes.config.checks import start_of
from megatron_embed.recipes.config.schema import RecipeConfig

#: Hub id → encoder. Commands pass :data:`megatron_embed.recipes.SIZES`. The sizes serve planning only: training always
#: reads them from the model's own config.json.
Sizes = Mapping[str, EncoderConfig]
NO_SIZES: Sizes = MappingProxyType({})


def encoder_of(cfg: RecipeConfig, sizes: Sizes) -> EncoderConfig:
    """Return the encoder that a recipe trains, from its folder, checkpoint or hub id. Read no weight; use no network.

    Raises:
        UserError: the recipe names no model, its folder holds none, or ``sizes`` lacks its hub id.
    """
    stated = {"pooling": cfg.model.pooling, "normalize": cfg.model.normalize, "temperature": cfg.loss.temperature}
    key, name = start_of(cfg)
    if key != "model.hf_model":
        from megatron_embed.conversion.mcore import folder as checkpoint_folder
        from megatron_embed.conversion.mcore import statements

        iter_dir = checkpoint_folder.resolve(name)
        config = statements.encoder_config(iter_dir)
        if config is None:
            raise UserError(f"{iter_dir}: does not state its model; wanted a run_config.yaml with 'encoder:'")
        return config.replace(**stated)
    if not name:
        raise UsageError("model.hf_model: missing; wanted a Hugging Face model folder or id, model.hf_model=DIR_OR_ID")
    folder = Path(name).expanduser()
    if folder.exists():
        return EncoderConfig.from_hf(folder).replace(**stated)
    if name not in sizes:
        raise UserError(
            f"model.hf_model: {name!r} is no folder, and its sizes are not known; wanted a folder with config.json, "
            f"or one of {', '.join(sizes)}"
        )
    return sizes[name].replace(**stated)
