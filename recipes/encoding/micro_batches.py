"""Texts → micro-batches: sorted by length, filled up to a budget, padded or packed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_embed.bridge.errors import UserError
from megatron_embed.bridge.sequences import TokenBatch


@dataclass(frozen=True)
class MicroBatch:
    """Some of a rank's texts: their tokens, and which texts they are (none: the tokens only fill a pipeline slot)."""

    tokens: TokenBatch
    texts: Tensor

    def rows(self, output: Tensor) -> Tensor:
        """The encoder's ``[n, hidden]`` without what belongs to no text."""
        return output[: len(self.texts)]


@dataclass(frozen=True)
class BatchingPlan:
    """How texts are grouped.

    Attributes:
        packed: end to end in one row, or one a row with padding.
        max_tokens: tokens of a micro-batch, padding included.
        max_texts: texts of a micro-batch; when set, tokens are not counted.
        multiple_of: row lengths are rounded up to it (TP × CP under sequence and context parallelism).
        count_multiple_of: number of micro-batches is rounded up to it (PP, where stages are interleaved).
        longer_alone: a sequence longer than ``max_tokens`` is a micro-batch of its own, not an error.
    """

    pad_id: int
    packed: bool = False
    max_tokens: int = 16384
    max_texts: int | None = None
    multiple_of: int = 1
    count_multiple_of: int = 1
    longer_alone: bool = False

    def split(self, sequences: Sequence[Sequence[int]]) -> list[MicroBatch]:
        """Group all sequences; neighbours in length come together, so that little is padded.

        Raises:
            UserError: a sequence alone is longer than the token budget, and ``longer_alone`` is not set.
        """
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        groups = list(self._groups(order, sequences))
        while len(groups) % self.count_multiple_of:
            largest = max(range(len(groups)), key=lambda g: len(groups[g]))
            half = len(groups[largest]) // 2
            # a micro-batch without texts computes one token and is ignored
            halves = [groups[largest][:half], groups[largest][half:]] if half else [groups[largest], []]
            groups[largest : largest + 1] = halves
        return [self._make([sequences[i] for i in group] or [[self.pad_id]], group) for group in groups]

    def holds(self, sequences: Sequence[Sequence[int]]) -> bool:
        """Whether all sequences fit into one micro-batch."""
        if self.max_texts is not None:
            return len(sequences) <= self.max_texts
        return self._cost([len(ids) for ids in sequences]) <= self.max_tokens

    def join(self, sequences: Sequence[Sequence[int]]) -> list[MicroBatch]:
        """All sequences in one micro-batch."""
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        return [self._make([sequences[i] for i in order], order)]

    def _make(self, sequences: list[Sequence[int]], texts: list[int]) -> MicroBatch:
        build = TokenBatch.pack if self.packed else TokenBatch.pad
        return MicroBatch(
            build(sequences, pad_id=self.pad_id, multiple_of=self.multiple_of), torch.tensor(texts, dtype=torch.long)
        )

    def _cost(self, lengths: Sequence[int]) -> int:
        """Tokens that a micro-batch of these lengths computes."""
        size = sum(lengths) if self.packed else len(lengths) * max(lengths)
        return -(-size // self.multiple_of) * self.multiple_of if self.packed else size

    def _groups(self, order: list[int], sequences: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        group: list[int] = []
        total = 0  # tokens of the group; sequences come in ascending length, so the newest is the longest
        for index in order:
            length = len(sequences[index])
            if self.max_texts is None and length > self.max_tokens and not self.longer_alone:
                raise UserError(
                    f"train.micro_batch_tokens: {self.max_tokens} is less than a sequence of {length} tokens; "
                    f"raise it, or lower data.query_max_length and data.passage_max_length"
                )
            grown = total + length if self.packed else (len(group) + 1) * length
            full = len(group) >= self.max_texts if self.max_texts is not None else grown > self.max_tokens
            if group and full:
                yield group
                group, total = [], 0
            group.append(index)
            total += length
        if group:
            yield group
