"""Check a recipe's data, evaluation folders, checkpoint and save_dir before anything is read in full."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from megatron_embed.bridge.errors import UserError, named
from megatron_embed.conversion.files.disk_errors import check_writable
from megatron_embed.recipes.config.schema import RecipeConfig
from megatron_embed.recipes.datasets.beir import check_folder, check_names
from megatron_embed.recipes.datasets.corpus import is_beir
from megatron_embed.recipes.datasets.rows import check_file, hub_parts


def check_inputs(cfg: RecipeConfig) -> None:
    """Refuse inputs that training would fail on later. Read the first kilobytes of files and nothing of a model.

    Raises:
        UserError: a data source, an evaluation folder or a checkpoint is missing or of another kind, ``save_dir`` is
            not writable, or Weights & Biases is used and not installed; the message names the key.
    """
    for source in cfg.data.train or []:
        with named("data.train"):
            check_source(source.path)
    with named("data.eval"):
        check_names(cfg.data.eval or [])
        for folder in cfg.data.eval or []:
            check_folder(folder, "test")
    if cfg.checkpoint.load is not None:
        from megatron_embed.conversion.mcore import folder as checkpoint_folder

        with named("checkpoint.load"):
            checkpoint_folder.resolve(cfg.checkpoint.load)
    with named("train.save_dir"):
        check_writable(Path(cfg.resolved().train.save_dir or ""))
    if cfg.logger.wandb_project is not None and not _is_installed("wandb"):
        raise UserError(
            f"logger.wandb_project: found {cfg.logger.wandb_project!r}, but wandb is not installed; "
            f"pip install wandb, or leave the key out"
        )


def check_source(path: str) -> None:
    """Refuse a source of training pairs that is missing or of an unsupported kind. Do not look up hub data."""
    if path.startswith("hf://"):
        hub_parts(path)
    elif Path(path).is_dir():
        if not is_beir(path):
            raise UserError(
                f"{path}: a folder, but no BEIR folder; wanted corpus.jsonl, queries.jsonl, qrels/train.tsv"
            )
        check_folder(path, "train")
    else:
        check_file(path)


def _is_installed(package: str) -> bool:
    """Return whether a package is installed; a folder of that name, such as that of W&B's runs, does not count."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None
