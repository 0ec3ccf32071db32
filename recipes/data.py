"""Training pairs from files, and the order in which they are trained on.

A dataset holds offsets, not texts; all of it is read at the first start, so that a bad line ends a run before it
began, and what was found is kept for the next (:mod:`megatron_embed.recipes.data_index`). The order is a pure
function of seed and step: resuming needs the step alone, and no layout changes it.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np

from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes.beir_rows import BeirRows
from megatron_embed.recipes.config import DataSource
from megatron_embed.recipes.data_index import indexed
from megatron_embed.recipes.duplicates import spread
from megatron_embed.recipes.formats import PairReader
from megatron_embed.recipes.inputs import check_source
from megatron_embed.recipes.odd_rows import OddRows
from megatron_embed.recipes.pairs import Pair, Teacher
from megatron_embed.recipes.read_through import read_through
from megatron_embed.recipes.rows import Rows, open_rows


@dataclass(frozen=True, slots=True)
class Example:
    """One query with one positive.

    Attributes:
        negatives: the hard negatives that the data has for the query, all of them, in the data's order.
        positives: every known positive of the query, ``positive`` included: none of them is a negative.
        source, line: where it came from.
    """

    query: str
    positive: str
    negatives: list[str]
    positives: list[str]
    source: str
    line: int
    query_prompt: str
    passage_prompt: str
    teacher: Teacher


class PairSource:
    """One source, every row checked. A row with several positives counts as that many examples."""

    def __init__(self, source: DataSource) -> None:
        self.source = source
        self.rows: Rows = open_source(source.path)
        self.reader = PairReader(self.rows)
        self.reader.stated = source.stated()
        files = [*self.rows.files, *self.reader.files]
        found = indexed("pairs", files, lambda: read_through(self.rows, self.reader))
        #: of its files, as they were read
        self.bytes = sum(file.stat().st_size for file in files)
        #: hard negatives of the row that has most
        self.max_negatives: int = found.facts["max_negatives"]
        #: first row without a teacher's scores, and without its vectors; the widths of the vectors
        self.no_scores: int = found.facts["no_scores"]
        self.no_vectors: int = found.facts["no_vectors"]
        self.vector_widths: set[int] = set(found.facts["vector_widths"])
        #: prompts of passages that rows have of their own
        self.passage_prompts: list[str] = found.facts["passage_prompts"]
        #: rows that can be used and look odd
        self.odd = OddRows.again(self.rows.path, found.facts["odd"])
        #: examples that share a text, see :meth:`megatron_embed.recipes.duplicates.TextIds.groups`
        self.groups = found.arrays.get("groups")
        # Only where some row has several positives does an example need more than its row's number.
        self._ends = found.arrays.get("ends")

    def __len__(self) -> int:
        return len(self.rows) if self._ends is None else int(self._ends[-1])

    def __getitem__(self, index: int) -> Example:
        row, which = index, 0
        if self._ends is not None:
            row = int(np.searchsorted(self._ends, index, side="right"))
            which = index - (int(self._ends[row - 1]) if row else 0)
        pair = self.pair(row)
        return Example(
            query=pair.query,
            positive=pair.positives[which],
            negatives=pair.negatives,
            positives=pair.positives,
            source=self.rows.path,
            line=self.rows.line(row),
            query_prompt=(self.source.query_prompt or "") if pair.query_prompt is None else pair.query_prompt,
            passage_prompt=(self.source.passage_prompt or "") if pair.passage_prompt is None else pair.passage_prompt,
            teacher=_teacher_of(pair, which),
        )

    def pair(self, row: int) -> Pair:
        """What a row says."""
        return self.reader.pair(self.rows[row])

    def examples(self, row: int) -> range:
        """The examples that a row counts as."""
        if self._ends is None:
            return range(row, row + 1)
        return range(int(self._ends[row - 1]) if row else 0, int(self._ends[row]))


def _teacher_of(pair: Pair, which: int) -> Teacher:
    """The answers that go with one of the row's positives."""
    scores = pair.teacher.scores
    if scores is None or len(pair.positives) == 1:
        return pair.teacher
    return pair.teacher._replace(scores=[scores[which], *scores[len(pair.positives) :]])


def open_source(path: str) -> Rows:
    """Open a file, a BEIR folder or ``hf://org/name``; the form is recognised."""
    if not path.startswith("hf://") and Path(path).is_dir():
        check_source(path)
        return BeirRows(path)
    return open_rows(path)


