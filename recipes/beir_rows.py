"""The train split of a BEIR folder as rows of training data."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes.beir import document_text, open_texts, qrels_path, read_qrels, read_texts
from megatron_embed.recipes.data_index import Index, indexed

_NAMES = ("corpus.jsonl", "queries.jsonl")


class BeirRows:
    """The train split of a BEIR folder: one row a judged query. Only row numbers are kept in memory."""

    form = "BEIR folder, train split"

    def __init__(self, folder: str) -> None:
        root = Path(folder)
        self.path = str(qrels_path(root, "train"))
        self.files = [Path(self.path), *(root / name for name in _NAMES)]
        self._corpus, self._texts = (open_texts(root, name) for name in _NAMES)
        arrays = indexed("beir", self.files, lambda: _read_through(root)).arrays
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

    def scan(self) -> Iterator[Any]:
        yield from (self[index] for index in range(len(self)))


def _read_through(root: Path) -> Index:
    """A row for each query with a positive, in the order of the judgements: its row, line and documents' rows."""
    index = {name: {id_: row for id_, _, row, _ in read_texts(root, name)} for name in _NAMES}
    path = qrels_path(root, "train")
    positives: dict[int, list[int]] = {}
    lines: dict[int, int] = {}
    for query, document, grade, line in read_qrels(root, "train"):
        for id_, name in ((query, "queries.jsonl"), (document, "corpus.jsonl")):
            if id_ not in index[name]:
                raise UserError(f"{path}, line {line}: {id_!r} is not in {name}")
        if grade > 0:
            row = index["queries.jsonl"][query]
            positives.setdefault(row, []).append(index["corpus.jsonl"][document])
            lines.setdefault(row, line)
    if not positives:
        raise UserError(f"{path}: no judgement has a grade above 0")
    found = {
        "queries": list(positives),
        "lines": list(lines.values()),
        "documents": [document for documents in positives.values() for document in documents],
        "ends": list(accumulate(map(len, positives.values()))),
    }
    return Index({name: np.array(values, dtype=np.int64) for name, values in found.items()})
