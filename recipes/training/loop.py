"""The training loop: sample, encode, score, differentiate and update; log, evaluate and save."""

from __future__ import annotations

import gc
import logging
import math
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
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
from megatron_embed.bridge.layout import Layout
from megatron_embed.conversion.files.checksums import DamagedCheckpoint
from megatron_embed.conversion.files.disk_errors import writing_to
from megatron_embed.recipes.config.checks import (
    check_candidates,
    layout_of,
    loss_mode,
    validate,
    validate_layout,
    without_negatives,
)
from megatron_embed.recipes.config.run_config import NO_RECIPES, Recipes
from megatron_embed.recipes.config.schema import RecipeConfig
from megatron_embed.recipes.datasets.inputs import check_inputs
from megatron_embed.recipes.datasets.odd_rows import report
from megatron_embed.recipes.datasets.pairs import PairDataset
from megatron_embed.recipes.datasets.sampler import GlobalBatchSampler
from megatron_embed.recipes.datasets.tokenization import TextTokenizer
from megatron_embed.recipes.encoding.encoder import encode_sequences
from megatron_embed.recipes.encoding.micro_batches import BatchingPlan
from megatron_embed.recipes.encoding.rank_zero import on_first_rank
from megatron_embed.recipes.encoding.source import ModelSource, open_model
from megatron_embed.recipes.retrieval.writer_lock import LOCK, refuse_if_written, writing
from megatron_embed.recipes.training import checkpointing
from megatron_embed.recipes.training.loss import ContrastiveLoss
from megatron_embed.recipes.training.metrics import Reporter, model_flops, peak_memory_bytes
from megatron_embed.recipes.training.optimizer import TrainState, set_up_training
from megatron_embed.recipes.training.rank_batch import (
    BatchBuilder,
    PackedBatch,
    RankBatch,
    check_teachers,
    micro_batches,
    pack,
)
from megatron_embed.recipes.training.read_ahead import ReadAhead
from megatron_embed.recipes.training.resume import Start, find_start, may_fall_back
from megatron_embed.recipes.training.run_folder import RunFolder
from megatron_embed.recipes.training.step import contrastive_step, learned_temperature

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
    save_dir = Path(cfg.train.save_dir or "")
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
    collections = _open_collections(cfg.data.eval)
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
            on_first_rank(lambda: _check_unchanged(start, asked, save_dir, instead, recipes))
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


def _check_unchanged(
    start: Start | None, asked: RecipeConfig, save_dir: Path, instead: Path | None, recipes: Recipes
) -> None:
    """Check, with the folder locked, that no other run has saved there since ``start`` was found."""
    now = find_start(asked, save_dir, instead=instead, recipes=recipes)
    was, found = (each and each.iter_dir for each in (start, now))
    if was != found:
        raise UserError(
            f"{save_dir}: another run has saved {found} while this one was loading {was or 'its model'}; "
            f"start this one again, or name another train.save_dir"
        )


def _closing(save_dir: Path, steps: int, seconds: float) -> str:
    """Return the closing message: the place of the finished run, and likely next commands."""
    export = ["convert-checkpoints", "export", "--megatron-path", str(save_dir), "--hf-path", f"{save_dir}-embedder"]
    return (
        f"done: step {steps} after {timedelta(seconds=round(seconds))}; the run lies in {save_dir}; "
        f"export it with: {shlex.join(export)}"
    )


