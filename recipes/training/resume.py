"""Decide where a run continues, and whether it is still the same run, before anything is built or loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.files.checksums import CHECKSUMS
from megatron_embed.conversion.mcore import folder as checkpoint_folder
from megatron_embed.conversion.mcore import statements
from megatron_embed.conversion.mcore.safe_loading import load_common
from megatron_embed.recipes.config.run_config import NO_RECIPES, Recipes, changed_keys, config_from_dict, recipe_named
from megatron_embed.recipes.config.schema import RecipeConfig
from megatron_embed.recipes.encoding.source import ModelSource

#: keys that must be unchanged in a run that continues
RESUME_KEYS = (
    "model.hf_model",
    "model.pooling",
    "model.normalize",
    "model.precision",
    "data.",
    "loss.",
    "optimizer.",
    "train.seed",
    "train.global_batch_size",
)
#: keys among them that do not affect the trained weights
_HARMLESS = (
    "data.eval",
    "data.packing",
    "loss.mode",
    "loss.kept_micro_batches",
    "optimizer.distributed",
    "optimizer.overlap_grad_reduce",
)

#: keys of a checkpoint's run_config.yaml beside the recipe: the folder of its relative paths, and settings for exports
_DIRECTORY, _OF_EXPORTS = "directory", ("encoder", "sentence")


def checkpoints_folder(save_dir: Path) -> Path:
    """Return ``save_dir/checkpoints``."""
    return save_dir / "checkpoints"


@dataclass(frozen=True)
class Start:
    """The point where a run continues.

    Attributes:
        iter_dir: the folder of the checkpoint.
        step: the number of steps that it contains, in batches of this run.
        own: True if it is this run's own checkpoint of that step; earlier metrics and checkpoints then belong to this
            run.
        before: the recipe that trained it; None with ``checkpoint.load``, where the recipe may differ.
        data: sizes of its training data, see :meth:`PairDataset.state`.
    """

    iter_dir: Path
    step: int
    own: bool
    before: RecipeConfig | None
    data: dict[str, list[int]]

    def check_data(self, now: dict[str, list[int]]) -> None:
        """Check that the data still has the sizes of the checkpoint.

        The order of the examples depends on their number, so with other sizes the position would mean other examples.

        Raises:
            UserError: the run is the same, and its data changed.
        """
        if self.before is None or len(self.data) != len(now):
            return
        changed = [
            f"{path} had {was[0]:,} examples in {was[1]:,} bytes, now {found[0]:,} in {found[1]:,}"
            for was, (path, found) in zip(self.data.values(), now.items(), strict=True)
            if was != found
        ]
        if changed:
            root = self.iter_dir.parent
            raise UserError(
                f"{self.iter_dir}: the training data has changed since this checkpoint ({'; '.join(changed)}), so the "
                f"run cannot continue at its position; restore the data, start in another train.save_dir with "
                f"checkpoint.pretrained_checkpoint={root}, "
                f"or continue in the new order with checkpoint.load={root} checkpoint.resume=false"
            )

    def check_model(self, source: ModelSource) -> None:
        """Check that the checkpoint is of the recipe's model, as far as it says what it is of.

        Raises:
            UserError: the message names the field of the architecture that differs.
        """
        own = statements.encoder_config(self.iter_dir)
        if own is not None:
            try:
                statements.refuse_another_model(source.config, own, source.path)
            except UserError as error:
                raise UserError(
                    f"{error}, in {self.iter_dir}, from which the run would go on; name the model from which it was "
                    f"trained, or another checkpoint"
                ) from None

    def nothing_to_do(self, train_iters: int) -> str | None:
        """Return one line if the run already has all its steps, or None if steps remain."""
        if self.step < train_iters:
            return None
        return (
            f"nothing to do: {self.iter_dir} has {self.step} steps, train.train_iters is {train_iters}; "
            f"a larger one goes on"
        )

    def news(self, cfg: RecipeConfig) -> str | None:
        """Return one line if the length of the run changed, or None if it did not."""
        if self.before is None or self.before.train.train_iters == cfg.train.train_iters:
            return None
        return (
            f"train.train_iters: {self.before.train.train_iters} before, {cfg.train.train_iters} now; from step "
            f"{self.step + 1} on the learning rate is that of a run of {cfg.train.train_iters} steps "
            f"(optimizer.warmup_iters {cfg.optimizer.warmup_iters})"
        )


def find_start(
    asked: RecipeConfig, save_dir: Path, *, instead: Path | None = None, recipes: Recipes = NO_RECIPES
) -> Start | None:
    """Return the checkpoint to continue from, or None if there is none.

    Args:
        asked: the recipe as the user gave it, without derived values.
        instead: the checkpoint of ``save_dir`` to continue from, because the newest is damaged.
        recipes: see :func:`trained_config`.

    Raises:
        DamagedCheckpoint: a file of the checkpoint differs from what was written.
        UserError: ``save_dir`` is itself a checkpoint folder, or holds a run with other data, loss, optimizer, seed or
            model; the checkpoint holds no training run; its number of samples is no multiple of this run's batch size.
    """
    refuse_a_checkpoint_folder(save_dir)
    root = checkpoints_folder(save_dir)
    # resolve() takes the only checkpoint without a tracker, and names several as damage; asked.checkpoint.load says
    # which one is meant.
    unnamed = asked.checkpoint.load is None and bool(checkpoint_folder.iterations(root))
    resumes = asked.checkpoint.resume and ((root / checkpoint_folder.TRACKER).is_file() or unnamed)
    if resumes:
        iter_dir = instead or checkpoint_folder.resolve(root)
    elif asked.checkpoint.load is not None:
        iter_dir = checkpoint_folder.resolve(asked.checkpoint.load)
    else:
        _refuse_to_replace_source(asked, root)
        return None
    common = load_common(iter_dir)
    samples, batch = common.get("consumed_samples"), asked.train.global_batch_size
    if samples is None:
        raise UserError(
            f"{iter_dir}: holds weights only, no training run to continue; start from its weights with "
            f"checkpoint.pretrained_checkpoint={iter_dir.parent}{' and another train.save_dir' if resumes else ''}"
        )
    before = None
    if resumes:
        before, directory = trained_config(iter_dir, recipes)
        _refuse_changes(before, directory, asked, save_dir)
    if samples % batch:
        raise UserError(
            f"{iter_dir}: {samples} samples were trained on, which is no multiple of train.global_batch_size {batch}; "
            f"continue with the batch size of its own run"
        )
    step = samples // batch
    own = os.path.realpath(iter_dir) == os.path.realpath(checkpoint_folder.iteration_folder(root, step))
    if not own:
        _refuse_to_replace_source(asked, root)
    return Start(iter_dir, step, own, before, common.get("data", {}))


def refuse_a_checkpoint_folder(save_dir: Path) -> None:
    """Refuse a ``train.save_dir`` that is itself a Megatron checkpoint, such as one that ``import`` made.

    Whoever reads a run by its folder's name, as ``export`` does, would get that checkpoint and not the trained one.

    Raises:
        UserError: the folder holds a tracker, an ``iter_…`` folder, or a checkpoint's own files.
    """
    marks = (checkpoint_folder.TRACKER, ".metadata", CHECKSUMS)
    found = [name for name in marks if (save_dir / name).is_file()] or sorted(
        path.name for path in save_dir.glob("iter_*")
    )
    if found:
        raise UserError(
            f"train.save_dir: {save_dir} is itself a Megatron checkpoint (found {found[0]} in it), wanted a new folder "
            f"or that of a run; choose another train.save_dir, and start from this checkpoint's weights with "
            f"checkpoint.pretrained_checkpoint={save_dir}"
        )


def may_fall_back(asked: RecipeConfig, older: Path) -> tuple[bool, bool]:
    """Return whether checkpoint.allow_fallback lets the run continue from ``older``.

    The first value is for a checkpoint of the run itself, the second for one of ``checkpoint.load``.
    """
    checkpoint, root = asked.checkpoint, os.path.realpath(older.parent)
    own = checkpoints_folder(Path(asked.resolved().train.save_dir or ""))
    load = Path(checkpoint.load or "").expanduser()
    loaded = [load, checkpoints_folder(load), load.parent] if checkpoint.load is not None else []
    allowed = checkpoint.allow_fallback
    return allowed and root == os.path.realpath(own), allowed and root in map(os.path.realpath, loaded)


def beside_the_config(*, sentence: dict[str, Any], encoder: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a checkpoint's ``run_config.yaml`` beside the recipe; :func:`trained_config` removes them."""
    return {_DIRECTORY: os.getcwd(), "sentence": sentence, "encoder": encoder}


