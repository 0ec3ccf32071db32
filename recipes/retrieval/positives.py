"""Vectors of the positives of training data: a document's vector if the positive is a document, else its own."""

from __future__ import annotations

import numpy as np

from megatron_embed.recipes.datasets.corpus import Corpus
from megatron_embed.recipes.datasets.pairs import PairSource
from megatron_embed.recipes.datasets.text_ids import text_id
from megatron_embed.recipes.retrieval.vectors import VectorFolder


def find_documents(source: PairSource, corpus: Corpus) -> np.ndarray:
    """Find the documents that the positives of training data are. The search takes 24 bytes for each document.

    Returns:
        ``[examples]`` int64: the first document with the text of an example's positive; −1 if there is none, or if the
        two differ in the white space around the text, which the model sees.
    """
    order = np.argsort(corpus.text_ids[:, 0], kind="stable")
    ids = corpus.text_ids[order, 0]
    found = np.full(len(source), -1, dtype=np.int64)
    for row in range(source.rows):
        for example, text in zip(source.examples(row), source.pair(row).positives, strict=True):
            wanted = np.uint64(text_id(text))  # NumPy would compare a Python int in floating point
            at = int(np.searchsorted(ids, wanted))
            if at < len(ids) and ids[at] == wanted:
                document = int(order[at])
                if corpus.text(document) == text:
                    found[example] = document
    return found


class PositiveVectors:
    """The vectors of all examples' positives.

    Args:
        documents: vectors of the whole corpus.
        found: the result of :func:`find_documents`.
        others: vectors of the positives that are no documents, in the order of the examples; None if all are documents.
    """

    def __init__(self, documents: VectorFolder, found: np.ndarray, others: VectorFolder | None) -> None:
        self._documents, self._found, self._others = documents, found, others
        self._places = np.cumsum(found < 0) - 1

    def rows(self, first: int, last: int) -> np.ndarray:
        """Return the vectors ``[last - first, dim]`` of the examples ``first`` to ``last - 1``."""
        parts = []
        for example in range(first, last):
            folder, row = self._documents, int(self._found[example])
            if row < 0:
                assert self._others is not None
                folder, row = self._others, int(self._places[example])
            parts.append(folder.rows(row, row + 1))
        return np.concatenate(parts)
