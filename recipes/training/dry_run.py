"""``--dry-run``: show the resolved config and the layout, and refuse a run that cannot work before it is built."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.errors import UserError, named
from megatron_embed.bridge.layout import Layout, pipeline_split
from megatron_embed.recipes.config.checks import layout_of, start_of, validate, validate_layout
from megatron_embed.recipes.config.run_config import NO_RECIPES, Recipes, to_yaml
from megatron_embed.recipes.config.schema import RecipeConfig
from megatron_embed.recipes.datasets.inputs import check_inputs
from megatron_embed.recipes.planning.model_sizes import NO_SIZES, Sizes, encoder_of


def describe_run(cfg: RecipeConfig, world_size: int, *, recipes: Recipes = NO_RECIPES, sizes: Sizes = NO_SIZES) -> str:
    """Return the resolved config as YAML, with the layout as comments. Build nothing and read no weight.

    The config may still lack a model or data.

    Args:
        recipes: see :func:`megatron_embed.recipes.training.resume.trained_config`.
        sizes: encoders of hub models whose sizes are known without fetching them.

    Raises:
        UserError: the layout is impossible; the data, model, checkpoint or evaluation folder is missing or of another
            kind; ``save_dir`` is not writable or holds another run. The message names the key.
    """
    validate(cfg, world_size, inputs=False)
    check_inputs(cfg)
    asked, cfg = cfg, cfg.resolved()
    encoder = _encoder(cfg, sizes)
    if encoder is not None:
        validate_layout(cfg, encoder)
    _check_resume(asked, Path(cfg.train.save_dir or ""), recipes)
    model, train = cfg.model, cfg.train
    parallel = layout_of(cfg)
    replicas = parallel.data_parallel_size(world_size)
    micro = f"{train.micro_batch_size} texts" if train.micro_batch_size else f"{train.micro_batch_tokens} tokens"
    layout = (
        f"tensor parallel {model.tensor_model_parallel_size} × pipeline parallel {model.pipeline_model_parallel_size}"
        f" × context parallel {model.context_parallel_size} × data parallel {replicas}"
    )
    lines = [
        f"# layout of {world_size} rank{'s' if world_size > 1 else ''}: {layout}",
        f"# layers per stage: {_stages(cfg, parallel, encoder)}",
        f"# queries per step: {train.global_batch_size}, {train.global_batch_size // replicas} a replica",
        f"# micro-batch: {micro}",
    ]
    return to_yaml(cfg) + "\n".join(lines)


def _stages(cfg: RecipeConfig, layout: Layout, encoder: EncoderConfig | None) -> str:
    """Return the number of layers of each stage as text."""
    if encoder is None:
        return f"known once model.hf_model is a folder (found {cfg.model.hf_model or 'none'})"
    split = pipeline_split(encoder.num_hidden_layers, layout.pp * (layout.vpp or 1))
    return f"{', '.join(map(str, split))} of {encoder.num_hidden_layers}"


def _encoder(cfg: RecipeConfig, sizes: Sizes) -> EncoderConfig | None:
    """Return the encoder that training would start from, after checking its weights' names and shapes.

    Return None where no key names a model, or where the model is on the hub and its sizes are unknown until it is
    fetched.
    """
    if not (cfg.model.hf_model or cfg.checkpoint.pretrained_checkpoint or cfg.checkpoint.load):
        return None
    key, path = start_of(cfg)
    if key == "model.hf_model" and not Path(path).expanduser().exists():
        if path in sizes:
            return encoder_of(cfg, sizes)
        if _may_be_fetched(path):
            return None
    from megatron_embed.recipes.encoding.source import open_model

    source = open_model(cfg)
    with named(key):
        source.check()
    return source.config


def _may_be_fetched(name: str) -> bool:
    """Return whether the hub has a model; False means that training looks in a folder or in the hub's cache.

    Raises:
        UserError: the hub does not have the model, or does not answer.
    """
    from megatron_embed.conversion.hf.hub import is_hub_id, not_on_the_hub

    if not is_hub_id(name) or os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, timeout=10)
    except Exception as error:  # offline, no such repository, no access, …
        raise UserError(f"model.hf_model: {not_on_the_hub(name, error)}") from None
    return True


def _check_resume(asked: RecipeConfig, save_dir: Path, recipes: Recipes) -> None:
    """Refuse a ``save_dir`` that holds another run, as training does."""
    from megatron_embed.recipes.training.resume import find_start, refuse_a_checkpoint_folder

    refuse_a_checkpoint_folder(save_dir)
    if asked.checkpoint.resume and (save_dir / "checkpoints").is_dir():
        find_start(asked, save_dir, recipes=recipes)