class PairDataset:
    """All training sources, end to end.

    Raises:
        UserError: no source, or one that cannot be read in full; file and line are named.
    """

    def __init__(self, sources: Sequence[DataSource]) -> None:
        if not sources:
            raise UserError("data.train: missing; wanted at least one source of training pairs")
        self.sources = [PairSource(source) for source in sources]
        self.sizes = [len(source) for source in self.sources]
        self.weights = None if sources[0].weight is None else [float(source.weight or 0) for source in sources]
        self._ends = list(accumulate(self.sizes))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        which = bisect.bisect_right(self._ends, index)
        return self.sources[which][index - (self._ends[which] - self.sizes[which])]

    def state(self) -> dict[str, list[int]]:
        """What a position in the data means nothing without: of each source its examples and its files' bytes."""
        return {source.source.path: [size, source.bytes] for source, size in zip(self.sources, self.sizes, strict=True)}


class GlobalBatchSampler:
    """Which examples each step trains on: a pure function of the seed and the step.

    Every batch comes from one source. Within a source the examples are shuffled anew each epoch, and the tail that
    does not fill a batch is dropped (other examples in each epoch). Examples with the same query or the same positive
    come into different batches (:func:`megatron_embed.recipes.duplicates.spread`). Without weights an epoch takes
    every source through once; with weights each step draws its source by weight.

    Args:
        dataset: a :class:`PairDataset`, or the sizes of its sources.
        weights: one a source; default: the dataset's.
        groups: one a source; default: the dataset's. See :meth:`megatron_embed.recipes.duplicates.TextIds.groups`.

    Raises:
        UserError: a source with fewer examples than a batch.
    """

    _BLOCK = 1024  # steps whose sources are drawn together, where weights decide

    def __init__(
        self,
        dataset: PairDataset | Sequence[int],
        global_batch_size: int,
        seed: int,
        *,
        weights: Sequence[float] | None = None,
        groups: Sequence[np.ndarray | None] | None = None,
    ) -> None:
        if isinstance(dataset, PairDataset):
            names, sizes = [source.source.path for source in dataset.sources], dataset.sizes
            weights = dataset.weights if weights is None else weights
            groups = [source.groups for source in dataset.sources] if groups is None else groups
        else:
            names, sizes = [f"source {which}" for which in range(len(dataset))], list(dataset)
        self.sizes, self.global_batch_size, self.seed = sizes, global_batch_size, seed
        self._groups = groups or [None] * len(sizes)
        self._shares = None if weights is None else np.asarray(weights) / np.sum(weights)
        self._starts = [0, *accumulate(self.sizes)]
        self._batches = [size // global_batch_size for size in self.sizes]  # a source's batches an epoch
        for name, size in zip(names, sizes, strict=True):
            if size < global_batch_size:
                raise UserError(
                    f"{name}: {size} examples do not fill one batch of train.global_batch_size {global_batch_size}"
                )
        self._order = lru_cache(maxsize=2 * len(self.sizes))(self._shuffled)
        self._plan = lru_cache(maxsize=8)(self._planned)
        # Batches that each source has given before block k. Grows with the steps asked for, 8 bytes a source and block.
        self._given = [np.zeros(len(self.sizes), dtype=np.int64)]

    @property
    def steps_per_epoch(self) -> int:
        """Steps that take every source through once (of the mean course, where weights decide)."""
        return sum(self._batches)

    def batch(self, step: int) -> list[int]:
        """The examples of a step (from 0), as indices into the dataset: ``global_batch_size`` of one source."""
        block, within = divmod(step, self._block_size)
        plan = self._plan(block)
        which = int(plan[within])
        number = int(self._before(block)[which] + np.count_nonzero(plan[:within] == which))
        epoch, place = divmod(number, self._batches[which])
        first = place * self.global_batch_size
        chosen = self._order(which, epoch)[first : first + self.global_batch_size]
        return (chosen.astype(np.int64) + self._starts[which]).tolist()

    @property
    def _block_size(self) -> int:
        return self.steps_per_epoch if self._shares is None else self._BLOCK

    def _planned(self, block: int) -> np.ndarray:
        """The source of each step of a block."""
        generator = np.random.default_rng([self.seed, 0, block])
        if self._shares is None:
            return generator.permutation(np.repeat(np.arange(len(self.sizes)), self._batches))
        return generator.choice(len(self.sizes), size=self._BLOCK, p=self._shares)

    def _before(self, block: int) -> np.ndarray:
        if self._shares is None:
            return np.asarray(self._batches) * block
        while len(self._given) <= block:
            counts = np.bincount(self._planned(len(self._given) - 1), minlength=len(self.sizes))
            self._given.append(self._given[-1] + counts)
        return self._given[block]

    def _shuffled(self, which: int, epoch: int) -> np.ndarray:
        """The source's examples in the epoch's order."""
        generator = np.random.default_rng([self.seed, 1, which, epoch])
        dtype = np.int32 if self.sizes[which] < 2**31 else np.int64
        order = np.arange(self.sizes[which], dtype=dtype)
        generator.shuffle(order)
        groups = self._groups[which]
        return order if groups is None else spread(order, self.global_batch_size, groups)


if __name__ == "__main__":
    from megatron_embed.recipes.inspect_data import main

    main()
