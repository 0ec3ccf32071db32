"""Rows of data files, read one after the other and never all in memory at once.

:meth:`Rows.scan` yields an unusable row's error as its value, so that a caller can name the line, and count or list the
errors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.files.progress import progress
from megatron_embed.recipes.datasets.foreign_files import refuse_foreign
from megatron_embed.recipes.datasets.json_lists import JsonList, is_object
from megatron_embed.recipes.datasets.json_text import BOM, RowError, decode, parse_json, value_or_error

_SLOW = 64 << 20  # bytes of a file that takes seconds to read, and so gets a progress bar
_TOGETHER = 1000  # rows between updates of the bar; rows of a table that are converted to Python at a time


class Row(NamedTuple):
    """A row and its place.

    Attributes:
        line: the line of the file on which it begins, from 1; for a table, the number of the row.
        value: the content of the row, or the :class:`RowError` that explains why it has none.
        entry: the number of the row among all rows, from 1, if other rows share its line; otherwise 0.
    """

    line: int
    value: Any
    entry: int = 0

    @property
    def place(self) -> str:
        """The place of the row, for messages."""
        return f"line {self.line}, entry {self.entry}" if self.entry else f"line {self.line}"


class Rows(Protocol):
    """The rows of a file.

    Attributes:
        form: name of the recognised form.
        files: the files that hold the rows.
        bytes, done: bytes to read, and those that the latest :meth:`scan` has read.
    """

    path: str
    form: str
    files: list[Path]
    bytes: int
    done: int

    def scan(self) -> Iterator[Row]:
        """Yield every row in order.

        Raises:
            UserError: the file as a whole cannot be read.
        """


def open_rows(path: str) -> Rows:
    """Open a JSONL, JSON or Parquet file, or ``hf://org/name[/config]``, and recognise its form by its beginning.

    Raises:
        UserError: the file does not exist or has none of these forms.
    """
    if path.startswith("hf://"):
        return TableRows.from_hub(path)
    head = check_file(path)
    if head.startswith(b"PAR1"):
        return TableRows.from_parquet(path)
    head = head.lstrip()
    # Match only arrays of objects and empty arrays, because a line of plain text may also begin with a bracket.
    if re.match(rb"\[\s*([{\]]|$)", head):
        return JsonArrayRows(path)
    if re.match(rb'\{\s*"(corpus|data)"\s*:', head) and is_object(Path(path)):
        return JsonObjectRows(path)
    return JsonLineRows(path)


def read_rows(rows: Rows) -> Iterator[Row]:
    """Yield every row; show a progress bar for a large file."""
    if rows.bytes < _SLOW:
        yield from rows.scan()
        return
    with progress(f"reading {rows.path}", rows.bytes, unit="byte") as advance:
        shown = 0
        for number, row in enumerate(rows.scan(), start=1):
            yield row
            if number % _TOGETHER == 0:
                advance(rows.done - shown)
                shown = rows.done
        advance(rows.bytes - shown)


def place(line: Callable[[int], int], index: int, count: int) -> str:
    """Return the place of row number ``index`` of ``count``, for messages, in the form of :attr:`Row.place`."""
    shared = any(line(other) == line(index) for other in (index - 1, index + 1) if 0 <= other < count)
    return Row(line(index), None, index + 1 if shared else 0).place


def check_file(path: str) -> bytes:
    """Return the beginning of a file that may hold rows, without a BOM.

    Raises:
        UserError: the file does not exist, has another encoding, is compressed or binary, or is a table in text.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file or folder; wanted JSON lines, a JSON list, Parquet, or a BEIR folder")
    with open(path, "rb") as file:
        head = file.read(4096).removeprefix(BOM)
    if not head.startswith(b"PAR1"):
        refuse_foreign(path, head)
    return head


def hub_parts(path: str) -> list[str]:
    """Return ``org``, ``name`` and perhaps ``config`` of ``hf://org/name[/config]``.

    Raises:
        UserError: the path has another form.
    """
    parts = path.removeprefix("hf://").split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise UserError(f"{path}: not an address of hub data; wanted hf://org/name or hf://org/name/config")
    return parts


class _FileRows:
    """The rows of one text file."""

    def __init__(self, path: str | Path) -> None:
        self.path, self.files = str(path), [Path(path)]
        self.bytes, self.done = os.path.getsize(path), 0


