"""Training data as texts to encode, for mining."""

from __future__ import annotations

import hashlib

import numpy as np

from megatron_embed.recipes.datasets.pairs import PairSource
from megatron_embed.recipes.datasets.tokenization import Kind


class TrainingTexts:
    """The queries (one for each row) or the positives (one for each example) of training data, as texts to encode.

    Args:
        only: numbers of the rows or examples to use, in ascending order; None: all.
    """

    def __init__(self, source: PairSource, kind: Kind, prompt: str, only: np.ndarray | None = None) -> None:
        self.source, self.kind, self.path, self.prompt = source, kind, source.path, prompt
        count = source.rows if kind == "query" else len(source)
        self._numbers = range(count) if only is None else only.tolist()

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, first: int, last: int) -> tuple[list[str], list[str]]:
        """Return the numbers, as ids, and the texts."""
        numbers = self._numbers[first:last]
        return list(map(str, numbers)), list(map(self._text, numbers))

    def prompts(self, first: int, last: int) -> list[str] | None:
        """Return the prompts of queries, a row's own if it has one; None for positives."""
        if self.kind != "query":
            return None
        own = (self.source.pair(number).query_prompt for number in self._numbers[first:last])
        return [self.prompt if prompt is None else prompt for prompt in own]

    def digest(self) -> str:
        """Return the SHA-256 of the texts and prompts."""
        total = hashlib.sha256()
        for index in range(len(self)):
            text = "".join([*(self.prompts(index, index + 1) or ()), *self.read(index, index + 1)[1]]).encode()
            total.update(b"%d\0%b" % (len(text), text))
        return total.hexdigest()

    def _text(self, number: int) -> str:
        return self.source.pair(number).query if self.kind == "query" else self.source[number].positive
