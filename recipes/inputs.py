"""What a recipe names, looked at before anything is read in full: data, evaluation folders, checkpoint, save_dir."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

from megatron_embed.bridge.errors import UserError, named
from megatron_embed.recipes.beir import check_folder, check_names, is_beir
from megatron_embed.recipes.config import RecipeConfig
from megatron_embed.recipes.datasets.rows import check_file, hub_parts


def check_inputs(cfg: RecipeConfig) -> None:
    """Refuse what training would fail on later. Of files the first kilobytes are read, of a model nothing.

    Raises:
        UserError: a source of data, an evaluation folder or a checkpoint that is not there or is no such thing, a
            ``save_dir`` that cannot be written to, Weights & Biases asked for and not installed; by its key.
    """
    for source in cfg.data.train or []:
        with named("data.train"):
            check_source(source.path)
    with named("data.eval"):
        check_names(cfg.data.eval or [])
        for folder in cfg.data.eval or []:
            check_folder(folder, "test")
    if cfg.checkpoint.load is not None:
        from megatron_embed.conversion import checkpoint_folder

        with named("checkpoint.load"):
            checkpoint_folder.resolve(cfg.checkpoint.load)
    with named("train.save_dir"):
        check_writable(Path(cfg.resolved().train.save_dir or ""))
    if cfg.logger.wandb_project is not None and not _is_installed("wandb"):
        raise UserError(
            f"logger.wandb_project: found {cfg.logger.wandb_project!r}, but wandb is not installed; "
            f"pip install wandb, or leave the key out"
        )


def start_of(cfg: RecipeConfig) -> tuple[str, str]:
    """Where a run's first weights lie: the key that says so, and what it says; empty where no key does."""
    if cfg.checkpoint.pretrained_checkpoint:
        return "checkpoint.pretrained_checkpoint", cfg.checkpoint.pretrained_checkpoint
    if cfg.checkpoint.load and not cfg.model.hf_model:
        return "checkpoint.load", cfg.checkpoint.load
    return "model.hf_model", cfg.model.hf_model or ""


def check_source(path: str) -> None:
    """Refuse a source of training pairs that is not there, or of a kind that is not read. Hub data is not looked up."""
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


def check_writable(folder: Path) -> None:
    """Refuse a folder that could not be made or written to; nothing is left there.

    Raises:
        UserError: saying of which folder the system said what.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; wanted a folder, which is made if it is not there")
    above = folder
    try:
        above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({above}: {error.strerror}); give another folder") from None


def _is_installed(package: str) -> bool:
    """A folder of that name, such as the one in which W&B keeps its runs, is no package."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None
