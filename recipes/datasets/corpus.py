"""Texts to encode, with ids: a BEIR folder, JSON lines, Parquet or hub data with ``_id``, ``text``, or plain lines."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow

from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes.datasets.beir import WANTED, document_text, is_beir, text_file, text_row
from megatron_embed.recipes.datasets.duplicates import repeats
from megatron_embed.recipes.datasets.json_text import RowError
from megatron_embed.recipes.datasets.odd_rows import JSON_LOOKING, NO_TEXT, OddRows, of_text
from megatron_embed.recipes.datasets.rows import JsonLineRows, PlainLineRows, Row, Rows, open_rows, place, read_rows
from megatron_embed.recipes.datasets.table import Found, Recipe, Table, TableWriter, open_table
from megatron_embed.recipes.datasets.text_ids import exact_id, text_id

_ID_KEYS = ("_id", "id", "docid")
_WANTED = f"texts: {WANTED}, a row, or plain lines"
#: ``alone``: the text without its title, if it has a title
_SCHEMA = pyarrow.schema(
    {
        "line": pyarrow.int64(),
        "id": pyarrow.large_string(),
        "text": pyarrow.large_string(),
        "alone": pyarrow.large_string(),
    }
)


class Texts(Protocol):
    """Texts to encode, see :mod:`megatron_embed.recipes.retrieval.encode_corpus`. They are read on use."""

    path: str

    def __len__(self) -> int: ...

    def read(self, first: int, last: int) -> tuple[list[str], list[str]]:
        """Return the ids and texts of the rows ``first`` to ``last - 1``."""

    def prompts(self, first: int, last: int) -> list[str] | None:
        """Return the prompts of these rows, or None for the kind's own prompt."""

    def digest(self) -> str:
        """Return a digest that changes with any text, id or prompt."""


@dataclass(frozen=True)
class CorpusFacts:
    """The findings of :meth:`Corpus.check`.

    Attributes:
        odd: odd rows that are kept as they are: without text, with NUL characters, ….
        text_ids: ``[rows, 2]`` uint64: identity of title with text, and of the text alone.
    """

    odd: OddRows
    text_ids: np.ndarray


