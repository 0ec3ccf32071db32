"""Training data as texts to encode, as mining wants them."""

from __future__ import annotations

import hashlib

from megatron_embed.recipes.data import PairSource
from megatron_embed.recipes.tokenization import Kind


class TrainingTexts:
    """The queries of training data, a row each, or their positives, an example each, as texts to encode."""

    def __init__(self, source: PairSource, kind: Kind, prompt: str) -> None:
        self.source, self.kind, self.path, self.prompt = source, kind, source.rows.path, prompt

    def __len__(self) -> int:
        return len(self.source.rows) if self.kind == "query" else len(self.source)

    def read(self, first: int, last: int) -> tuple[list[str], list[str]]:
        """Numbers and texts."""
        return [str(index) for index in range(first, last)], [self._text(index) for index in range(first, last)]

    def prompts(self, first: int, last: int) -> list[str] | None:
        """Some rows have prompts of their own."""
        if self.kind != "query":
            return None
        own = (self.source.pair(index).query_prompt for index in range(first, last))
        return [self.prompt if prompt is None else prompt for prompt in own]

    def digest(self) -> str:
        """SHA-256 of the texts and prompts."""
        total = hashlib.sha256()
        for index in range(len(self)):
            text = "".join([*(self.prompts(index, index + 1) or ()), self._text(index)]).encode()
            total.update(b"%d\0%b" % (len(text), text))
        return total.hexdigest()

    def _text(self, index: int) -> str:
        return self.source.pair(index).query if self.kind == "query" else self.source[index].positive
