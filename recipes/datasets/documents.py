"""Documents that rows name by id: found by it while rows are read, by their number ever after."""

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
    """The text of a document, title first, that knows which it is: a table keeps the number and not the text."""

    number: int


class Documents:
    """The documents of several corpora, numbered from the first of the first one on."""

    def __init__(self, corpora: Sequence[Corpus]) -> None:
        self.corpora = list(corpora)
        self._ends: list[int] | None = None

    def __getitem__(self, number: int) -> Document:
        corpus, row = self.find(number)
        document = Document(corpus.text(row))
        document.number = number
        return document

    def find(self, number: int) -> tuple[Corpus, int]:
        """A document's corpus, and its row there."""
        if self._ends is None:  # the corpora are read when the first document is wanted
            self._ends = list(accumulate(map(len, self.corpora)))
        which = next(which for which, end in enumerate(self._ends) if number < end)
        return self.corpora[which], number - (self._ends[which - 1] if which else 0)


class DocumentIds:
    """Which document has an id; 16 bytes a document.

    Args:
        within: what the ids are unique in, for messages.
        first: number of the first document of these corpora among all those of ``documents``.

    Raises:
        UserError: an id stands there twice.
    """

    def __init__(self, documents: Documents, corpora: Sequence[Corpus], within: str = "corpus", first: int = 0) -> None:
        self.documents, self.first, self._corpora = documents, first, corpora
        ids = (exact_id(id_) for corpus in corpora for id_ in corpus.ids())
        found = np.fromiter(ids, dtype=np.uint64)
        if len(again := repeats(found)):
            corpus, row = documents.find(first + int(again[0]))
            where = f"{corpus.path}, line {corpus.line(row)}"
            raise UserError(f"{where}: _id {corpus.id(row)!r} stands in the {within} twice")
        self._order = np.argsort(found, kind="stable")
        self._ids = found[self._order]

    def numbers(self, wanted: np.ndarray) -> np.ndarray:
        """``[n]`` identities of ids (:func:`exact_id`) → the documents that have them; −1: none."""
        at = np.searchsorted(self._ids, wanted)
        at[at == len(self._ids)] = 0
        return np.where(self._ids[at] == wanted, self._order[at] + self.first, -1)

    def document(self, id_: Any) -> Document:
        """The document with an id.

        Raises:
            RowError: there is none.
        """
        wanted = np.uint64(exact_id(str(id_)))
        at = int(np.searchsorted(self._ids, wanted))
        if at == len(self._ids) or self._ids[at] != wanted:
            raise RowError(f"document {id_!r} is not in {', '.join(corpus.path for corpus in self._corpora)}")
        return self.documents[int(self._order[at]) + self.first]
