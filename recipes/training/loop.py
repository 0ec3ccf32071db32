"""Training: everything is checked, then the model is loaded, then the run goes on from where it stood."""

from __future__ import annotations

import gc
import logging
import shlex
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_embed.bridge import liveness, parallel
from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.cpu import host
from megatron_embed.bridge.encoder import build_stages, transformer_config
from megatron_embed.bridge.errors import UserError
from megatron_embed.bridge.layer_spec import transformer_engine_is_usable
from megatron_embed.bridge.layout import Layout
from megatron_embed.bridge.ranks import on_first_rank
from megatron_embed.conversion.files.checksums import DamagedCheckpoint
from megatron_embed.conversion.files.disk_errors import writing_to
from megatron_embed.conversion.mcore import folder as checkpoint_folder
from megatron_embed.recipes.config.checks import check_candidates, layout_of, validate, validate_layout
from megatron_embed.recipes.config.run_config import NO_RECIPES, Recipes
from megatron_embed.recipes.config.schema import RecipeConfig
from megatron_embed.recipes.datasets.beir import load_collections
from megatron_embed.recipes.datasets.inputs import check_inputs
from megatron_embed.recipes.datasets.odd_rows import report
from megatron_embed.recipes.datasets.pairs import PairDataset
from megatron_embed.recipes.datasets.sampler import GlobalBatchSampler
from megatron_embed.recipes.encoding.micro_batches import BatchingPlan
from megatron_embed.recipes.encoding.source import ModelSource, open_model
from megatron_embed.recipes.planning.activations import Activations
from megatron_embed.recipes.planning.state import chunks_of
from megatron_embed.recipes.retrieval.writer_lock import LOCK, refuse_if_written, writing
from megatron_embed.recipes.training import checkpointing
from megatron_embed.recipes.training.device_memory import too_large
from megatron_embed.recipes.training.kept_count import KeptCount
from megatron_embed.recipes.training.loss import ContrastiveLoss
from megatron_embed.recipes.training.optimizer import set_up_training
from megatron_embed.recipes.training.rank_batch import BatchBuilder, check_teachers
from megatron_embed.recipes.training.resume import Start, checkpoints_folder, find_start, may_fall_back
from megatron_embed.recipes.training.run import TrainingRun
from megatron_embed.recipes.training.run_folder import RunFolder

_LOG = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def train(cfg: RecipeConfig, *, recipes: Recipes = NO_RECIPES) -> Path:
    """Fine-tune a model as the recipe says, on all processes of the world.

    Args:
        recipes: see :func:`megatron_embed.recipes.training.resume.trained_config`.

    Returns:
        The folder of the run (``train.save_dir``).

    Raises:
        UserError: the input is bad; existing files stay intact.
    """
    try:
        return _train(cfg, recipes)
    except DamagedCheckpoint as error:
        damage, older = error.damage, error.older
        own, of_another = may_fall_back(cfg, older) if older is not None else (False, False)
        if not own and not of_another:
            raise
    finally:
        gc.collect()  # a model is a reference cycle that holds process groups; collecting it ends their threads
    if parallel.rank() == 0:
        _LOG.warning(f"{damage}; going on from {older} instead (checkpoint.allow_fallback)")
    cfg = cfg.model_copy(deep=True)
    if own:
        return _train(cfg, recipes, instead=older)
    cfg.checkpoint.load = str(older)
    return _train(cfg, recipes)


def _train(cfg: RecipeConfig, recipes: Recipes, *, instead: Path | None = None) -> Path:
    began = time.perf_counter()
    asked, cfg = cfg.model_copy(deep=True), cfg.resolved()
    asked.train.save_dir = cfg.train.save_dir
    world = parallel.world_size()
    validate(cfg, world)
    check_inputs(cfg)
    parallel.select_device(cfg.device)
    # All checks run before any weight is read.
    source = open_model(cfg)
    # The checkpoint that the run starts from may set this.
    asked.model.bidirectional = cfg.model.bidirectional = source.made_bidirectional
    validate_layout(cfg, source.config)
    if parallel.rank() == 0 and (warning := too_large(cfg, source.config, world)):
        _LOG.warning(warning)
    save_dir = Path(cfg.train.save_dir or "")
    saved = checkpoint_folder.iterations(checkpoints_folder(save_dir))
    start = find_start(asked, save_dir, instead=instead, recipes=recipes)
    if start is not None:
        start.check_model(source)
    if start is not None and (done := start.nothing_to_do(cfg.train.train_iters)):
        if parallel.rank() == 0:
            _LOG.info(done)
        return save_dir
    dataset = PairDataset(cfg.data.sources())
    if start is not None:
        start.check_data(dataset.state())
    check_teachers(dataset, cfg.loss, source.config.hidden_size)
    layout = layout_of(cfg)
    replicas = layout.data_parallel_size(world)
    for each in dataset.sources:  # every batch comes from a single source
        negatives = min(each.max_negatives, cfg.data.negatives_per_query)
        why = f"{each.path}, which has no hard negatives,"
        check_candidates(cfg.loss, cfg.train.global_batch_size, replicas, negatives, why)
    sampler = GlobalBatchSampler(dataset, cfg.train.global_batch_size, cfg.train.seed)
    collections = list(load_collections(cfg.data.eval or []))
    lock = save_dir / LOCK
    with parallel.parallel_world(layout, timeout_minutes=cfg.train.timeout_minutes):
        refuse_if_written(save_dir, lock)  # before minutes go into loading; the lock itself would create the folder
        liveness.keep_stacks_in(save_dir / "stacks")
        if dist.get_rank() == 0:
            report([each.odd for each in dataset.sources] + [odd for each in collections for odd in each.odd])
        liveness.stand_at("loading the model")
        run = _set_up(cfg, layout, source, dataset, sampler, RunFolder(asked, save_dir, start), collections)
        if start is not None:
            checkpointing.restore(cfg.optimizer, run.state, start)
        with writing_to(save_dir), writing(save_dir, lock):
            on_first_rank(lambda: _check_unchanged(save_dir, saved, start))
            on_first_rank(run.folder.check)
            run.loop(start)
        if dist.get_rank() == 0:
            if run.skipped:
                _LOG.warning(
                    f"{run.skipped} of {cfg.train.train_iters - (start.step if start else 0)} updates were skipped: "
                    f"gradients overflowed fp16 until the loss scale fitted; model.precision=bf16 skips none"
                )
            _LOG.info(_closing(save_dir, cfg.train.train_iters, time.perf_counter() - began))
    return save_dir


