"""Training pairs from files, as examples.

The first start reads a whole source, so that a bad line ends a run before its first step. It writes a table that later
starts map into memory (:mod:`megatron_embed.recipes.datasets.table`).
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes.config.schema import DataSource
from megatron_embed.recipes.datasets.beir_rows import BeirRows
from megatron_embed.recipes.datasets.corpus import Corpus
from megatron_embed.recipes.datasets.documents import Documents
from megatron_embed.recipes.datasets.forms import NamedCorpora, PairReader, corpora_of
from megatron_embed.recipes.datasets.inputs import check_source
from megatron_embed.recipes.datasets.odd_rows import OddRows
from megatron_embed.recipes.datasets.pair import Pair, Teacher
from megatron_embed.recipes.datasets.pair_table import SCHEMA, pair_of, write_pairs
from megatron_embed.recipes.datasets.rows import JsonObjectRows, Rows, open_rows, place
from megatron_embed.recipes.datasets.table import Found, Recipe, TableWriter, open_table


@dataclass(frozen=True, slots=True)
class Example:
    """One query with one positive.

    Attributes:
        negatives: all hard negatives of the query in the data, in the data's order.
        positives: every known positive of the query, ``positive`` included; none of them is a negative.
        source, line: the file of the example, and its line.
    """

    query: str
    positive: str
    negatives: list[str]
    positives: list[str]
    source: str
    line: int
    query_prompt: str
    passage_prompt: str
    teacher: Teacher


class PairSource:
    """One source with all its rows checked. A row with several positives counts as that many examples.

    Raises:
        UserError: the source cannot be read in full; the message names file and line.
    """

    def __init__(self, source: DataSource) -> None:
        self.source = source
        rows = self._rows = open_source(source.path)
        #: the file that line numbers refer to
        self.path = rows.path
        # The prompts that the source sets matter only for files that name corpora with instructions.
        kind = "-".join(["pairs", *sorted(source.stated())]) if isinstance(rows, JsonObjectRows) else "pairs"
        recipe = Recipe(kind, rows.path, rows.files, SCHEMA, self._write, lambda facts: self._corpora(facts).files)
        self._table, found = open_table(recipe)
        corpora = self._corpora(found.facts)
        self.__dict__.pop("_reader", None)  # frees the ids of all documents
        self._documents = Documents(
            [rows.corpus] if isinstance(rows, BeirRows) else [Corpus(file) for file in corpora.texts]
        )
        #: name of the form
        self.form: str = found.facts["form"]
        #: total size of its files
        self.bytes = sum(file.stat().st_size for file in (*rows.files, *corpora.files))
        #: most hard negatives of a row
        self.max_negatives: int = found.facts["max_negatives"]
        #: first row without a teacher's scores, first row without its vectors (−1: none), and the widths of the vectors
        self.no_scores: int = found.facts["no_scores"]
        self.no_vectors: int = found.facts["no_vectors"]
        self.vector_widths: set[int] = set(found.facts["vector_widths"])
        #: passage prompts that rows themselves set
        self.passage_prompts: list[str] = found.facts["passage_prompts"]
        #: rows that are usable but look odd
        self.odd = OddRows.again(rows.path, found.facts["odd"])
        #: groups of examples that share a text, see :meth:`megatron_embed.recipes.datasets.duplicates.TextIds.groups`
        self.groups = found.arrays.get("groups")
        # Present only if a row has several positives; otherwise an example's number is that of its row.
        self._ends = found.arrays.get("ends")

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self._table)

    def __len__(self) -> int:
        return self.rows if self._ends is None else int(self._ends[-1])

    def __getitem__(self, index: int) -> Example:
        row, which = index, 0
        if self._ends is not None:
            row = int(np.searchsorted(self._ends, index, side="right"))
            which = index - (int(self._ends[row - 1]) if row else 0)
        values = self._table.row(row)
        pair = pair_of(values, self._documents.__getitem__)
        return Example(
            query=pair.query,
            positive=pair.positives[which],
            negatives=pair.negatives,
            positives=pair.positives,
            source=self.path,
            line=values[-1],
            query_prompt=(self.source.query_prompt or "") if pair.query_prompt is None else pair.query_prompt,
            passage_prompt=(self.source.passage_prompt or "") if pair.passage_prompt is None else pair.passage_prompt,
            teacher=_teacher_of(pair, which),
        )

    def pair(self, row: int) -> Pair:
        """Return the pair of a row."""
        return pair_of(self._table.row(row), self._documents.__getitem__)

    def examples(self, row: int) -> range:
        """Return the numbers of a row's examples."""
        if self._ends is None:
            return range(row, row + 1)
        return range(int(self._ends[row - 1]) if row else 0, int(self._ends[row]))

    def place(self, row: int) -> str:
        """Return the place of a row in its file, for messages."""
        return place(lambda index: self._table.value("line", index), row, self.rows)

    @cached_property
    def _reader(self) -> PairReader:
        return PairReader(self._rows, self.source.stated())

    def _write(self, writer: TableWriter) -> Found:
        found, form = write_pairs(self._rows, self._reader, writer), self._reader.form
        facts = {"form": form.name, "key": form.key, "named": self._reader.named}
        return Found(found.arrays, {**found.facts, **facts})

    def _corpora(self, facts: Mapping[str, Any] | None) -> NamedCorpora:
        if facts is None:
            return self._reader.found
        return corpora_of(self._rows, facts["key"], facts["named"])


def _teacher_of(pair: Pair, which: int) -> Teacher:
    """Return the teacher's answers for one of the row's positives and the negatives."""
    scores = pair.teacher.scores
    if scores is None or len(pair.positives) == 1:
        return pair.teacher
    return pair.teacher._replace(scores=[scores[which], *scores[len(pair.positives) :]])


def open_source(path: str) -> Rows:
    """Open a file, a BEIR folder or ``hf://org/name``, and recognise its form."""
    if not path.startswith("hf://") and Path(path).is_dir():
        check_source(path)
        return BeirRows(path)
    return open_rows(path)


class PairDataset:
    """All training sources, end to end.

    Raises:
        UserError: there is no source, or one cannot be read in full; the message names file and line.
    """

    def __init__(self, sources: Sequence[DataSource]) -> None:
        if not sources:
            raise UserError("data.train: missing; wanted at least one source of training pairs")
        self.sources = [PairSource(source) for source in sources]
        self.sizes = [len(source) for source in self.sources]
        self.weights = None if sources[0].weight is None else [float(source.weight or 0) for source in sources]
        self._ends = list(accumulate(self.sizes))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        which = bisect.bisect_right(self._ends, index)
        return self.sources[which][index - (self._ends[which] - self.sizes[which])]

    def state(self) -> dict[str, list[int]]:
        """Return each source's path → [examples, bytes of its files]; a position in the data depends on these."""
        return {source.source.path: [size, source.bytes] for source, size in zip(self.sources, self.sizes, strict=True)}
