"""Rows of data files, one by one and never all in memory: what form a file has, where each row lies, what it says.

A row's problem is part of what it says: :meth:`Rows.scan` yields it in the row's place, so that a caller can name the
line, count the problems or list them.
"""

from __future__ import annotations

import mmap
import os
import re
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes.data_index import Index, indexed, stamps
from megatron_embed.recipes.foreign_files import refuse_foreign
from megatron_embed.recipes.json_entries import entries_of_array, entries_of_data, is_object
from megatron_embed.recipes.json_text import BOM, RowError, parse_json


class Rows(Protocol):
    """A file's rows. ``form`` names what was recognised, ``files`` are those that they lie in."""

    path: str
    form: str
    files: list[Path]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any:
        """The row's plain value; :class:`RowError` where it has none."""

    def line(self, index: int) -> int:
        """The line of the file on which the row begins, from 1; of a table, its number."""

    def scan(self) -> Iterator[Any]:
        """Every row in order: its value, or the :class:`RowError` that says why it has none."""

    def check_unchanged(self) -> None:
        """What is found in rows that were opened before a change must not be kept as the files' after it.

        Raises:
            UserError: a file was written to since it was opened.
        """


def open_rows(path: str, wanted: str = "training pairs") -> Rows:
    """Open a JSONL, JSON or Parquet file, or ``hf://org/name[/config]``; the form is recognised.

    Args:
        wanted: what the rows are to hold, for the message about a file without any.

    Raises:
        UserError: no such file, no rows, or none of these forms.
    """
    rows = _recognised(path)
    if not len(rows):
        raise UserError(f"{path}: holds no rows; wanted {wanted}")
    return rows


def place(rows: Rows, index: int) -> str:
    """Where a row stands, for messages; on a line with others, which of all rows it is, too."""
    line = rows.line(index)
    beside = (other for other in (index - 1, index + 1) if 0 <= other < len(rows))
    return f"line {line}, entry {index + 1}" if any(rows.line(other) == line for other in beside) else f"line {line}"


def _recognised(path: str) -> Rows:
    if path.startswith("hf://"):
        return TableRows.from_hub(path)
    head = check_file(path)
    if head.startswith(b"PAR1"):
        return TableRows.from_parquet(path)
    head = head.lstrip()
    if re.match(rb"\[\s*([{\]]|$)", head):  # of objects, or empty: a line of text may begin with a bracket, too
        return JsonArrayRows(path)
    if re.match(rb'\{\s*"(corpus|data)"\s*:', head) and is_object(Path(path)):
        return JsonObjectRows(path)
    return JsonLineRows(path)


