"""Rows of data files, read one after the other and never all in memory.

A row's problem is part of what it says: :meth:`Rows.scan` yields it in the row's place, so that a caller can name the
line, count the problems or list them.
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
from megatron_embed.conversion.io.long_work import progress
from megatron_embed.recipes.datasets.foreign_files import refuse_foreign
from megatron_embed.recipes.datasets.json_lists import JsonList, is_object
from megatron_embed.recipes.datasets.json_text import BOM, RowError, decode, parse_json

_SLOW = 64 << 20  # bytes whose reading takes some seconds, so that it is shown how far it is
_TOGETHER = 1000  # rows after which this is shown; rows of a table that are made Python's together


class Row(NamedTuple):
    """A row, and where it stands.

    Attributes:
        line: of the file, on which it begins, from 1; of a table, its number.
        value: what it says, or the :class:`RowError` that tells why it says nothing.
        entry: which of all rows it is, from 1, where others stand on its line; otherwise 0.
    """

    line: int
    value: Any
    entry: int = 0

    @property
    def place(self) -> str:
        """Where it stands, for messages."""
        return f"line {self.line}, entry {self.entry}" if self.entry else f"line {self.line}"


class Rows(Protocol):
    """A file's rows.

    Attributes:
        form: names what was recognised.
        files: those that the rows lie in.
        bytes, done: how much there is to read, and how much of it the latest :meth:`scan` has read.
    """

    path: str
    form: str
    files: list[Path]
    bytes: int
    done: int

    def scan(self) -> Iterator[Row]:
        """Every row in order.

        Raises:
            UserError: the file as a whole cannot be read.
        """


def open_rows(path: str) -> Rows:
    """Open a JSONL, JSON or Parquet file, or ``hf://org/name[/config]``; the form is recognised by its beginning.

    Raises:
        UserError: no such file, or none of these forms.
    """
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


def read_rows(rows: Rows) -> Iterator[Row]:
    """Every row; of a large file, how far it is read is shown."""
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
    """Where row number ``index`` of ``count`` stands, for messages, as :attr:`Row.place`."""
    shared = any(line(other) == line(index) for other in (index - 1, index + 1) if 0 <= other < count)
    return Row(line(index), None, index + 1 if shared else 0).place


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


class _FileRows:
    """Rows of one file of text."""

    def __init__(self, path: str | Path) -> None:
        self.path, self.files = str(path), [Path(path)]
        self.bytes, self.done = os.path.getsize(path), 0


class JsonLineRows(_FileRows):
    """JSON lines. Blank ones are no rows."""

    form = "JSON lines"

    def scan(self) -> Iterator[Row]:
        for line, raw in self.lines():
            yield Row(line, self._value(raw))

    def _value(self, raw: bytes) -> Any:
        return _value_or_error(parse_json, raw)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(line, bytes without the line break) of every line that is not blank."""
        self.done = 0
        with open(self.path, "rb") as file:
            for line, raw in enumerate(file, start=1):
                self.done += len(raw)
                text = raw.removeprefix(BOM) if line == 1 else raw
                if text and not text.isspace():
                    yield line, text.removesuffix(b"\n")

    def begins_with_object(self) -> bool:
        """Whether the first line does."""
        return next(self.lines(), (0, b""))[1].lstrip().startswith(b"{")


class PlainLineRows(JsonLineRows):
    """Lines of plain text. Blank ones are no rows."""

    form = "plain lines"

    def _value(self, raw: bytes) -> Any:
        return _value_or_error(lambda raw: decode(raw).removesuffix("\r"), raw)


class JsonArrayRows(_FileRows):
    """A JSON array of rows, each of which is parsed by itself."""

    form, _in_object = "JSON array", False

    def scan(self) -> Iterator[Row]:
        found, before = JsonList(self.files[0], in_object=self._in_object), 0
        neighbours = pairwise(chain(found.entries(), [(0, b"")]))
        for number, ((line, raw), (after, _)) in enumerate(neighbours, start=1):
            self.done = found.position
            yield Row(line, _value_or_error(parse_json, raw, line), number if line in (before, after) else 0)
            before = line


class JsonObjectRows(JsonArrayRows):
    """``{"corpus": …, "data": [rows]}``."""

    form, _in_object = "JSON object with corpus and data", True

    def head(self) -> Any:
        """The object without its rows. Reads all of the file, for some of it may stand behind them."""
        found = JsonList(self.files[0], in_object=True)
        for _ in found.entries():
            pass
        return found.around


def _value_or_error(read: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return read(*arguments)
    except RowError as error:
        return error


class TableRows:
    """Rows of Arrow tables, of a Parquet file or of what `datasets` keeps of hub data.

    Args:
        blocks: gives Arrow tables or record batches that together hold all rows.
    """

    def __init__(self, path: str, blocks: Callable[[], Iterator[Any]], form: str, files: list[Path]) -> None:
        self.path, self.form, self.files, self._blocks = path, form, files, blocks
        self.bytes, self.done = sum(file.stat().st_size for file in files), 0

    @classmethod
    def from_parquet(cls, path: str) -> TableRows:
        """A Parquet file; a damaged one, or one with columns of a type that `datasets` has not, is refused."""
        import pyarrow.parquet

        def blocks() -> Iterator[Any]:
            with _readable(path), pyarrow.parquet.ParquetFile(path) as file:
                yield from file.iter_batches(_TOGETHER)

        with _readable(path), pyarrow.parquet.ParquetFile(path) as file:
            _quiet_datasets().Features.from_arrow_schema(file.schema_arrow)
        return cls(path, blocks, "Parquet", [Path(path)])

    @classmethod
    def from_hub(cls, path: str) -> TableRows:
        """The train split of ``hf://org/name[/config]``, from the hub or its cache."""
        parts = hub_parts(path)
        try:
            table = _quiet_datasets().load_dataset("/".join(parts[:2]), *parts[2:], split="train")
        except Exception as error:  # network, absent repository, absent split, …: datasets has no common base class
            raise UserError(f"{path}: cannot be loaded ({type(error).__name__}: {error})") from None

        def blocks() -> Iterator[Any]:
            return table.with_format("arrow").iter(_TOGETHER)

        return cls(path, blocks, "datasets", [Path(file["filename"]) for file in table.cache_files])

    def scan(self) -> Iterator[Row]:
        line = self.done = 0
        for block in self._blocks():
            for value in _values(block):
                line += 1
                yield Row(line, value)
            self.done = min(self.bytes, self.done + block.nbytes)


def _values(block: Any) -> list[Any]:
    """The rows of a table as Python's values."""
    try:
        return block.to_pylist()
    except (OverflowError, ValueError):
        return [_value(block, index) for index in range(block.num_rows)]


def _value(block: Any, index: int) -> Any:
    try:
        return block.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError as error:  # Arrow does not look into its texts
        return RowError(f"not UTF-8: byte 0x{error.object[error.start]:02x} in a column of text")
    except (OverflowError, ValueError) as error:  # a date beyond Python's
        return RowError(f"a value that cannot be read ({error})")


@contextmanager
def _readable(path: str) -> Iterator[None]:
    """Say of a Parquet file what pyarrow or `datasets` says of it."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: its schema
        raise UserError(f"{path}: not a readable Parquet file ({' '.join(str(error).split())})") from None


def _quiet_datasets() -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets
