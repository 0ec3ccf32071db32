"""The steps of a training run: encode, score, differentiate and update; log, evaluate and save."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_embed.bridge import liveness
from megatron_embed.bridge.cpu import host
from megatron_embed.bridge.errors import UserError
from megatron_embed.bridge.layout import Layout
from megatron_embed.recipes.config.checks import loss_mode
from megatron_embed.recipes.config.schema import RecipeConfig
from megatron_embed.recipes.encoding.encoder import encode_sequences
from megatron_embed.recipes.encoding.micro_batches import BatchingPlan
from megatron_embed.recipes.encoding.source import ModelSource
from megatron_embed.recipes.training import checkpointing
from megatron_embed.recipes.training.loss import ContrastiveLoss
from megatron_embed.recipes.training.metrics import Reporter, model_flops, peak_memory_bytes
from megatron_embed.recipes.training.optimizer import TrainState
from megatron_embed.recipes.training.rank_batch import BatchBuilder, PackedBatch, RankBatch, micro_batches, pack
from megatron_embed.recipes.training.read_ahead import ReadAhead
from megatron_embed.recipes.training.resume import Start
from megatron_embed.recipes.training.run_folder import RunFolder
from megatron_embed.recipes.training.step import contrastive_step, learned_temperature


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
        loss = contrastive_step(state.stages, groups, batch.targets, self.loss, mode=mode)  # type: ignore[arg-type]
        if not math.isfinite(loss):
            raise UserError(self._not_finite(step, "loss", loss))
        updated, grad_norm, _ = state.optimizer.step()
        # With fp16, an update is skipped while the loss scale adjusts; a skipped update has no norm.
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
        flops = model_flops(self.source.config, tokens=int(tokens), squared_lengths=int(squared))
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

        def encode(texts: Sequence[str], kind: Any) -> Any:
            sequences = self.builder.tokenizer.tokenize(list(texts), kind)
            return encode_sequences(self.state.encoders, self.plan, sequences, self.source.config.hidden_size)

        return evaluate(encode, self.collections, bm25=False)

    def _save(self, step: int) -> Path:
        saved = self.kept = checkpointing.save(
            self.folder.asked,
            self.source,
            self.state,
            step=step,
            save_dir=self.folder.path,
            data=self.builder.dataset.state(),
        )
        return saved