def check_file(path: str) -> bytes:
    """The beginning of a file that may hold rows, without a BOM.

    Raises:
        UserError: no such file, or one in another encoding, compressed, binary, or a table in text.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file or folder; wanted JSON lines, a JSON list, Parquet, or a BEIR folder")
    with open(path, "rb") as file:
        head = file.read(4096).removeprefix(BOM)
    if not head.startswith(b"PAR1"):
        refuse_foreign(path, head)
    return head


def hub_parts(path: str) -> list[str]:
    """``org``, ``name`` and perhaps ``config`` of ``hf://org/name[/config]``.

    Raises:
        UserError: it is of another form.
    """
    parts = path.removeprefix("hf://").split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise UserError(f"{path}: wanted hf://org/name or hf://org/name/config")
    return parts


_SCANNED = 1 << 20  # bytes read at once where all rows are read
_BLANK = 64  # bytes of white space that may make a blank line


class _OffsetRows:
    """Rows of JSON text through an index of byte offsets: 16 to 24 bytes a row, mapped into memory where it is kept."""

    form: str
    _kind: str  # tells its index from others of the same file

    def __init__(self, path: str | Path) -> None:
        self.path, self.files = str(path), [Path(path)]
        self._opened = stamps(self.files)
        self._file = os.open(self.path, os.O_RDONLY)
        self._index = indexed(self._kind, self.files, self._found)
        arrays = self._index.arrays
        self._starts, self._ends, self._lines = arrays["starts"], arrays["ends"], arrays.get("lines")

    def check_unchanged(self) -> None:
        _check_unchanged(self.path, self.files, self._opened)

    def _found(self) -> Index:
        """``starts``, ``ends`` and, where these are not all lines from the first, ``lines`` (from 0)."""
        raise NotImplementedError

    def __del__(self) -> None:
        if (file := self.__dict__.pop("_file", None)) is not None:
            os.close(file)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Any:
        return parse_json(self.raw(index))

    def raw(self, index: int) -> bytes:
        """The row's bytes, without the line break."""
        start, end = int(self._starts[index]), int(self._ends[index])
        return os.pread(self._file, end - start, start)  # pread: no shared position among threads

    def line(self, index: int) -> int:
        return int(index if self._lines is None else self._lines[index]) + 1

    def scan(self) -> Iterator[Any]:
        first = 0
        while first < len(self):  # a read for many rows: one for each takes as long as parsing them
            start = int(self._starts[first])
            last = max(first + 1, int(np.searchsorted(self._ends, start + _SCANNED, side="right")))
            data = os.pread(self._file, int(self._ends[last - 1]) - start, start)
            bounds = ((offsets[first:last] - start).tolist() for offsets in (self._starts, self._ends))
            for index, (begin, end) in enumerate(zip(*bounds, strict=True), start=first):
                try:
                    yield parse_json(data[begin:end])
                except RowError:
                    yield from _each(self, [index])  # whose message knows the row's lines
            first = last


class JsonLineRows(_OffsetRows):
    """JSON lines. Blank ones are no rows."""

    form, _kind = "JSON lines", "lines"

    def _found(self) -> Index:
        return _filled_lines(self._file)


class JsonArrayRows(_OffsetRows):
    """A JSON array of rows. Every row is parsed by itself, when it is wanted."""

    form, _kind = "JSON array", "array"

    def _found(self) -> Index:
        return entries_of_array(self._file, self.files[0])

    def __getitem__(self, index: int) -> Any:
        return parse_json(self.raw(index), self.line(index))


class JsonObjectRows(JsonArrayRows):
    """``{"corpus": …, "data": [rows]}``. ``head`` is all but the rows."""

    form, _kind = "JSON object with corpus and data", "object"

    def _found(self) -> Index:
        return entries_of_data(self._file, self.files[0])

    @property
    def head(self) -> Any:
        return self._index.facts["head"]


def _filled_lines(file: int) -> Index:
    """``starts`` and ``ends`` of the lines that are not blank, and ``lines``, which these are (from 0).

    Only a file with blank lines needs the last.
    """
    starts, ends = _line_offsets(file)
    filled = ends > starts
    if filled.all():
        return Index({"starts": starts, "ends": ends})
    return Index({"starts": starts[filled], "ends": ends[filled], "lines": np.flatnonzero(filled)})


def _line_offsets(file: int, chunk: int = 1 << 22) -> tuple[np.ndarray, np.ndarray]:
    """(first byte, end) of every line, as int64; blank lines come out empty, a BOM belongs to no line."""
    breaks, position = array("q"), 0
    while data := os.pread(file, chunk, position):
        found = np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == ord("\n")) + position
        breaks.frombytes(found.astype(np.int64).tobytes())
        position += len(data)
    breaks.append(position)
    ends = np.frombuffer(breaks, dtype=np.int64)
    starts = np.zeros_like(ends)
    np.add(ends[:-1], 1, out=starts[1:])
    if os.pread(file, len(BOM), 0) == BOM:
        starts[0] = len(BOM)
    lengths = ends - starts
    short = np.flatnonzero((lengths > 0) & (lengths <= _BLANK))
    for line in short[_begins_with_space(file, starts[short])]:  # "\r\n" alone is blank too
        if os.pread(file, int(lengths[line]), int(starts[line])).isspace():
            ends[line] = starts[line]
    if starts[-1] == ends[-1]:  # the last line break ends a line, it does not begin one
        starts, ends = starts[:-1], ends[:-1]
    return starts, ends


