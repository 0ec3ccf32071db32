"""The train split of a BEIR folder as rows of training data."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes.beir import (
    checked_texts,
    document_text,
    id_of,
    open_texts,
    qrels_path,
    read_qrels,
    repeated_id,
)
from megatron_embed.recipes.data_index import Index, indexed
from megatron_embed.recipes.duplicates import repeats
from megatron_embed.recipes.rows import JsonLineRows
from megatron_embed.recipes.text_ids import exact_id

_NAMES = ("corpus.jsonl", "queries.jsonl")


class BeirRows:
    """The train split of a BEIR folder: one row a judged query. Only row numbers are kept in memory."""

    form = "BEIR folder, train split"

    def __init__(self, folder: str) -> None:
        root = Path(folder)
        self.path = str(qrels_path(root, "train"))
        self.files = [Path(self.path), *(root / name for name in _NAMES)]
        self._corpus, self._texts = (open_texts(root, name) for name in _NAMES)
        arrays = indexed("beir", self.files, lambda: _read_through(root, self._texts, self._corpus)).arrays
        self._queries, self._lines = arrays["queries"], arrays["lines"]
        self._documents, self._ends = arrays["documents"], arrays["ends"]

    def __len__(self) -> int:
        return len(self._queries)

    def __getitem__(self, index: int) -> Any:
        documents = self._documents[self._ends[index - 1] if index else 0 : self._ends[index]].tolist()
        return {
            "query": document_text(self._texts[int(self._queries[index])]),
            "positive": [document_text(self._corpus[document]) for document in documents],
        }

    def line(self, index: int) -> int:
        return int(self._lines[index])

    def check_unchanged(self) -> None:
        for rows in (self._texts, self._corpus):
            rows.check_unchanged()

    def scan(self) -> Iterator[Any]:
        yield from (self[index] for index in range(len(self)))


def _read_through(root: Path, texts: JsonLineRows, corpus: JsonLineRows) -> Index:
    """A row for each query with a positive, in the order of the judgements: its row, line and documents' rows.

    Of a query and document judged more than once the last judgement counts, as in an evaluation.
    """
    path = qrels_path(root, "train")
    ids, relevant, on = (array("Q"), array("Q")), array("b"), array("q")
    for query, document, grade, line in read_qrels(root, "train"):
        ids[0].append(exact_id(query))
        ids[1].append(exact_id(document))
        relevant.append(grade > 0)
        on.append(line)
    lines = np.array(on)
    queries, documents = (_rows_of(rows, np.array(wanted)) for rows, wanted in zip((texts, corpus), ids, strict=True))
    wanted = np.array(relevant, dtype=bool)  # of what is not relevant nothing is read
    if len(absent := np.flatnonzero(wanted & ((queries < 0) | (documents < 0)))):
        query, document, _, line = next(found for found in read_qrels(root, "train") if found[3] == lines[absent[0]])
        id_, name = (query, "queries.jsonl") if queries[absent[0]] < 0 else (document, "corpus.jsonl")
        raise UserError(f"{path}, line {line}: {id_!r} is not in {name}")
    for rows in (texts, corpus):
        rows.check_unchanged()
    pairs = queries * len(corpus) + documents
    last = len(pairs) - 1 - np.unique(pairs[::-1], return_index=True)[1]
    kept = np.sort(last[wanted[last]])
    if not len(kept):
        raise UserError(f"{path}: no judgement has a grade above 0")
    _, first, which = np.unique(queries[kept], return_index=True, return_inverse=True)
    begins = first[which]  # where the query of each judgement comes first
    order, first = np.argsort(begins, kind="stable"), np.sort(first)
    ends = np.searchsorted(begins[order], first, side="right")
    return Index(
        {
            "queries": queries[kept][first],
            "lines": lines[kept][first],
            "documents": documents[kept][order],
            "ends": ends.astype(np.int64),
        }
    )


def _rows_of(rows: JsonLineRows, wanted: np.ndarray) -> np.ndarray:
    """``[n]`` identities of ids → the rows that have them; −1: none. While it looks, a row takes some 40 bytes."""
    found = np.fromiter((exact_id(id_) for id_, *_ in checked_texts(rows)), dtype=np.uint64)
    if len(again := repeats(found)):
        row = int(again[0])
        raise UserError(repeated_id(rows, rows.line(row), id_of(rows[row], "_id")))
    order = np.argsort(found)
    at = np.searchsorted(found, wanted, sorter=order)
    at[at == len(order)] = 0
    return np.where(found[order[at]] == wanted, order[at], -1)
