"""Texts to encode, with ids: a BEIR folder, JSON lines, Parquet or hub data with ``_id``, ``text``, or plain lines."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes.beir import WANTED, document_text, is_beir, text_row
from megatron_embed.recipes.duplicates import repeats
from megatron_embed.recipes.json_text import RowError, decode
from megatron_embed.recipes.odd_rows import JSON_LOOKING, NO_TEXT, OddRows, of_text
from megatron_embed.recipes.rows import JsonLineRows, Rows, open_rows, place
from megatron_embed.recipes.text_ids import exact_id, text_id

_ID_KEYS = ("_id", "id", "docid")
_WANTED = f"texts: {WANTED}, a row, or plain lines"


class Texts(Protocol):
    """What :func:`megatron_embed.recipes.encode_corpus.encode_texts` encodes. Rows are read when they are needed."""

    path: str

    def __len__(self) -> int: ...

    def read(self, first: int, last: int) -> tuple[list[str], list[str]]:
        """Ids and texts of the rows ``first`` to ``last - 1``."""

    def prompts(self, first: int, last: int) -> list[str] | None:
        """Prompts of these rows, or None: the kind's own."""

    def digest(self) -> str:
        """Changes with any text, id or prompt."""


@dataclass(frozen=True)
class CorpusFacts:
    """What :meth:`Corpus.check` saw.

    Attributes:
        odd: rows that are kept as they are, without any text, with NUL characters, ….
        text_ids: ``[rows, 2]`` uint64: of title with text, and of the text alone.
    """

    odd: OddRows
    text_ids: np.ndarray


class Corpus:
    """A file of texts, by offsets: 16 bytes a row, mapped into memory where they are kept.

    Args:
        path: a BEIR folder, a file of objects with ``_id``, ``text`` and perhaps ``title``, ``hf://org/name[/config]``
            with such rows, or a file of plain lines, whose ids are the line numbers from 1.
        kind: of a BEIR folder, ``passage`` means its corpus and ``query`` its queries.

    Raises:
        UserError: nothing there, or none of these forms.
    """

    def __init__(self, path: str | Path, kind: str = "passage") -> None:
        beir = is_beir(path)
        if beir:
            path = Path(path) / ("queries.jsonl" if kind == "query" else "corpus.jsonl")
        elif Path(path).is_dir():
            raise UserError(f"{path}: a folder, but no BEIR folder; wanted corpus.jsonl and queries.jsonl, or a file")
        self.path = str(path)
        self.rows: Rows = open_rows(self.path, _WANTED)
        self.form = self.rows.form
        if not beir and isinstance(self.rows, JsonLineRows) and not self.rows.raw(0).lstrip().startswith(b"{"):
            self.form = "plain lines"

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, first: int, last: int) -> tuple[list[str], list[str]]:
        """Ids and texts, title first.

        Raises:
            UserError: a row that holds no id or no text; file and line are named.
        """
        pairs = [self._parse(index)[:2] for index in range(first, last)]
        return [id_ for id_, _ in pairs], [text for _, text in pairs]

    def read_id(self, index: int) -> str:
        """The id of one row."""
        return self._parse(index)[0]

    def prompts(self, first: int, last: int) -> None:
        """A corpus has no prompts of its own."""

    def digest(self) -> str:
        """SHA-256 of the file, or of the files in which ``datasets`` keeps hub data.

        Of data that it keeps in memory, of the rows: no file stands for these from one run to the next.

        Raises:
            UserError: of data in memory, a row that cannot be used.
        """
        if self.rows.files:
            return file_digest(*self.rows.files)
        total = hashlib.sha256()
        for index in range(len(self)):
            for text in map(str.encode, self._parse(index)):
                total.update(b"%d\0%b" % (len(text), text))
        return total.hexdigest()

    def check(self) -> CorpusFacts:
        """Read every row once, so that what is wrong shows before anything is computed.

        Raises:
            UserError: a row that cannot be used, an id that stands there twice, or no text at all.
        """
        ids = np.empty(len(self), dtype=np.uint64)
        text_ids = np.empty((len(self), 2), dtype=np.uint64)
        odd = OddRows(self.path)
        for index in range(len(self)):
            id_, full, alone = self._parse(index)
            ids[index] = exact_id(id_)
            text_ids[index] = [text_id(full), text_id(alone)]
            unlikely = [JSON_LOOKING] if self.form == "plain lines" and full.lstrip().startswith('{"') else []
            for remark in (*of_text(full), *([] if full.strip() else [NO_TEXT]), *unlikely):
                odd.add(remark, self.rows.line(index))
        if odd.counts().get(NO_TEXT) == len(self):
            raise UserError(f"{self.path}: no row has any text; wanted {_WANTED}")
        self._refuse_duplicates(ids)
        return CorpusFacts(odd, text_ids)

    def _refuse_duplicates(self, ids: np.ndarray) -> None:
        again = repeats(ids)
        if len(again):
            index = int(again[0])
            where = f"{self.path}, {place(self.rows, index)}"
            raise UserError(f"{where}: _id {self._parse(index)[0]!r} stands in the file twice ({len(again)} such rows)")

    def _parse(self, index: int) -> tuple[str, str, str]:
        """(id, title with text, text)"""
        try:
            if self.form == "plain lines":
                assert isinstance(self.rows, JsonLineRows)
                text = decode(self.rows.raw(index)).removesuffix("\r")
                return str(self.rows.line(index)), text, text
            return _parse_row(self.rows[index])
        except RowError as error:
            raise UserError(f"{self.path}, {place(self.rows, index)}: {error}") from None


def _parse_row(row: Any) -> tuple[str, str, str]:
    id_, row = text_row(row, _ID_KEYS)
    return id_, document_text(row), row["text"]


def file_digest(*paths: Path | str | os.PathLike[str]) -> str:
    """SHA-256 over the bytes of the files and their names."""
    total = hashlib.sha256()
    for path in map(Path, paths):
        with path.open("rb") as file:
            total.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()
