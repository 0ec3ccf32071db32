"""Training within a budget of processor time: our loop, and two forms of sentence-transformers' loop.

Processor seconds are the user and system time of all threads of the process (``time.process_time``), from the start of
the first step to the end of the last one. Imports, loading, building, saving and evaluation do not count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from quality import load_theirs, train_theirs

from megatron_embed.recipes import train
from megatron_embed.recipes.config.schema import DataSource, RecipeConfig
from megatron_embed.recipes.datasets.pairs import PairDataset
from megatron_embed.recipes.training import loop as training


@dataclass
class Meter:
    """Processor and wall time of a training run, step by step.

    Attributes:
        budget: processor seconds after which no further step begins.
        most: number of steps after which no further step begins.
        marks: (processor, wall) seconds at the start and after each step.
    """

    budget: float = math.inf
    most: float = math.inf
    marks: list[tuple[float, float]] = field(default_factory=list)

    def start(self) -> None:
        """Note the start of the first step."""
        self.marks = [(time.process_time(), time.perf_counter())]

    def enough(self) -> bool:
        """Note the end of a step, and return whether it was the last one."""
        self.marks.append((time.process_time(), time.perf_counter()))
        return self.processor >= self.budget or self.steps >= self.most

    @property
    def steps(self) -> int:
        """Number of steps so far."""
        return len(self.marks) - 1

    @property
    def processor(self) -> float:
        """Processor seconds so far."""
        return self.marks[-1][0] - self.marks[0][0]

    @property
    def wall(self) -> float:
        """Wall seconds so far."""
        return self.marks[-1][1] - self.marks[0][1]

    def a_step(self, skip: int = 2) -> float:
        """Return the processor seconds of a warm step: the mean without the first ``skip`` steps."""
        skip = min(skip, self.steps - 1)
        return (self.marks[-1][0] - self.marks[skip][0]) / (self.steps - skip)


class _EnoughError(Exception):
    """Raised to end our loop when the meter has enough."""


def train_ours(cfg: RecipeConfig, meter: Meter, *, keep: bool) -> None:
    """Run ``recipes.train`` until the meter has enough.

    Args:
        keep: write a checkpoint if the meter ends the run; the checkpoint of the last step is always written.
    """

    class Metered(training.TrainingRun):
        def loop(self, start: int) -> None:
            meter.start()
            super().loop(start)

        def _step(self, batch: Any, mode: str, step: int) -> tuple[float, float | None, float]:
            found = super()._step(batch, mode, step)
            if meter.enough() and step < self.cfg.train.train_iters:
                if keep:
                    self._save(step)
                raise _EnoughError
            return found

    with mock.patch.object(training, "TrainingRun", Metered), suppress(_EnoughError):
        train(cfg)


def train_loop(cfg: RecipeConfig, folder: Path, meter: Meter) -> Any:
    """Train with sentence-transformers' loss in the textbook loop, with batches in our order."""
    return train_theirs(cfg, folder, begin=meter.start, enough=meter.enough)


def columns_of(source: Any) -> dict[str, list[str]]:
    """Return a source's pairs with their prompts as columns for the Trainer."""
    pairs = [source[index] for index in range(len(source))]
    return {
        "query": [pair.query_prompt + pair.query for pair in pairs],
        "passage": [pair.passage_prompt + pair.positive for pair in pairs],
    }


def train_trainer(cfg: RecipeConfig, folder: Path, meter: Meter) -> Any:
    """Train with sentence-transformers' Trainer and MultipleNegativesRankingLoss.

    As on our side, each batch comes from one source, sources are drawn in proportion to their size, and no batch holds
    a text twice.
    """
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.base.sampler import BatchSamplers, MultiDatasetBatchSamplers
    from sentence_transformers.losses import MultipleNegativesRankingLoss
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            meter.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop |= meter.enough()

    model = load_theirs(folder, cfg.data.passage_max_length)
    sources = PairDataset(cfg.data.sources()).sources
    steps = cfg.train.train_iters
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(cfg.train.save_dir),
        use_cpu=True,
        max_steps=steps,
        per_device_train_batch_size=cfg.train.global_batch_size,
        dataloader_drop_last=True,
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        multi_dataset_batch_sampler=MultiDatasetBatchSamplers.PROPORTIONAL,
        learning_rate=cfg.optimizer.lr,
        lr_scheduler_type="linear",
        warmup_steps=steps // 10,
        weight_decay=0.0,
        max_grad_norm=cfg.optimizer.clip_grad,
        optim="adamw_torch_fused",
        seed=cfg.train.seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset={Path(source.source.path).stem: Dataset.from_dict(columns_of(source)) for source in sources},
        loss=MultipleNegativesRankingLoss(model, scale=1 / cfg.loss.temperature),
        callbacks=[Watch()],
    )
    trainer.train()
    return model


FORMS = {"trainer": train_trainer, "loop": train_loop}


def distinct_passages(paths: Sequence[Path]) -> list[str]:
    """Return all positives of the files, each text once, in the files' order."""
    found: dict[str, None] = {}
    for path in paths:
        (source,) = PairDataset([DataSource(path=str(path))]).sources
        found.update((source[index].positive, None) for index in range(len(source)))
    return list(found)