def trained_config(iter_dir: Path, recipes: Recipes = NO_RECIPES) -> tuple[RecipeConfig, Path]:
    """Read the recipe of a training run's checkpoint.

    Args:
        recipes: the recipe that the checkpoint names supplies keys that an earlier version did not write.

    Returns:
        The recipe as the user gave it, and the folder that its relative paths start from.

    Raises:
        UserError: the file is missing or damaged, or has keys that this version does not know.
    """
    values = statements.read_run_config(iter_dir)
    path = iter_dir / checkpoint_folder.RUN_CONFIG
    if "train" not in values:
        raise UserError(
            f"{path}: is missing, damaged, or not that of a training run, so the checkpoint cannot be compared with "
            f"this run; to continue without the comparison, set checkpoint.load={iter_dir} checkpoint.resume=false"
        )
    directory = values.pop(_DIRECTORY, None)
    values = {key: value for key, value in values.items() if key not in _OF_EXPORTS}
    cfg = config_from_dict(values, base=recipe_named(values, recipes), where=str(path))
    if directory is None and cfg.optimizer.warmup_iters == cfg.train.train_iters // 10:
        # Earlier versions wrote the derived value as if the user had given it.
        cfg.optimizer.warmup_iters = None
    return cfg, Path(directory or os.getcwd())


