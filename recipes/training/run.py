"""The steps of a training run: encode, score, differentiate and update; log, evaluate and save."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_embed.bridge import liveness, parallel
from megatron_embed.bridge.errors import UserError
from megatron_embed.bridge.layout import Layout
from megatron_embed.recipes.config.checks import loss_mode, without_negatives
from megatron_embed.recipes.config.schema import RecipeConfig
from megatron_embed.recipes.encoding.encoder import encode_sequences
from megatron_embed.recipes.encoding.micro_batches import BatchingPlan
from megatron_embed.recipes.encoding.source import ModelSource
from megatron_embed.recipes.planning.flops import model_flops
from megatron_embed.recipes.training import checkpointing
from megatron_embed.recipes.training.kept_count import KeptCount
from megatron_embed.recipes.training.loss import ContrastiveLoss
from megatron_embed.recipes.training.metrics import Reporter, peak_memory_bytes
from megatron_embed.recipes.training.optimizer import TrainState
from megatron_embed.recipes.training.rank_batch import BatchBuilder, PackedBatch, RankBatch, micro_batches, pack
from megatron_embed.recipes.training.read_ahead import ReadAhead
from megatron_embed.recipes.training.resume import Start
from megatron_embed.recipes.training.run_folder import RunFolder
from megatron_embed.recipes.training.step import Later, contrastive_step, learned_temperature
from megatron_embed.recipes.training.targets import Targets

_LOG = logging.getLogger(__name__)


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
    kept_graphs: KeptCount
    folder: RunFolder
    collections: list[Any]
    kept: Path | None = None
    """The newest checkpoint of this run."""
    warned: bool = False
    """Whether the run has warned of queries without a negative."""
    skipped: int = 0
    """The updates that fp16 skipped in this process."""

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
                    mode, targets = self._agree(packed)
                    for choice, line in self._choices(packed, mode).items():
                        if choice not in told:
                            reporter.say(f"step {step}: {line}")
                            told.add(choice)
                    learning_rate = self.state.optimizer.param_groups[0]["lr"]
                    liveness.stand_at(f"step {step}, forward and backward", limited=True)
                    numbers, padding = self._step(packed, targets, mode, step)
                    record = self._record(step, packed.batch, padding, time.perf_counter() - began)
                    record.update(learning_rate=learning_rate, **numbers)
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

    def _agree(self, packed: PackedBatch) -> tuple[str, Targets]:
        """Return the mode of this step's gradient, the same on every rank, and targets as wide as every rank's."""
        targets = packed.batch.targets
        # numbers of the host: the GPU may still compute the step before
        ours = torch.tensor([packed.mode != "direct", targets.most_known])
        dist.all_reduce(ours, op=dist.ReduceOp.MAX, group=parallel.data_parallel_hosts())
        cached, most_known = ours.tolist()
        return "cached" if cached else "direct", targets.widened(most_known)

    def _choices(self, packed: PackedBatch, mode: str) -> dict[str, str]:
        """Return a line for each choice of this step that a run tells when it first makes it."""
        lines = {mode: f"loss.mode {mode}{self._why(mode)}"}
        if mode == "cached" and (kept := self.kept_graphs.of(packed.groups)):
            count = len(packed.groups)
            lines["kept"] = (
                f"keeps the graphs of {kept} of {count} micro-batches (loss.kept_micro_batches "
                f"{self.cfg.loss.kept_micro_batches}: {4 - kept / count:.3g} instead of 4 forward costs)"
            )
        return lines

    def _why(self, mode: str) -> str:
        if self.cfg.loss.mode != "auto":
            return ""
        if mode == "direct":
            return " (each rank's batch fits into one micro-batch: 3 instead of 4 forward costs)"
        if self.layout.pp > 1:
            return " (pipeline stages need several micro-batches)"
        return " (a rank's batch is more than one micro-batch)"

    def _step(
        self, packed: PackedBatch, targets: Targets, mode: str, step: int
    ) -> tuple[dict[str, float | None], float]:
        """Compute the gradient and update; return the step's numbers and this rank's share of padding.

        ``grad_norm``, from before clipping, is None if fp16 overflowed and the update was skipped.
        """
        state, batch, groups = self.state, packed.batch, packed.groups
        if mode != packed.mode:  # another rank's batch does not fit into one micro-batch
            groups = micro_batches(self.plan, batch, mode=mode)
        for stage in state.stages:
            stage.zero_grad_buffer()
        state.optimizer.zero_grad()
        told: dict[str, torch.Tensor] = {}
        if self.cfg.loss.learn_temperature:  # the value that divides this step's scores
            told["temperature"] = learned_temperature(state.stages)
        kept = self.kept_graphs.of(groups)
        found = contrastive_step(state.stages, groups, targets, self.loss, mode=mode, kept=kept)  # type: ignore[arg-type]
        told.update(loss=found.loss, alone=found.alone)
        later = Later(list(told.values()))
        # The step's only wait for the GPU: the optimizer reads the norm, and everything before it is then known too.
        updated, grad_norm, _ = state.optimizer.step()
        numbers: dict[str, float | None] = dict(zip(told, later.read(), strict=True))
        # With fp16, an update is skipped while the loss scale adjusts; a skipped update has no norm.
        self.skipped += not updated
        numbers["grad_norm"] = grad_norm
        for name in ("loss", "grad_norm"):
            value = numbers[name]
            if value is not None and not math.isfinite(value) and (updated or name == "loss"):
                raise UserError(self._not_finite(step, name.replace("grad_", "gradient "), value))
        self._warn_of_masks(step, int(numbers.pop("alone") or 0))
        state.scheduler.step(increment=1)
        self.kept_graphs.close_step(mode)
        total = sum(group.tokens.total_tokens for group in groups)
        return numbers, 1 - batch.real_tokens / total

    def _warn_of_masks(self, step: int, alone: int) -> None:
        """Say once that queries of a step have no negative that is not masked."""
        if alone and not self.warned and not self.cfg.loss.embedding_distillation_weight:
            self.warned = True
            if dist.get_rank() == 0:
                _LOG.warning(f"step {step}: {without_negatives(self.cfg, alone)} (told once)")

    def _not_finite(self, step: int, what: str, value: float) -> str:
        return (
            f"step {step}: {what} is {value}. Batch: {self.builder.lines(step - 1)}. "
            f"{f'The checkpoint {self.kept} is kept' if self.kept else 'No checkpoint was written yet'}; "
            f"lower optimizer.lr, or look at these lines"
        )

    def _record(self, step: int, batch: RankBatch, padding: float, seconds: float) -> dict[str, Any]:
        """Return this step's record over all ranks."""
        sums = torch.tensor(
            [batch.real_tokens, batch.squared_lengths, batch.real_tokens / (1 - padding)], dtype=torch.float64
        )
        dist.all_reduce(sums, group=parallel.data_parallel_hosts())
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
