"""Training data as texts to encode, as mining wants them."""

from __future__ import annotations

import hashlib

import numpy as np

from megatron_embed.recipes.datasets.pairs import PairSource
from megatron_embed.recipes.datasets.tokenization import Kind


class TrainingTexts:
    """The queries of training data, a row each, or their positives, an example each, as texts to encode.

    Args:
        only: rising numbers of the rows or examples that are wanted; None: all.
    """

    def __init__(self, source: PairSource, kind: Kind, prompt: str, only: np.ndarray | None = None) -> None:
        self.source, self.kind, self.path, self.prompt = source, kind, source.path, prompt
        count = source.rows if kind == "query" else len(source)
        self._numbers = range(count) if only is None else only.tolist()

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, first: int, last: int) -> tuple[list[str], list[str]]:
        """Numbers and texts."""
        numbers = self._numbers[first:last]
        return list(map(str, numbers)), list(map(self._text, numbers))

    def prompts(self, first: int, last: int) -> list[str] | None:
        """Some rows have prompts of their own."""
        if self.kind != "query":
            return None
        own = (self.source.pair(number).query_prompt for number in self._numbers[first:last])
        return [self.prompt if prompt is None else prompt for prompt in own]

    def digest(self) -> str:
        """SHA-256 of the texts and prompts."""
        total = hashlib.sha256()
        for index in range(len(self)):
            text = "".join([*(self.prompts(index, index + 1) or ()), *self.read(index, index + 1)[1]]).encode()
            total.update(b"%d\0%b" % (len(text), text))
        return total.hexdigest()

    def _text(self, number: int) -> str:
        return self.source.pair(number).query if self.kind == "query" else self.source[number].positive
