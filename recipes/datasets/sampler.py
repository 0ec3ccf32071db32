"""The order of training examples, as a pure function of seed and step.

Resuming needs only the step, and the layout does not change the order.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np

from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes.datasets.duplicates import spread
from megatron_embed.recipes.datasets.pairs import PairDataset


class GlobalBatchSampler:
    """The choice of examples for each step, as a pure function of the seed and the step.

    Every batch comes from one source. Each epoch shuffles the examples of a source anew and drops the tail that does
    not fill a batch (other examples in each epoch). Examples with the same query or the same positive go to different
    batches (:func:`megatron_embed.recipes.datasets.duplicates.spread`). Without weights, an epoch goes once through
    every source. With weights, each step draws its source by weight.

    Args:
        dataset: a :class:`PairDataset`, or the sizes of its sources.
        weights: one for each source; default: the dataset's.
        groups: one array for each source; default: the dataset's. See
            :meth:`megatron_embed.recipes.datasets.duplicates.TextIds.groups`.

    Raises:
        UserError: a source has fewer examples than a batch.
    """

    _BLOCK = 1024  # with weights, the number of steps whose sources are drawn at a time

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
        self._batches = [size // global_batch_size for size in self.sizes]  # each source's batches in an epoch
        for name, size in zip(names, sizes, strict=True):
            if size < global_batch_size:
                raise UserError(
                    f"{name}: {size} examples do not fill one batch of train.global_batch_size "
                    f"{global_batch_size}; lower the batch size, or add examples"
                )
        self._lock = threading.Lock()
        self._order = lru_cache(maxsize=2 * len(self.sizes))(self._shuffled)
        self._plan = lru_cache(maxsize=8)(self._planned)
        # Batches that each source gave before block k. It grows with the steps, by 8 bytes for each source and block.
        self._given = [np.zeros(len(self.sizes), dtype=np.int64)]

    @property
    def steps_per_epoch(self) -> int:
        """Steps that go once through every source; with weights, on average."""
        return sum(self._batches)

    def batch(self, step: int) -> list[int]:
        """Return a step's examples (steps count from 0) as dataset indices: ``global_batch_size`` from one source."""
        block, within = divmod(step, self._block_size)
        with self._lock:  # a background thread draws the next batch
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
        """Return the source of each step of a block."""
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
        """Return the examples of a source in the order of an epoch."""
        generator = np.random.default_rng([self.seed, 1, which, epoch])
        dtype = np.int32 if self.sizes[which] < 2**31 else np.int64
        order = np.arange(self.sizes[which], dtype=dtype)
        generator.shuffle(order)
        groups = self._groups[which]
        return order if groups is None else spread(order, self.global_batch_size, groups)
