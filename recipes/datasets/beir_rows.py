"""The train split of a BEIR folder as rows of training data."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes.datasets.beir import MEND, qrels_path, read_qrels
from megatron_embed.recipes.datasets.corpus import BeirTexts
from megatron_embed.recipes.datasets.documents import DocumentIds, Documents
from megatron_embed.recipes.datasets.rows import Row
from megatron_embed.recipes.datasets.text_ids import exact_id


class BeirRows:
    """The train split of a BEIR folder: one row for each judged query, in the order of the judgements.

    If a query and document are judged more than once, the last judgement counts, as in an evaluation.
    """

    form = "BEIR folder, train split"
    bytes = done = 0  # the corpus and the queries show their own progress

    def __init__(self, folder: str) -> None:
        self._root = Path(folder)
        self.path = str(qrels_path(self._root, "train"))
        self.corpus, self._queries = (BeirTexts(self._root, name) for name in ("corpus.jsonl", "queries.jsonl"))
        self.files = [Path(self.path), Path(self.corpus.path), Path(self._queries.path)]

    def scan(self) -> Iterator[Row]:
        lines, queries, documents, ends = self._judged()
        begin, texts = 0, Documents([self.corpus])
        for line, query, end in zip(lines.tolist(), queries.tolist(), ends.tolist(), strict=True):
            positives = [texts[document] for document in documents[begin:end].tolist()]
            yield Row(line, {"query": self._queries.text(query), "positive": positives})
            begin = end

    def _judged(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return four arrays about the queries that have a positive.

        They are each query's line, each query's number, the numbers of all positive documents in the order of the
        queries, and the end of each query's part of these.
        """
        ids, relevant, on = (array("Q"), array("Q")), array("b"), array("q")
        for query, document, grade, line in read_qrels(self._root, "train"):
            ids[0].append(exact_id(query))
            ids[1].append(exact_id(document))
            relevant.append(grade > 0)
            on.append(line)
        lines = np.array(on)
        queries, documents = (
            DocumentIds(Documents([texts]), [texts]).numbers(np.array(wanted))
            for texts, wanted in zip((self._queries, self.corpus), ids, strict=True)
        )
        wanted = np.array(relevant, dtype=bool)  # queries and documents that are not relevant may be missing
        if len(absent := np.flatnonzero(wanted & ((queries < 0) | (documents < 0)))):
            where = int(lines[absent[0]])
            query, document, _, _ = next(found for found in read_qrels(self._root, "train") if found[3] == where)
            id_, name = (query, "queries.jsonl") if queries[absent[0]] < 0 else (document, "corpus.jsonl")
            raise UserError(f"{self.path}, line {where}: {id_!r} is not in {name}; {MEND}")
        pairs = queries * len(self.corpus) + documents
        last = len(pairs) - 1 - np.unique(pairs[::-1], return_index=True)[1]
        kept = np.sort(last[wanted[last]])
        if not len(kept):
            raise UserError(
                f"{self.path}: no judgement has a grade above 0; wanted a relevant document for at least one query"
            )
        _, first, which = np.unique(queries[kept], return_index=True, return_inverse=True)
        begins = first[which]  # for each judgement, the position of its query's first judgement
        order, first = np.argsort(begins, kind="stable"), np.sort(first)
        ends = np.searchsorted(begins[order], first, side="right")
        return lines[kept][first], queries[kept][first], documents[kept][order], ends
