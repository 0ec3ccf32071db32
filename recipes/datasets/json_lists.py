"""Read the entries of a JSON list one after the other, without loading the whole file.

The list is cut at its commas, and each piece is parsed by itself. Valid JSON pieces between commas and brackets form a
valid JSON list, so every error of a file shows in a piece, at the list's end or around the list.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes.datasets.json_text import BOM, RowError, parse_file, parse_json, read_json, value_or_error

BLOCK = 1 << 20  # bytes of one read; a longer entry is read in growing blocks
AROUND = 4 << 20  # most bytes before the list in a file, and after it
LONGEST = 1 << 28  # most bytes of an entry; a longer one counts as endless

#: a whole string or a structural character; a lone quote or backslash means that the block ends inside a string
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|\\.|[\[\]{},"\\]', re.DOTALL)
_COMMA = ord(",")
_DATA = re.compile(rb'"data"[ \t\r\n]*:[ \t\r\n]*(?=\[)')
_WANTED = "wanted an object with 'corpus' and 'data', a list of rows"


def is_object(path: Path) -> bool:
    """Return whether a file is one object with a list of rows under ``data``; it begins with ``corpus`` or ``data``.

    Otherwise the file holds JSON lines whose rows have such a key: its first line is JSON by itself and other lines
    follow, or its ``data`` is no list.
    """
    with path.open("rb") as file:
        head = file.read(AROUND).removeprefix(BOM).lstrip()
    line, _, others = head.partition(b"\n")
    if re.search(rb"\S", others) is None:
        return _list_of_data(head) is not None
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return False


class JsonList:
    """The list of a file: the whole file, or the value of ``data`` in a file that is an object.

    Attributes:
        position: bytes of the file up to the end of the latest entry.
        around: after the last entry, the value of the file with an empty list, or its object without the list.
    """

    def __init__(self, path: Path, *, in_object: bool) -> None:
        self.path, self.position, self._in_object = path, 0, in_object
        self.around: Any = None

    def entries(self) -> Iterator[tuple[int, Any]]:
        """Yield (line on which it begins, its value or the :class:`RowError` of an unusable one) for each entry.

        Raises:
            UserError: before the first entry, if there is no such list; after the last entry, if the list has no end or
                the text around it is wrong.
        """
        first_bad = ""
        with self.path.open("rb") as file:
            cut = _Cut(file, self._start(file))
            for line, raw in cut.entries():
                self.position = cut.position
                value = value_or_error(parse_json, raw, line)
                if isinstance(value, RowError) and not first_bad:
                    first_bad = f"{line}: {value}"
                yield line, value
            self.around = self._read_around(file, cut, first_bad or _unfinished(cut))

    def _start(self, file: BinaryIO) -> int:
        """Return the position of the list's opening bracket."""
        head = file.read(AROUND)
        start = _list_of_data(head) if self._in_object else head.index(b"[")
        if start is None:
            if len(head) < AROUND:
                read_json(self.path)  # raises the error of invalid JSON
            raise UserError(f"{self.path}: {_WANTED}")
        return start

    def _read_around(self, file: BinaryIO, cut: _Cut, bad: str) -> Any:
        """Return the value of the file around the list, once the list was cut to its end.

        Args:
            bad: line of the first entry that is no JSON, with the reason; it explains a wrong end best.
        """
        if cut.closed != b"]":
            found = "'}' ends the list" if cut.closed else "the file ends before its list does"
            bad = bad or f"{cut.line + 1}: not JSON: {found}; wanted ']'"
            raise UserError(f"{self.path}, line {bad}")
        file.seek(0)
        before = file.read(cut.start)
        file.seek(cut.position)
        after = file.read(AROUND)
        # Line breaks replace the list's own, so that errors after the list name the lines of the file.
        breaks = b"\n" * (cut.line - before.count(b"\n"))
        try:
            whole = b"%b[%b]%b" % (before.removeprefix(BOM), breaks, after)
            around = parse_file(self.path, whole, columns=False)
        except UserError:
            if bad:  # such an entry may have closed the list too early
                raise UserError(f"{self.path}, line {bad}") from None
            raise
        if len(after) == AROUND:
            raise UserError(f"{self.path}: holds more than {AROUND >> 20} MiB after its list of rows; {_WANTED}")
        if self._in_object and around.pop("data") != []:
            raise UserError(f"{self.path}: 'data' stands in it twice; {_WANTED}")
        return around


