"""Documents that rows name by id. They are found by id while rows are read, and by number afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes.datasets.corpus import Corpus
from megatron_embed.recipes.datasets.duplicates import repeats
from megatron_embed.recipes.datasets.json_text import RowError
from megatron_embed.recipes.datasets.text_ids import exact_id


class Document(str):
    """The text of a document, title first, with its number, which a table stores instead of the text."""

    number: int


class Documents:
    """The documents of several corpora, numbered through from the first document of the first corpus."""

    def __init__(self, corpora: Sequence[Corpus]) -> None:
        self.corpora = list(corpora)
        self._ends: list[int] | None = None

    def __getitem__(self, number: int) -> Document:
        corpus, row = self.find(number)
        document = Document(corpus.text(row))
        document.number = number
        return document

    def find(self, number: int) -> tuple[Corpus, int]:
        """Return a document's corpus and its row there."""
        if self._ends is None:  # reads the corpora, so it waits for the first use of a document
            self._ends = list(accumulate(map(len, self.corpora)))
        which = next(which for which, end in enumerate(self._ends) if number < end)
        return self.corpora[which], number - (self._ends[which - 1] if which else 0)


class DocumentIds:
    """An index from ids to documents; takes 16 bytes for each document.

    Args:
        first: number of the first document of these corpora in ``documents``.

    Raises:
        UserError: an id is repeated in another file of the corpora.
    """

    def __init__(self, documents: Documents, corpora: Sequence[Corpus], first: int = 0) -> None:
        self.documents, self.first, self._corpora = documents, first, corpora
        found = np.concatenate([corpus.id_numbers for corpus in corpora])
        if len(again := repeats(found)):
            corpus, row = documents.find(first + int(again[0]))
            where = f"{corpus.path}, line {corpus.line(row)}"
            raise UserError(
                f"{where}: _id {corpus.id(row)!r} stands in the corpus twice; give every row an id of its own"
            )
        self._order = np.argsort(found, kind="stable")
        self._ids = found[self._order]

    def numbers(self, wanted: np.ndarray) -> np.ndarray:
        """Return the numbers ``[n]`` of the documents with these ids (``[n]`` of :func:`exact_id`); −1 means none."""
        at = np.searchsorted(self._ids, wanted)
        at[at == len(self._ids)] = 0
        return np.where(self._ids[at] == wanted, self._order[at] + self.first, -1)

    def document(self, id_: Any) -> Document:
        """Return the document with an id.

        Raises:
            RowError: no document has this id.
        """
        wanted = np.uint64(exact_id(str(id_)))
        at = int(np.searchsorted(self._ids, wanted))
        if at == len(self._ids) or self._ids[at] != wanted:
            files = ", ".join(corpus.path for corpus in self._corpora)
            raise RowError(f"document {id_!r} is not in {files}; add it there, or remove the row")
        return self.documents[int(self._order[at]) + self.first]
