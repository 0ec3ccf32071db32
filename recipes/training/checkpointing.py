"""Save a run and restore it: weights, optimizer and position in the data."""

from __future__ import annotations

import logging
from pathlib import Path

import torch.distributed as dist

from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.hf.sentence_files import SentenceSettings, beside_the_recipe, trained
from megatron_embed.conversion.mcore import folder as checkpoint_folder
from megatron_embed.conversion.mcore import statements
from megatron_embed.conversion.mcore.model_state import NEW_GROUPS, load_model_state, save_model_state
from megatron_embed.recipes.config.schema import OptimizerSection, RecipeConfig
from megatron_embed.recipes.encoding.source import ModelSource
from megatron_embed.recipes.training.optimizer import TrainState, reset_groups
from megatron_embed.recipes.training.resume import Start, beside_the_config, checkpoints_folder


def save(
    asked: RecipeConfig,
    source: ModelSource,
    state: TrainState,
    *,
    step: int,
    save_dir: Path,
    data: dict[str, list[int]],
) -> Path:
    """Write the checkpoint of a step from all ranks.

    The checkpoint is either complete or absent. The tracker names it once it is complete.

    Args:
        asked: the recipe as the user gave it; derived values are derived anew when the run continues.
        source: the model that the run started from. The checkpoint keeps those of its sentence settings that no recipe
            key sets.
        data: sizes of the data that the position refers to, see :meth:`PairDataset.state`.

    Returns:
        The iteration folder.
    """
    root = checkpoints_folder(save_dir)

    def finish(folder: Path) -> None:
        statements.write_sidecars(folder, source.files)
        sentence = beside_the_recipe(trained(source.settings or SentenceSettings(), normalize=source.config.normalize))
        run = asked.to_dict()
        # An export runs in another folder and must tell a path from a hub id.
        for section, key in (("model", "hf_model"), ("checkpoint", "pretrained_checkpoint"), ("checkpoint", "load")):
            path = Path(run[section][key] or "").expanduser()
            if run[section][key] and path.is_dir():
                run[section][key] = str(path.resolve())
        own = beside_the_config(sentence=sentence, encoder=source.config.to_dict())
        statements.write_run_config(folder, {**run, **own})

    common = {"consumed_samples": step * asked.train.global_batch_size, "data": data}
    iter_dir = save_model_state(root, step, state.encoders, optimizer=state.optimizer, common=common, finish=finish)
    if dist.get_rank() == 0:
        checkpoint_folder.write_tracker(root, step)
    return iter_dir


def restore(section: OptimizerSection, state: TrainState, start: Start) -> None:
    """Load the weights and the optimizer, and set the schedule to the run's position.

    Raises:
        UserError: the checkpoint is damaged or belongs to another model.
    """
    try:
        loaded = load_model_state(start.iter_dir, state.encoders, optimizer=state.optimizer)
    except UserError:
        raise
    except (KeyError, AssertionError) as error:
        raise UserError(
            f"{start.iter_dir}: holds no optimizer state that fits ({error}); start from its weights with "
            f"checkpoint.pretrained_checkpoint"
        ) from error
    if loaded[NEW_GROUPS] and dist.get_rank() == 0:
        logging.getLogger(__name__).warning(
            f"{start.iter_dir}: from before optimizer.temperature_lr: its temperature learned at the rate of "
            f"optimizer.lr, and goes on at up to {section.temperature_lr:g}"
        )
    reset_groups(state.optimizer, section)
    state.scheduler.step(increment=start.step)
