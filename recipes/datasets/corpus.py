"""Texts to encode, with ids: a BEIR folder, JSON lines, Parquet or hub data with ``_id``, ``text``, or plain lines."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow

from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes.datasets.duplicates import repeats
from megatron_embed.recipes.datasets.json_text import RowError
from megatron_embed.recipes.datasets.odd_rows import JSON_LOOKING, NO_TEXT, OddRows, of_text
from megatron_embed.recipes.datasets.pair import kind_of
from megatron_embed.recipes.datasets.rows import (
    JsonLineRows,
    PlainLineRows,
    Row,
    Rows,
    check_file,
    open_rows,
    place,
    read_rows,
)
from megatron_embed.recipes.datasets.table import Found, Recipe, Table, TableWriter, open_table
from megatron_embed.recipes.datasets.text_ids import exact_id, text_id

WANTED = "an object with _id, text and, for documents, title"
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

    def texts(self) -> Iterator[tuple[str, str]]:
        """Return an iterator over (id, text) of all rows; texts begin with the title."""
        return self._table.values("id", "text")

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

    @property
    def odd(self) -> OddRows:
        """Rows that are kept as they are but look odd: without text, with NUL characters, …."""
        return OddRows.again(self.path, self._opened[1].facts["odd"])

    @property
    def id_numbers(self) -> np.ndarray:
        """``[rows]`` uint64: :func:`exact_id` of each row's id."""
        return self._opened[1].arrays["ids"]

    @property
    def text_ids(self) -> np.ndarray:
        """``[rows, 2]`` uint64: identity of title with text, and of the text alone."""
        return self._opened[1].arrays["text_ids"]

    @cached_property
    def _opened(self) -> tuple[Table, Found]:
        kind = f"{self._rows.form}-{'-'.join(self._keys)}".replace(" ", "-")
        return open_table(Recipe(kind, self.path, self._rows.files, _SCHEMA, self._build))

    @property
    def _table(self) -> Table:
        return self._opened[0]

    def _build(self, writer: TableWriter) -> Found:
        lines, ids, text_ids, odd = array("q"), array("Q"), array("Q"), OddRows(self.path)
        plain = isinstance(self._rows, PlainLineRows)
        for row in read_rows(self._rows):
            try:
                id_, text, alone = self._parse(row)
            except RowError as error:
                raise UserError(f"{self.path}, {row.place}: {error}") from None
            writer.add((row.line, id_, text, None if alone == text else alone))
            lines.append(row.line)
            ids.append(exact_id(id_))
            text_ids.append(text_id(text))
            text_ids.append(text_ids[-1] if alone == text else text_id(alone))
            unlikely = [JSON_LOOKING] if plain and text.lstrip().startswith('{"') else []
            for remark in (*of_text(text), *([] if text.strip() else [NO_TEXT]), *unlikely):
                odd.add(remark, row.line)
        if not ids:
            raise UserError(f"{self.path}: holds no rows; wanted {self._wanted}")
        if odd.counts().get(NO_TEXT) == len(ids):
            raise UserError(f"{self.path}: no row has any text; wanted {self._wanted}")
        found = np.frombuffer(ids, dtype=np.uint64)
        if len(again := repeats(found)):
            where = f"{self.path}, {place(lines.__getitem__, int(again[0]), len(ids))}"
            id_ = self._parse(next(islice(self._rows.scan(), int(again[0]), None)))[0]
            found_twice = f"_id {id_!r} stands in the file twice ({len(again)} such rows)"
            raise UserError(f"{where}: {found_twice}; give every row an id of its own")
        return Found({"ids": found, "text_ids": np.frombuffer(text_ids, np.uint64).reshape(-1, 2)}, {"odd": odd.found})

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


def is_beir(path: str | Path) -> bool:
    """Return whether ``path`` is a folder with a corpus and queries."""
    return (Path(path) / "corpus.jsonl").is_file() and (Path(path) / "queries.jsonl").is_file()


def document_text(row: dict[str, Any]) -> str:
    """Return title and text joined as BEIR joins them."""
    return f"{row.get('title') or ''} {row.get('text') or ''}".strip()


def id_of(row: Mapping[str, Any], key: str) -> str:
    """Return a row's id as text.

    Raises:
        RowError: the id is neither text nor a whole number; ``null`` would become the same id for every such row.
    """
    id_ = row[key]
    if isinstance(id_, bool) or not isinstance(id_, str | int):
        raise RowError(f"{key!r}: found {json.dumps(id_, default=str)[:60]}; wanted text or a whole number below 2^64")
    return str(id_)


def text_row(row: Any, keys: Sequence[str] = ("_id",)) -> tuple[str, dict[str, Any]]:
    """Return (id, row) of a document or query.

    Args:
        keys: keys that may hold the id.

    Raises:
        RowError: the row is no object, lacks an id or a text, or has one of another type.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"found {kind_of(row)}; wanted {WANTED}")
    key = next((key for key in keys if key in row), None)
    if key is None or "text" not in row:
        raise RowError(f"found {', '.join(map(str, row)) or 'nothing'}; wanted {WANTED}")
    for name, value in (("text", row["text"]), ("title", row.get("title") or "")):
        if not isinstance(value, str):
            raise RowError(f"{name!r}: found {kind_of(value)}; wanted text")
    return id_of(row, key), dict(row)


def text_file(folder: Path, name: str) -> Path:
    """Return the path of ``corpus.jsonl`` or ``queries.jsonl``.

    Raises:
        UserError: the file is missing or does not hold JSON lines.
    """
    path = folder / name
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; wanted a BEIR folder with corpus.jsonl, queries.jsonl, qrels/")
    if not path.is_file():
        raise UserError(f"{path}: no such file; wanted a BEIR folder with corpus.jsonl, queries.jsonl and qrels/")
    check_file(str(path))
    return path