class Corpus:
    """A file of texts as a table, which is mapped into memory if it is kept on disk. It is read on first use.

    Args:
        path: a BEIR folder, a file of objects with ``_id``, ``text`` and perhaps ``title``, ``hf://org/name[/config]``
            with such rows, or a file of plain lines, whose ids are the line numbers from 1.
        kind: for a BEIR folder, ``passage`` selects its corpus and ``query`` its queries.

    Raises:
        UserError: the path does not exist or has none of these forms. Reading also raises it: the file holds no rows,
            or a row has no id or no text; the message names file and line.
    """

    _keys: Sequence[str] = _ID_KEYS
    _wanted = _WANTED

    def __init__(self, path: str | Path, kind: str = "passage") -> None:
        beir = is_beir(path)
        if beir:
            path = Path(path) / ("queries.jsonl" if kind == "query" else "corpus.jsonl")
        elif Path(path).is_dir():
            raise UserError(f"{path}: a folder, but no BEIR folder; wanted corpus.jsonl and queries.jsonl, or a file")
        self.path = str(path)
        self._rows: Rows = open_rows(self.path)
        if not beir and isinstance(self._rows, JsonLineRows) and not self._rows.begins_with_object():
            self._rows = PlainLineRows(path)

    def __len__(self) -> int:
        return len(self._table)

    def read(self, first: int, last: int) -> tuple[list[str], list[str]]:
        """Return the ids and texts of the rows ``first`` to ``last - 1``; texts begin with the title."""
        rows = [self._table.row(index) for index in range(first, last)]
        return [id_ for _, id_, _, _ in rows], [text for _, _, text, _ in rows]

    def text(self, index: int) -> str:
        """Return the text of one row, title first."""
        return self._table.value("text", index)

    def ids(self) -> Iterator[str]:
        """Return an iterator over the ids of all rows."""
        return (id_ for (id_,) in self._table.values("id"))

    def id(self, index: int) -> str:
        """Return the id of one row."""
        return self._table.value("id", index)

    def line(self, index: int) -> int:
        """Return the line of the file on which a row begins."""
        return self._table.value("line", index)

    def prompts(self, first: int, last: int) -> None:
        """Return None, because a corpus has no prompts of its own."""

    def digest(self) -> str:
        """Return the SHA-256 of the file, or of the files in which ``datasets`` keeps hub data.

        If ``datasets`` keeps hub data in memory, hash its rows, because no file lasts from one run to the next.
        """
        if self._rows.files:
            return file_digest(*self._rows.files)
        total = hashlib.sha256()
        for id_, full, alone in self._table.values("id", "text", "alone"):
            for text in map(str.encode, (id_, full, full if alone is None else alone)):
                total.update(b"%d\0%b" % (len(text), text))
        return total.hexdigest()

    def check(self) -> CorpusFacts:
        """Check every row once, so that errors show before anything is computed.

        Raises:
            UserError: an id is repeated, or no row has any text.
        """
        ids = np.empty(len(self), dtype=np.uint64)
        text_ids = np.empty((len(self), 2), dtype=np.uint64)
        odd, plain = OddRows(self.path), isinstance(self._rows, PlainLineRows)
        for index, (line, id_, full, alone) in enumerate(self._table.values("line", "id", "text", "alone")):
            ids[index] = exact_id(id_)
            of_full = text_id(full)
            text_ids[index] = of_full, of_full if alone is None else text_id(alone)
            unlikely = [JSON_LOOKING] if plain and full.lstrip().startswith('{"') else []
            for remark in (*of_text(full), *([] if full.strip() else [NO_TEXT]), *unlikely):
                odd.add(remark, line)
        if odd.counts().get(NO_TEXT) == len(self):
            raise UserError(f"{self.path}: no row has any text; wanted {self._wanted}")
        self._refuse_duplicates(ids)
        return CorpusFacts(odd, text_ids)

    def _refuse_duplicates(self, ids: np.ndarray) -> None:
        again = repeats(ids)
        if len(again):
            index = int(again[0])
            where = f"{self.path}, {place(self.line, index, len(self))}"
            raise UserError(f"{where}: _id {self.id(index)!r} stands in the file twice ({len(again)} such rows)")

    @cached_property
    def _table(self) -> Table:
        kind = f"{self._rows.form}-{'-'.join(self._keys)}".replace(" ", "-")
        return open_table(Recipe(kind, self.path, self._rows.files, _SCHEMA, self._build))[0]

    def _build(self, writer: TableWriter) -> Found:
        row = None
        for row in read_rows(self._rows):
            try:
                id_, text, alone = self._parse(row)
            except RowError as error:
                raise UserError(f"{self.path}, {row.place}: {error}") from None
            writer.add((row.line, id_, text, None if alone == text else alone))
        if row is None:
            raise UserError(f"{self.path}: holds no rows; wanted {self._wanted}")
        return Found()

    def _parse(self, row: Row) -> tuple[str, str, str]:
        """Return (id, title with text, text) of a row."""
        if isinstance(row.value, RowError):
            raise row.value
        if isinstance(self._rows, PlainLineRows):
            return str(row.line), row.value, row.value
        id_, value = text_row(row.value, self._keys)
        return id_, document_text(value), value["text"]


class BeirTexts(Corpus):
    """``corpus.jsonl`` or ``queries.jsonl`` of a BEIR folder for training: JSON lines with the id under ``_id``."""

    _keys = ("_id",)
    _wanted = WANTED

    def __init__(self, folder: Path, name: str) -> None:
        path = text_file(folder, name)
        self.path, self._rows = str(path), JsonLineRows(path)


def file_digest(*paths: Path | str | os.PathLike[str]) -> str:
    """Return the SHA-256 over the bytes of the files and their names."""
    total = hashlib.sha256()
    for path in map(Path, paths):
        with path.open("rb") as file:
            total.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()