def _refuse_to_replace_source(asked: RecipeConfig, root: Path) -> None:
    """Refuse to start a run anew in the folder of its own source.

    A new run moves the old content of its folder, but it reads its source there, again if it is killed and restarted.
    """
    for key in ("pretrained_checkpoint", "load"):
        path = getattr(asked.checkpoint, key)
        if path is not None and Path(os.path.realpath(checkpoint_folder.resolve(path))).is_relative_to(
            os.path.realpath(root)
        ):
            raise UserError(
                f"checkpoint.{key}: {path} is in the run's own train.save_dir, and a run that starts afresh there "
                f"would move it away; choose another train.save_dir"
            )


def _refuse_changes(before: RecipeConfig, directory: Path, asked: RecipeConfig, save_dir: Path) -> None:
    """Refuse a run in which a key changed: its given value differs, and so does the value in effect.

    Derived values that neither recipe gives may thus change with other keys, and a file may have another name.
    """
    given = {key for key, _, _ in changed_keys(before, asked, RESUME_KEYS)}
    meant = changed_keys(_meaning(before, directory), _meaning(asked, Path.cwd()), RESUME_KEYS)
    changed = [each for each in meant if each[0] in given and not each[0].startswith(_HARMLESS)]
    if changed:
        listed = "; ".join(f"{key}: {was!r} before, {now!r} now" for key, was, now in changed)
        raise UserError(
            f"{save_dir} holds a checkpoint of a different run ({listed}); "
            f"set these back, choose another train.save_dir, or start afresh with checkpoint.resume=false"
        )


def _meaning(cfg: RecipeConfig, directory: Path) -> RecipeConfig:
    """Return ``cfg`` with the values in effect: derived ones filled in, and paths resolved."""
    cfg = cfg.resolved()
    if cfg.model.hf_model is not None:
        cfg.model.hf_model = _real(cfg.model.hf_model, directory)
    for source in cfg.data.train or []:
        source.path = _real(source.path, directory)
    return cfg


def _real(path: str, directory: Path) -> str:
    """Return the real path of a file or folder; return any other name, such as a hub id, unchanged."""
    full = directory / Path(path).expanduser()
    return os.path.realpath(full) if full.exists() else path