class JsonLineRows(_FileRows):
    """JSON lines; blank lines are skipped."""

    form = "JSON lines"

    def scan(self) -> Iterator[Row]:
        for line, raw in self.lines():
            yield Row(line, self._value(raw))

    def _value(self, raw: bytes) -> Any:
        return value_or_error(parse_json, raw)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield (line, bytes without the line break) of every line that is not blank."""
        self.done = 0
        with open(self.path, "rb") as file:
            for line, raw in enumerate(file, start=1):
                self.done += len(raw)
                text = raw.removeprefix(BOM) if line == 1 else raw
                if text and not text.isspace():
                    yield line, text.removesuffix(b"\n")

    def begins_with_object(self) -> bool:
        """Return whether the first line begins with an object."""
        return next(self.lines(), (0, b""))[1].lstrip().startswith(b"{")


class PlainLineRows(JsonLineRows):
    """Lines of plain text; blank lines are skipped."""

    form = "plain lines"

    def _value(self, raw: bytes) -> Any:
        return value_or_error(lambda raw: decode(raw).removesuffix("\r"), raw)


class JsonArrayRows(_FileRows):
    """A JSON array of rows; each row is parsed by itself."""

    form, _in_object = "JSON array", False

    def scan(self) -> Iterator[Row]:
        found, before = JsonList(self.files[0], in_object=self._in_object), 0
        neighbours = pairwise(chain(found.entries(), [(0, None)]))
        for number, ((line, value), (after, _)) in enumerate(neighbours, start=1):
            self.done = found.position
            yield Row(line, value, number if line in (before, after) else 0)
            before = line


class JsonObjectRows(JsonArrayRows):
    """An object ``{"corpus": …, "data": [rows]}``."""

    form, _in_object = "JSON object with corpus and data", True

    def head(self) -> Any:
        """Return the object without its rows. Read the whole file, because keys may follow the rows."""
        found = JsonList(self.files[0], in_object=True)
        for _ in found.entries():
            pass
        return found.around


class TableRows:
    """The rows of Arrow tables: of a Parquet file or of hub data that `datasets` keeps.

    Args:
        blocks: yields the Arrow tables or record batches that together hold all rows.
    """

    def __init__(self, path: str, blocks: Callable[[], Iterator[Any]], form: str, files: list[Path]) -> None:
        self.path, self.form, self.files, self._blocks = path, form, files, blocks
        self.bytes, self.done = sum(file.stat().st_size for file in files), 0

    @classmethod
    def from_parquet(cls, path: str) -> TableRows:
        """Open a Parquet file; refuse a damaged one, or one with a column type that `datasets` lacks."""
        import pyarrow.parquet

        def blocks() -> Iterator[Any]:
            with _readable(path), pyarrow.parquet.ParquetFile(path) as file:
                yield from file.iter_batches(_TOGETHER)

        with _readable(path), pyarrow.parquet.ParquetFile(path) as file:
            _quiet_datasets().Features.from_arrow_schema(file.schema_arrow)
        return cls(path, blocks, "Parquet", [Path(path)])

    @classmethod
    def from_hub(cls, path: str) -> TableRows:
        """Open the train split of ``hf://org/name[/config]``, from the hub or its cache."""
        parts = hub_parts(path)
        try:
            table = _quiet_datasets().load_dataset("/".join(parts[:2]), *parts[2:], split="train")
        except Exception as error:  # network, missing repository or split, …: datasets has no common base class
            told = " ".join(str(error).split())
            raise UserError(
                f"{path}: cannot be loaded ({type(error).__name__}: {told}); check its name and the network"
            ) from None
        files = [Path(file["filename"]) for file in table.cache_files]

        def blocks() -> Iterator[Any]:
            for block in table.with_format("arrow").iter(_TOGETHER):
                _refuse_damaged(path, files, block)
                yield block

        return cls(path, blocks, "datasets", files)

    def scan(self) -> Iterator[Row]:
        line = self.done = 0
        for block in self._blocks():
            for value in _values(block):
                line += 1
                yield Row(line, value)
            self.done = min(self.bytes, self.done + block.nbytes)


def _refuse_damaged(path: str, files: list[Path], block: Any) -> None:
    """Refuse damaged Arrow data; it is mapped into memory unchecked, and a wrong offset leads out of it."""
    import pyarrow

    try:
        block.validate(full=True)
    except pyarrow.ArrowInvalid as error:
        told = " ".join(str(error).split())
        if "UTF8" not in told:  # the reader of the row reports that one
            where = ", ".join(map(str, files)) or "memory"
            raise UserError(f"{path}: damaged in {where} ({told}); remove it there, and fetch it again") from None


def _values(block: Any) -> list[Any]:
    """Return the rows of a table as Python values, or the :class:`RowError` of a row that Python cannot hold."""
    try:
        return block.to_pylist()
    except UnicodeDecodeError as error:  # Arrow does not check its texts
        found = f"not UTF-8: byte 0x{error.object[error.start]:02x} in a column of text; wanted text in UTF-8"
    except (OverflowError, ValueError) as error:  # a date outside Python's range
        found = f"a value that cannot be read ({error})"
    if block.num_rows == 1:
        return [RowError(found)]
    return [value for index in range(block.num_rows) for value in _values(block.slice(index, 1))]


@contextmanager
def _readable(path: str) -> Iterator[None]:
    """Turn errors of pyarrow or `datasets` about a Parquet file into a :class:`UserError`."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError is about the schema
        raise UserError(
            f"{path}: not a readable Parquet file ({' '.join(str(error).split())}); write it again"
        ) from None


def _quiet_datasets() -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets
