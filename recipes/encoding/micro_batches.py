"""Group texts into micro-batches: sorted by length, filled up to a budget, padded or packed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_embed.bridge.errors import UserError
from megatron_embed.bridge.sequences import TokenBatch


@dataclass(frozen=True)
class MicroBatch:
    """Some of a rank's texts: their tokens and indices (if it has no texts, its tokens only fill a pipeline slot)."""

    tokens: TokenBatch
    texts: Tensor

    def rows(self, output: Tensor) -> Tensor:
        """Return the rows of the encoder's output ``[n, hidden]`` that belong to texts."""
        return output[: len(self.texts)]


@dataclass(frozen=True)
class BatchingPlan:
    """The way texts are grouped.

    Attributes:
        packed: True: texts end to end in one row; False: one text in each row, with padding.
        max_tokens: most tokens of a micro-batch, padding included.
        max_texts: most texts of a micro-batch; if set, tokens are not counted.
        multiple_of: round row lengths up to a multiple of it (TP × CP under sequence and context parallelism).
        count_multiple_of: round the number of micro-batches up to a multiple of it (PP, if stages are interleaved).
        longer_alone: put a sequence longer than ``max_tokens`` into its own micro-batch, instead of raising an error.
    """

    pad_id: int
    packed: bool = False
    max_tokens: int = 16384
    max_texts: int | None = None
    multiple_of: int = 1
    count_multiple_of: int = 1
    longer_alone: bool = False

    def split(self, sequences: Sequence[Sequence[int]]) -> list[MicroBatch]:
        """Group all sequences by length, so that little is padded.

        Raises:
            UserError: a single sequence is longer than the token budget, and ``longer_alone`` is False.
        """
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        groups = list(self._groups(order, sequences))
        while len(groups) % self.count_multiple_of:
            largest = max(range(len(groups)), key=lambda g: len(groups[g]))
            half = len(groups[largest]) // 2
            # A micro-batch without texts computes one token, and its output is ignored.
            halves = [groups[largest][:half], groups[largest][half:]] if half else [groups[largest], []]
            groups[largest : largest + 1] = halves
        return [self._make([sequences[i] for i in group] or [[self.pad_id]], group) for group in groups]

    def holds(self, sequences: Sequence[Sequence[int]]) -> bool:
        """Return whether all sequences fit into one micro-batch."""
        if self.max_texts is not None:
            return len(sequences) <= self.max_texts
        return self._cost([len(ids) for ids in sequences]) <= self.max_tokens

    def join(self, sequences: Sequence[Sequence[int]]) -> list[MicroBatch]:
        """Return all sequences in one micro-batch.

        Raises:
            UserError: one micro-batch does not hold them.
        """
        if not self.holds(sequences):
            by_texts = self.max_texts is not None
            limit = f"size {self.max_texts}" if by_texts else f"tokens {self.max_tokens}"
            raise UserError(
                f"loss.mode: direct needs a rank's whole batch in one micro-batch, but its {len(sequences)} texts "
                f"({sum(map(len, sequences))} tokens) are more than train.micro_batch_{limit} holds; use "
                f"loss.mode=cached (the same gradient), or raise the limit"
            )
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        return [self._make([sequences[i] for i in order], order)]

    def _make(self, sequences: list[Sequence[int]], texts: list[int]) -> MicroBatch:
        build = TokenBatch.pack if self.packed else TokenBatch.pad
        return MicroBatch(
            build(sequences, pad_id=self.pad_id, multiple_of=self.multiple_of), torch.tensor(texts, dtype=torch.long)
        )

    def _cost(self, lengths: Sequence[int]) -> int:
        """Return the tokens that a micro-batch of these lengths computes."""
        size = sum(lengths) if self.packed else len(lengths) * max(lengths)
        return -(-size // self.multiple_of) * self.multiple_of if self.packed else size

    def _groups(self, order: list[int], sequences: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        group: list[int] = []
        total = 0  # tokens of the group; sequences come in ascending length, so the last one is the longest
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