def _unfinished(cut: _Cut) -> str:
    """Return the line of the entry that the file's end cut, with the reason; "" if it is whole or there is none."""
    if cut.rest is None:
        return ""
    line, raw = cut.rest
    if len(raw) == AROUND:
        return f"{line}: not JSON: the entry that begins here has no end"
    error = value_or_error(parse_json, raw, line)
    return f"{line}: {error}; the file ends before its list does" if isinstance(error, RowError) else ""


def _list_of_data(head: bytes) -> int | None:
    """Return the position of the list under ``data`` in a file's beginning; None if it has none or is invalid JSON."""
    for start, member in _members(head):
        if (found := _DATA.match(member)) is not None:
            try:
                json.loads(head[: start + found.end()] + b"[]}")
            except (ValueError, RecursionError):
                return None
            return start + found.end()
    return None


def _members(head: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the position and the bytes of each member of an object; the last one may be incomplete."""
    cut = _Cut(io.BytesIO(head), head.find(b"{"))
    for _, raw in cut.entries():
        yield cut.position - 1 - len(raw), raw
    if cut.rest is not None:
        yield len(head) - len(cut.rest[1]), cut.rest[1]


class _Cut:
    """A list that is cut into its entries, from its opening bracket on.

    Attributes:
        start: position of the opening bracket in the file.
        position, line: position and line after the last entry and its comma or bracket; ``line`` counts from 0.
        closed: the bracket that ended the list; empty before the end.
        rest: (line, beginning) of an entry that the end of the file cut.
    """

    def __init__(self, file: BinaryIO, start: int) -> None:
        self.start, self.position, self.closed = start, start + 1, b""
        self.rest: tuple[int, bytes] | None = None
        file.seek(0)
        self.line = file.read(start).count(b"\n")
        file.seek(self.position)
        self._file = file

    def entries(self) -> Iterator[tuple[int, bytes]]:
        """Yield (line from 1, bytes) for each entry; the bytes between two adjacent commas are empty."""
        buffer, begin, at, depth, first = b"", 0, 0, 1, True
        while True:
            for token in _TOKEN.finditer(buffer, at):
                at = token.start()
                mark = buffer[at]
                if mark in b"[{":
                    depth += 1
                elif mark in b"]}":
                    depth -= 1
                elif mark in b'"\\':
                    if token.end() == at + 1:  # the rest of the string is not read yet
                        break
                    continue
                if depth == 0 or (depth == 1 and mark == _COMMA):
                    self.closed = b"" if depth else token[0]
                    line, raw = self._piece(buffer[begin:at])
                    self.position += at + 1 - begin
                    begin = at + 1
                    if raw or depth or not first:  # an empty list has no entry
                        yield line, raw
                    first = False
                    if self.closed:
                        return
            else:
                at = len(buffer)
            buffer, at, begin = buffer[begin:], at - begin, 0
            more = self._file.read(max(BLOCK, len(buffer))) if len(buffer) < LONGEST else b""
            if not more:
                line, raw = self._piece(buffer)
                self.rest = (line, raw[:AROUND]) if raw else None
                return
            buffer += more

    def _piece(self, piece: bytes) -> tuple[int, bytes]:
        """Return the line on which an entry begins, and its bytes without leading white space."""
        raw = piece.lstrip(b" \t\r\n")
        line = self.line + piece.count(b"\n", 0, len(piece) - len(raw)) + 1
        self.line += piece.count(b"\n")
        return line, raw