def _open_collections(folders: list[str] | None) -> list[Any]:
    if not folders:
        return []
    from megatron_embed.recipes.datasets.beir import load_collections

    return list(load_collections(folders))


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
    tokenizer = TextTokenizer.from_folder(
        source.files,
        query_prompt=data.query_prompt,
        passage_prompt=data.passage_prompt,
        query_max_length=data.query_max_length,
        passage_max_length=data.passage_max_length,
        do_lower_case=source.settings is not None and source.settings.do_lower_case,
    )
    transformer = transformer_config(
        source.config,
        layout,
        dtype=DTYPES[cfg.model.precision],
        sequence_parallel=cfg.model.sequence_parallel,
        recompute=cfg.model.recompute,
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
    return TrainingRun(cfg, layout, source, state, builder, plan, loss, folder, collections)


def _ask_for(dtype: torch.dtype) -> str:
    """Return the override that makes a recipe use a dtype."""
    return f"model.precision={next((name for name, known in DTYPES.items() if known == dtype), 'fp32')}"


@dataclass
class TrainingRun:
    """A training run with all its parts built."""

    cfg: RecipeConfig
    layout: Layout
    source: ModelSource
    state: TrainState
    builder: BatchBuilder
    plan: BatchingPlan
    loss: ContrastiveLoss
    folder: RunFolder
    collections: list[Any]
    kept: Path | None = None
    """The newest checkpoint of this run."""
    warned: bool = False
    """Whether the run has warned of queries without a negative."""
    skipped: int = 0
    """The updates that fp16 skipped in this process."""

    @property
    def encoder_config(self) -> EncoderConfig:
        """The config of the model in training."""
        return self.source.config

    def loop(self, start: Start | None) -> None:
        """Run the steps after ``start`` up to ``train_iters``."""
        train = self.cfg.train
        done = 0
        if start is not None:
            done, self.kept = start.step, start.iter_dir
        reporter = Reporter(self.cfg, self.folder, active=dist.get_rank() == 0, start=done)
        told: set[str] = set()
        reporter.say(self._what(done))
        steps = range(done + 1, train.train_iters + 1)
        try:
            if start is not None and (news := start.news(self.cfg)):
                reporter.say(news)
            with ReadAhead(self._prepare, steps) as ahead:
                for step in steps:
                    began = time.perf_counter()
                    liveness.stand_at(f"step {step}, reading the batch")
                    packed = ahead.take()
                    data_seconds = time.perf_counter() - began
                    mode = self._mode(packed)
                    if mode not in told:
                        reporter.say(f"step {step}: loss.mode {mode}{self._why(mode)}")
                        told.add(mode)
                    learning_rate = self.state.optimizer.param_groups[0]["lr"]
                    learned = {}
                    if self.cfg.loss.learn_temperature:  # log the value that divides this step's scores
                        learned["temperature"] = learned_temperature(self.state.stages)
                    liveness.stand_at(f"step {step}, forward and backward", limited=True)
                    loss, grad_norm, padding = self._step(packed, mode, step)
                    record = self._record(step, packed.batch, padding, time.perf_counter() - began)
                    record.update(loss=loss, grad_norm=grad_norm, learning_rate=learning_rate, **learned)
                    record["data_seconds"] = data_seconds
                    self._close_step(step, record, reporter, ahead)
        finally:
            reporter.close()

    def _close_step(self, step: int, record: dict[str, Any], reporter: Reporter, ahead: ReadAhead[PackedBatch]) -> None:
        """Evaluate, log and save if this step is due for it."""
        train = self.cfg.train
        last = step == train.train_iters
        if self.collections and (last or step % train.eval_interval == 0):
            liveness.stand_at(f"step {step}, evaluation")
            with ahead.paused():
                record["eval"] = self._evaluate()
        saved = last or step % train.save_interval == 0
        # A saved step is logged too, so that a continued run averages its losses from the same step on.
        reporter.step(record, logged=saved or step == 1 or step % train.log_interval == 0 or "eval" in record)
        if saved:
            liveness.stand_at(f"step {step}, saving the checkpoint")
            with ahead.paused():
                reporter.say(f"step {step}: saved to {self._save(step)}")

    def _prepare(self, step: int) -> PackedBatch:
        """Read, tokenize and pack this rank's part of a step."""
        mode = loss_mode(self.cfg.loss.mode, self.layout.pp)
        return pack(self.plan, self.builder.build(step - 1), mode=mode)

    def _what(self, done: int) -> str:
        """Return one line that describes the training that begins."""
        cfg, sampler, world = self.cfg, self.builder.sampler, dist.get_world_size()
        layout = f"{self.layout} × DP {self.layout.data_parallel_size(world)}"
        return (
            f"{cfg.recipe} on {world} rank{'s' if world > 1 else ''} ({layout}), steps {done + 1:,} to "
            f"{cfg.train.train_iters:,} of {cfg.train.global_batch_size:,} queries, into {self.folder.path}; "
            f"data: {len(self.builder.dataset):,} examples, {sampler.steps_per_epoch:,} steps an epoch"
        )

    def _mode(self, packed: PackedBatch) -> str:
        """Return the mode of this step's gradient, the same on every rank."""
        if loss_mode(self.cfg.loss.mode, self.layout.pp) != "auto":
            return packed.mode
        fits = torch.tensor(int(packed.mode == "direct"), device=host.device())
        dist.all_reduce(fits, op=dist.ReduceOp.MIN, group=parallel_state.get_data_parallel_group())
        return "direct" if fits.item() else "cached"

    def _why(self, mode: str) -> str:
        if self.cfg.loss.mode != "auto":
            return ""
        if mode == "direct":
            return " (each rank's batch fits into one micro-batch: 3 instead of 4 forward costs)"
        if self.layout.pp > 1:
            return " (pipeline stages need several micro-batches)"
        return " (a rank's batch is more than one micro-batch)"

    def _step(self, packed: PackedBatch, mode: str, step: int) -> tuple[float, float | None, float]:
        """Compute the gradient and update; return (loss, gradient norm before clipping, share of padding on this rank).

        The norm is None if fp16 overflowed and the update was skipped.
        """
        state, batch, groups = self.state, packed.batch, packed.groups
        if mode != packed.mode:  # another rank's batch does not fit into one micro-batch
            groups = micro_batches(self.plan, batch, mode=mode)
        for stage in state.stages:
            stage.zero_grad_buffer()
        state.optimizer.zero_grad()
        loss, alone = contrastive_step(state.stages, groups, batch.targets, self.loss, mode=mode)  # type: ignore[arg-type]
        if not math.isfinite(loss):
            raise UserError(self._not_finite(step, "loss", loss))
        if alone and not self.warned and not self.cfg.loss.embedding_distillation_weight:
            self.warned = True
            if dist.get_rank() == 0:
                _LOG.warning(f"step {step}: {without_negatives(self.cfg, alone)} (told once)")
        updated, grad_norm, _ = state.optimizer.step()
        # With fp16, an update is skipped while the loss scale adjusts; a skipped update has no norm.
        self.skipped += not updated
        if updated and not math.isfinite(grad_norm):
            raise UserError(self._not_finite(step, "gradient norm", grad_norm))
        state.scheduler.step(increment=1)
        total = sum(group.tokens.total_tokens for group in groups)
        return loss, grad_norm, 1 - batch.real_tokens / total

    def _not_finite(self, step: int, what: str, value: float) -> str:
        return (
            f"step {step}: {what} is {value}. Batch: {self.builder.lines(step - 1)}. "
            f"{f'The checkpoint {self.kept} is kept' if self.kept else 'No checkpoint was written yet'}; "
            f"lower optimizer.lr, or look at these lines"
        )

    def _record(self, step: int, batch: RankBatch, padding: float, seconds: float) -> dict[str, Any]:
        """Return this step's record over all ranks."""
        sums = torch.tensor(
            [batch.real_tokens, batch.squared_lengths, batch.real_tokens / (1 - padding)],
            dtype=torch.float64,
            device=host.device(),
        )
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        tokens, squared, computed = sums.tolist()
        flops = model_flops(self.encoder_config, tokens=int(tokens), squared_lengths=int(squared))
        return {
            "step": step,
            "loss": 0.0,
            "grad_norm": 0.0,
            "learning_rate": 0.0,
            "consumed_samples": step * self.cfg.train.global_batch_size,
            "tokens": int(tokens),
            "padding_fraction": 1 - tokens / computed,
            "tokens_per_second": tokens / seconds,
            "model_flops_per_second": flops / seconds,
            "step_seconds": seconds,
            "peak_memory_bytes": peak_memory_bytes(),
        }

    def _evaluate(self) -> dict[str, dict[str, float]]:
        from megatron_embed.recipes.retrieval.evaluation import evaluate

        return evaluate(self._encode_texts(), self.collections, bm25=False)

    def _encode_texts(self) -> Callable[..., Any]:
        tokenizer, hidden = self.builder.tokenizer, self.encoder_config.hidden_size

        def encode(texts: list[str], kind: Any) -> Any:
            return encode_sequences(self.state.encoders, self.plan, tokenizer.tokenize(texts, kind), hidden)

        return encode

    def _save(self, step: int) -> Path:
        first = dist.get_rank() == 0
        saved = self.kept = checkpointing.save(
            self.folder.asked,
            self.source,
            self.state,
            step=step,
            save_dir=self.folder.path,
            data=self.builder.dataset.state(),
            first=first,
        )
        return saved
