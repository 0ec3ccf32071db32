"""Saving a run and going on from it: weights, optimizer, position in the data."""

from __future__ import annotations

import logging
from pathlib import Path

import torch.distributed as dist

from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion import checkpoint_folder
from megatron_embed.conversion.model_state import NEW_GROUPS, load_model_state, save_model_state
from megatron_embed.conversion.sentence_files import SentenceSettings, beside_the_recipe, trained
from megatron_embed.recipes.config import RecipeConfig, differences, load_run_config
from megatron_embed.recipes.optimizer import TrainState, reset_groups
from megatron_embed.recipes.source import ModelSource

#: what a run that goes on must not have changed
RESUME_KEYS = ("model.hf_model", "data.", "loss.", "optimizer.", "train.seed", "train.global_batch_size")
#: of these, the ones that change nothing that was trained
_HARMLESS = ("data.eval", "data.packing", "loss.mode", "optimizer.distributed", "optimizer.overlap_grad_reduce")


def checkpoints_folder(save_dir: Path) -> Path:
    """``save_dir/checkpoints``."""
    return save_dir / "checkpoints"


def find_resume(cfg: RecipeConfig, save_dir: Path) -> Path | None:
    """The iteration folder to go on from, if there is one and the run is the same.

    Raises:
        UserError: ``save_dir`` holds a run with other data, loss, optimizer, seed or source.
    """
    if cfg.checkpoint.load is not None and not (cfg.checkpoint.resume and _has_any(save_dir)):
        return checkpoint_folder.resolve(cfg.checkpoint.load)
    if not cfg.checkpoint.resume or not _has_any(save_dir):
        return None
    before = load_run_config(save_dir / "run_config.yaml").resolved()
    changed = [d for d in differences(before, cfg, RESUME_KEYS) if not d[0].startswith(_HARMLESS)]
    if changed:
        listed = "; ".join(f"{key}: {was!r} before, {now!r} now" for key, was, now in changed)
        raise UserError(
            f"{save_dir} holds a checkpoint of a different run ({listed}); "
            f"set these back, choose another train.save_dir, or start afresh with checkpoint.resume=false"
        )
    return checkpoint_folder.resolve(checkpoints_folder(save_dir))


def latest(save_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, if there is one."""
    return checkpoint_folder.resolve(checkpoints_folder(save_dir)) if _has_any(save_dir) else None


def _has_any(save_dir: Path) -> bool:
    return (checkpoints_folder(save_dir) / checkpoint_folder.TRACKER).is_file()


def save(
    cfg: RecipeConfig,
    source: ModelSource,
    state: TrainState,
    *,
    step: int,
    save_dir: Path,
    data: dict[str, list[int]],
    first: bool,
) -> None:
    """Write the checkpoint of a step from all ranks; complete or absent, and named by the tracker when complete.

    Args:
        source: what the run started from. Those of its sentence settings that no recipe key states are kept.
        data: what the position in the data is a position in, see :meth:`PairDataset.state`.
    """
    root = checkpoints_folder(save_dir)

    def finish(folder: Path) -> None:
        checkpoint_folder.write_sidecars(folder, source.files)
        sentence = beside_the_recipe(trained(source.settings or SentenceSettings(), normalize=source.config.normalize))
        own = {"sentence": sentence, "encoder": source.config.to_dict()}
        run = cfg.to_dict()
        # an export starts in another folder, and must tell a path from a hub id
        for section, key in (("model", "hf_model"), ("checkpoint", "pretrained_checkpoint"), ("checkpoint", "load")):
            path = Path(run[section][key] or "").expanduser()
            if run[section][key] and path.is_dir():
                run[section][key] = str(path.resolve())
        checkpoint_folder.write_run_config(folder, {**run, **own})

    common = {"consumed_samples": step * cfg.train.global_batch_size, "data": data}
    save_model_state(root, step, state.encoders, optimizer=state.optimizer, common=common, finish=finish)
    if first:
        checkpoint_folder.write_tracker(root, step)


def _check_data(before: dict[str, list[int]], now: dict[str, list[int]], iter_dir: Path) -> None:
    """The order of the examples follows from their number, so that a position among others would mean others."""
    changed = [
        f"{path} had {before[path][0]:,} examples in {before[path][1]:,} bytes, now {examples:,} in {size:,}"
        for path, (examples, size) in now.items()
        if path in before and before[path] != [examples, size]
    ]
    if changed:
        raise UserError(
            f"{iter_dir}: the training data changed since ({'; '.join(changed)}), so that the run cannot go on where "
            f"it stood; put it back, take another train.save_dir with "
            f"checkpoint.pretrained_checkpoint={iter_dir.parent}, "
            f"or go on in the new order with checkpoint.load={iter_dir.parent} checkpoint.resume=false"
        )


def restore(cfg: RecipeConfig, state: TrainState, iter_dir: Path, data: dict[str, list[int]]) -> int:
    """Load weights and optimizer; set the schedule to the position. Returns the steps done.

    Raises:
        UserError: no checkpoint of a run, one of another batch size, or one of this run whose data changed meanwhile.
    """
    try:
        loaded = load_model_state(iter_dir, state.encoders, optimizer=state.optimizer)
    except UserError:
        raise
    except (KeyError, AssertionError) as error:
        raise UserError(f"{iter_dir}: holds no optimizer state that fits ({error})") from error
    samples = loaded.get("consumed_samples")
    if samples is None:
        raise UserError(
            f"{iter_dir}: holds weights only, no training run to continue; "
            f"start from its weights with checkpoint.pretrained_checkpoint"
        )
    if cfg.checkpoint.resume and iter_dir.parent == checkpoints_folder(Path(cfg.train.save_dir or "")):
        _check_data(loaded.get("data", data), data, iter_dir)
    batch = cfg.train.global_batch_size
    if samples % batch:
        raise UserError(
            f"{iter_dir}: {samples} samples were trained on, which is no multiple of train.global_batch_size {batch}; "
            f"continue with the batch size that it was trained with"
        )
    step = samples // batch
    if loaded[NEW_GROUPS] and dist.get_rank() == 0:
        logging.getLogger(__name__).warning(
            f"{iter_dir}: from before optimizer.temperature_lr: its temperature learned at the rate of optimizer.lr, "
            f"and goes on at up to {cfg.optimizer.temperature_lr:g}"
        )
    reset_groups(state.optimizer, cfg.optimizer)
    state.scheduler.step(increment=step)
    return step