def _begins_with_space(file: int, starts: np.ndarray) -> np.ndarray:
    """Whether white space is at each of these places of a file; without a read for each, of which there may be many."""
    if not len(starts):
        return np.zeros(0, dtype=bool)
    with mmap.mmap(file, 0, access=mmap.ACCESS_READ) as content:
        first = np.frombuffer(content, dtype=np.uint8)[starts]
    return np.isin(first, np.frombuffer(b" \t\r\v\f", dtype=np.uint8))


class TableRows:
    """Rows of an Arrow table that `datasets` keeps on disk and maps into memory."""

    def __init__(self, path: str, table: Any, form: str, files: list[Path]) -> None:
        self.path, self.form, self.files, self._table = path, form, files, table
        self._opened = stamps(files)

    @classmethod
    def from_parquet(cls, path: str) -> TableRows:
        """A Parquet file; a damaged one is a :class:`UserError`."""
        import pyarrow
        import pyarrow.parquet

        try:
            rows = pyarrow.parquet.read_metadata(path).num_rows  # the footer: where a file cut short shows
            # datasets cannot read a file without rows
            table = _quiet_datasets().Dataset.from_parquet(path) if rows else []
            return cls(path, table, "Parquet", [Path(path)])
        except (pyarrow.ArrowException, OSError, ValueError, _datasets_error()) as error:  # ValueError: its schema
            reason = " ".join(str(error.__cause__ or error).split())
            raise UserError(f"{path}: not a readable Parquet file ({reason})") from None

    @classmethod
    def from_hub(cls, path: str) -> TableRows:
        """The train split of ``hf://org/name[/config]``, from the hub or its cache."""
        parts = hub_parts(path)
        try:
            table = _quiet_datasets().load_dataset("/".join(parts[:2]), *parts[2:], split="train")
        except Exception as error:  # network, absent repository, absent split, …: datasets has no common base class
            raise UserError(f"{path}: cannot be loaded ({type(error).__name__}: {error})") from None
        return cls(path, table, "datasets", [Path(file["filename"]) for file in table.cache_files])

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Any:
        try:
            return self._table[index]
        except UnicodeDecodeError as error:  # Arrow does not look into its texts
            raise RowError(f"not UTF-8: byte 0x{error.object[error.start]:02x} in a column of text") from None
        except (OverflowError, ValueError) as error:  # a date beyond Python's
            raise RowError(f"a value that cannot be read ({error})") from None

    def line(self, index: int) -> int:
        return index + 1

    def check_unchanged(self) -> None:
        _check_unchanged(self.path, self.files, self._opened)

    def scan(self) -> Iterator[Any]:
        for first in range(0, len(self), 1000):  # row by row is 20 times slower
            try:
                block = self._table[first : first + 1000]
            except (OverflowError, ValueError):
                yield from _each(self, range(first, min(first + 1000, len(self))))
                continue
            names = list(block)
            for values in zip(*block.values(), strict=True):
                yield dict(zip(names, values, strict=True))


def _check_unchanged(path: str, files: list[Path], before: list[Any]) -> None:
    if stamps(files) != before:
        raise UserError(f"{path}: was written to while it was read; start again when it is whole")


def _each(rows: Rows, indices: Iterable[int]) -> Iterator[Any]:
    """As :meth:`Rows.scan`, of some rows, one by one."""
    for index in indices:
        try:
            yield rows[index]
        except RowError as error:
            yield error


def _quiet_datasets() -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets


def _datasets_error() -> type[Exception]:
    from datasets.exceptions import DatasetGenerationError

    return DatasetGenerationError
