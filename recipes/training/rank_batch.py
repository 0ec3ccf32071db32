"""A data-parallel rank's part of each global batch: examples → texts → token ids → micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes.config.schema import LossSection
from megatron_embed.recipes.datasets.pairs import Example, PairDataset
from megatron_embed.recipes.datasets.sampler import GlobalBatchSampler
from megatron_embed.recipes.datasets.tokenization import TextTokenizer
from megatron_embed.recipes.encoding.micro_batches import BatchingPlan, MicroBatch
from megatron_embed.recipes.training.targets import Targets, identify


@dataclass(frozen=True)
class RankBatch:
    """The texts that one rank encodes in a step, as token ids: its queries, then their passages."""

    sequences: list[list[int]]
    targets: Targets

    @property
    def real_tokens(self) -> int:
        return sum(len(ids) for ids in self.sequences)

    @property
    def squared_lengths(self) -> int:
        """Σ length² in tokens²; the cost of attention is proportional to it."""
        return sum(len(ids) ** 2 for ids in self.sequences)


@dataclass(frozen=True)
class PackedBatch:
    """A rank's part of a step, ready for computation.

    Attributes:
        mode: the mode of its gradient, if the other ranks agree.
    """

    batch: RankBatch
    mode: str
    groups: list[MicroBatch]


@dataclass(frozen=True)
class BatchBuilder:
    """A builder of the rank's part of any step from the step's number alone, so that resuming needs nothing else."""

    dataset: PairDataset
    sampler: GlobalBatchSampler
    tokenizer: TextTokenizer
    negatives_per_query: int
    loss: LossSection
    rank: int
    world: int

    def build(self, step: int) -> RankBatch:
        """Return the rank's contiguous share of a step's global batch; steps count from 0."""
        indices = self.sampler.batch(step)
        share = len(indices) // self.world
        examples = [self.dataset[i] for i in indices[self.rank * share : (self.rank + 1) * share]]
        # Every rank and step has the same number of slots: the most that the data can fill.
        most = max(source.max_negatives for source in self.dataset.sources)
        slots = 1 + min(self.negatives_per_query, most)
        passages = [[e.positive, *e.negatives[: slots - 1]] for e in examples]
        queries = [e.query for e in examples]
        flat = [text for group in passages for text in group]
        prompts = [self._prompt(e, "passage") for e, group in zip(examples, passages, strict=True) for _ in group]
        valid = torch.tensor([[slot < len(group) for slot in range(slots)] for group in passages])
        known = [e.positives for e in examples]
        targets = Targets(
            len(examples),
            valid,
            **identify(queries, passages, known, slots),
            **self._teachers(examples, slots),
        )
        sequences = self.tokenizer.tokenize(queries, "query", [self._prompt(e, "query") for e in examples])
        return RankBatch(sequences + self.tokenizer.tokenize(flat, "passage", prompts), targets)

    def _teachers(self, examples: list[Example], slots: int) -> dict[str, torch.Tensor]:
        """Return the fields of :class:`Targets` with those of the teacher's answers that the loss uses."""
        found = {}
        if self.loss.score_distillation_weight:
            rows = [list(e.teacher.scores or ())[:slots] for e in examples]
            found["teacher_scores"] = torch.tensor([row + [0.0] * (slots - len(row)) for row in rows])
        if self.loss.embedding_distillation_weight:
            vectors = [e.teacher.query for e in examples]
            vectors += [vector for e in examples for vector in (e.teacher.passages or ())[:slots]]
            found["teacher_embeddings"] = torch.tensor(vectors)
            found["has_teacher_embedding"] = torch.ones(len(vectors), dtype=torch.bool)
        return found

    def _prompt(self, example: object, kind: str) -> str:
        return getattr(example, f"{kind}_prompt")

    def lines(self, step: int) -> str:
        """Return the places of a step's examples for messages: ``file lines 3, 17; other lines 4``."""
        found: dict[str, list[int]] = {}
        for index in self.sampler.batch(step):
            example = self.dataset[index]
            found.setdefault(example.source, []).append(example.line)
        return "; ".join(f"{path} lines {', '.join(map(str, sorted(lines)))}" for path, lines in found.items())


def check_teachers(dataset: PairDataset, loss: LossSection, hidden_size: int) -> None:
    """Refuse data that lack the teacher's answers that the loss uses, before any weight is read."""
    for source in dataset.sources:
        wanted = {
            "loss.score_distillation_weight": (source.no_scores, "scores"),
            "loss.embedding_distillation_weight": (source.no_vectors, "query_embedding and positive_embedding"),
        }
        for key, (row, fields) in wanted.items():
            if getattr(loss, key.removeprefix("loss.")) and row >= 0:
                where = f"{source.path}, {source.place(row)}"
                raise UserError(f"{where}: no {fields}, which {key} above 0 needs; add them, or set it to 0")
        if loss.embedding_distillation_weight and source.vector_widths != {hidden_size}:
            widths = ", ".join(map(str, sorted(source.vector_widths)))
            raise UserError(
                f"{source.path}: teacher vectors of {widths} numbers; wanted the model's hidden_size {hidden_size}: "
                f"take a teacher of that width"
            )


def pack(plan: BatchingPlan, batch: RankBatch, *, mode: str) -> PackedBatch:
    """Cut a rank's batch into micro-batches; ``auto`` is ``direct`` if one holds the batch, otherwise ``cached``.

    Raises:
        UserError: see :func:`micro_batches`.
    """
    if mode == "auto":
        mode = "direct" if plan.holds(batch.sequences) else "cached"
    return PackedBatch(batch, mode, micro_batches(plan, batch, mode=mode))


def micro_batches(plan: BatchingPlan, batch: RankBatch, *, mode: str) -> list[MicroBatch]:
    """Cut a rank's batch into micro-batches; ``direct`` gives a single one.

    Raises:
        UserError: the mode is ``direct`` and the batch does not fit into one micro-batch.
    """
    return plan.split(batch.sequences) if mode == "cached" else plan.join(batch.sequences)