def _check_unchanged(save_dir: Path, saved: list[int], start: Start | None) -> None:
    """Check, with the folder locked, that no other run has saved there since ``saved`` was listed."""
    root = checkpoints_folder(save_dir)
    if others := [number for number in checkpoint_folder.iterations(root) if number not in saved]:
        found = checkpoint_folder.iteration_folder(root, others[-1])
        raise UserError(
            f"{save_dir}: another run has saved {found} while this one was loading "
            f"{start.iter_dir if start is not None else 'its model'}; "
            f"start this one again, or name another train.save_dir"
        )


def _closing(save_dir: Path, steps: int, seconds: float) -> str:
    """Return the closing message: the place of the finished run, and likely next commands."""
    export = ["convert-checkpoints", "export", "--megatron-path", str(save_dir), "--hf-path", f"{save_dir}-embedder"]
    return (
        f"done: step {steps} after {timedelta(seconds=round(seconds))}; the run lies in {save_dir}; "
        f"export it with: {shlex.join(export)}"
    )


def _set_up(
    cfg: RecipeConfig,
    layout: Layout,
    source: ModelSource,
    dataset: PairDataset,
    sampler: GlobalBatchSampler,
    folder: RunFolder,
    collections: list[Any],
) -> TrainingRun:
    data = cfg.data
    tokenizer = source.tokenizer(data)
    transformer = transformer_config(
        source.config,
        layout,
        dtype=DTYPES[cfg.model.precision],
        sequence_parallel=cfg.model.sequence_parallel,
        recompute=cfg.model.recompute,
        # Transformer Engine's products add weight gradients to DDP's buffer; megatron-core's own need Apex for that.
        gradient_accumulation_fusion=transformer_engine_is_usable(),
    )
    encoders = build_stages(source.config, transformer, learn_temperature=cfg.loss.learn_temperature)
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    notes = source.fill(encoders, tp_rank=tp_rank, tp_size=layout.tp, ask=_ask_for)
    if dist.get_rank() == 0:
        for note in notes:
            _LOG.warning(f"{source.path}: {note}")
    state = set_up_training(encoders, cfg.optimizer, train_iters=cfg.train.train_iters)
    builder = BatchBuilder(
        dataset,
        sampler,
        tokenizer,
        data.negatives_per_query,
        cfg.loss,
        rank=parallel_state.get_data_parallel_rank(),
        world=parallel_state.get_data_parallel_world_size(),
    )
    plan = BatchingPlan(
        pad_id=tokenizer.pad_token_id,
        packed=data.packing,
        max_tokens=cfg.train.micro_batch_tokens,
        max_texts=cfg.train.micro_batch_size,
        multiple_of=layout.tp * layout.cp,
        count_multiple_of=layout.pp if layout.vpp else 1,
    )
    group = parallel_state.get_data_parallel_group()
    loss = ContrastiveLoss(cfg.loss, normalize=source.config.normalize, group=group)
    kept = _kept_count(cfg, layout, source.config)
    return TrainingRun(cfg, layout, source, state, builder, plan, loss, kept, folder, collections)


def _kept_count(cfg: RecipeConfig, layout: Layout, config: EncoderConfig) -> KeptCount:
    device = "cpu" if host.cuda_is_hidden() else "cuda"
    activations = Activations(config, layout, cfg.model.precision, bool(cfg.model.sequence_parallel), device)
    chunks = chunks_of(config, layout, parallel_state.get_pipeline_model_parallel_rank())
    return KeptCount(cfg.loss.kept_micro_batches, activations, chunks, cfg.model.recompute)


def _ask_for(dtype: torch.dtype) -> str:
    """Return the override that makes a recipe use a dtype."""
    return f"model.precision={next((name for name, known in DTYPES.items() if known == dtype), 'fp32')}"
