"""Entries of a JSON list, read one after the other without the file ever being in memory.

A list is cut at its commas and each piece is parsed by itself. Pieces that all are JSON, between commas and brackets,
are a JSON list: whatever is wrong with a file shows in a piece, at the list's end or around it.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes.datasets.json_text import BOM, RowError, parse_file, parse_json, read_json

BLOCK = 1 << 20  # bytes read at once; an entry that is longer is read in blocks of growing size
AROUND = 4 << 20  # bytes that a file may hold before its list, and as many after it
LONGEST = 1 << 28  # bytes of an entry: whatever is longer has no end

#: a whole string, or a character that is part of the list's structure; a quote or backslash alone has been cut off
_TOKEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|\\.|[\[\]{},"\\]', re.DOTALL)
_COMMA = ord(",")
_DATA = re.compile(rb'"data"[ \t\r\n]*:[ \t\r\n]*(?=\[)')
_WANTED = "wanted an object with 'corpus' and 'data', a list of rows"


def is_object(path: Path) -> bool:
    """Whether a file that begins with a key ``corpus`` or ``data`` is one object with a list of rows under ``data``.

    Otherwise it holds JSON lines whose rows have such a key: the first line is JSON by itself and others follow, or its
    ``data`` is no list.
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
    """The list in a file that is one, or that is an object with a list under ``data``.

    Attributes:
        position: bytes of the file that the entries given so far take.
        around: once all are given, the value of the file with the list empty; an object is without it.
    """

    def __init__(self, path: Path, *, in_object: bool) -> None:
        self.path, self.position, self._in_object = path, 0, in_object
        self.around: Any = None

    def entries(self) -> Iterator[tuple[int, bytes]]:
        """(line on which it begins, its bytes) of each entry.

        Raises:
            UserError: after the last entry, if the list has no end or something is wrong around it; before the first,
                if there is no such list.
        """
        with self.path.open("rb") as file:
            cut = _Cut(file, self._start(file))
            for entry in cut.entries():
                self.position = cut.position
                yield entry
            self.around = self._read_around(file, cut)

    def _start(self, file: BinaryIO) -> int:
        """Where the list opens."""
        head = file.read(AROUND)
        start = _list_of_data(head) if self._in_object else head.index(b"[")
        if start is None:
            if len(head) < AROUND:
                read_json(self.path)  # says what is no JSON
            raise UserError(f"{self.path}: {_WANTED}")
        return start

    def _read_around(self, file: BinaryIO, cut: _Cut) -> Any:
        """What stands around a list that was cut to its end."""
        if cut.closed != b"]":
            found = "'}' ends the list" if cut.closed else "the file ends before its list does"
            bad = self._first_bad_entry(file, cut) or f"{cut.line + 1}: not JSON: {found}; wanted ']'"
            raise UserError(f"{self.path}, line {bad}")
        file.seek(0)
        before = file.read(cut.start)
        file.seek(cut.position)
        after = file.read(AROUND)
        # line breaks in the place of the list's own: what is wrong behind it is named by the file's lines
        breaks = b"\n" * (cut.line - before.count(b"\n"))
        try:
            whole = b"%b[%b]%b" % (before.removeprefix(BOM), breaks, after)
            around = parse_file(self.path, whole, columns=False)
        except UserError:
            if bad := self._first_bad_entry(file, cut):  # it may have closed the list too early
                raise UserError(f"{self.path}, line {bad}") from None
            raise
        if len(after) == AROUND:
            raise UserError(f"{self.path}: holds more than {AROUND >> 20} MiB behind its list of rows; {_WANTED}")
        if self._in_object and around.pop("data") != []:
            raise UserError(f"{self.path}: 'data' stands in it twice; {_WANTED}")
        return around

    def _first_bad_entry(self, file: BinaryIO, cut: _Cut) -> str:
        """The line of the first entry that is no JSON, and why; "": all are. One that is cut short counts."""
        again = _Cut(file, cut.start)
        for line, raw in again.entries():
            try:
                parse_json(raw, line)
            except RowError as error:
                return f"{line}: {error}"
        if again.rest is None:
            return ""
        line, raw = again.rest
        if len(raw) == AROUND:
            return f"{line}: not JSON: the entry that begins here has no end"
        try:
            parse_json(raw, line)
        except RowError as error:
            return f"{line}: {error}; the file ends before its list does"
        return ""


def _list_of_data(head: bytes) -> int | None:
    """Where the list under ``data`` opens in the beginning of a file; None: an object without, or no JSON."""
    for start, member in _members(head):
        if (found := _DATA.match(member)) is not None:
            try:
                json.loads(head[: start + found.end()] + b"[]}")
            except (ValueError, RecursionError):
                return None
            return start + found.end()
    return None


def _members(head: bytes) -> Iterator[tuple[int, bytes]]:
    """Where each member of an object begins, and its bytes; the last one may be cut short."""
    cut = _Cut(io.BytesIO(head), head.find(b"{"))
    for _, raw in cut.entries():
        yield cut.position - 1 - len(raw), raw
    if cut.rest is not None:
        yield len(head) - len(cut.rest[1]), cut.rest[1]


class _Cut:
    """A list that is cut into its entries, from behind the bracket that opens it.

    Attributes:
        start: where the bracket stands in the file.
        position, line: behind the last entry and what ends it; ``line`` counts from 0.
        closed: the bracket that ended the list; empty while none has.
        rest: (line, beginning) of an entry that the file's end cut short.
    """

    def __init__(self, file: BinaryIO, start: int) -> None:
        self.start, self.position, self.closed = start, start + 1, b""
        self.rest: tuple[int, bytes] | None = None
        file.seek(0)
        self.line = file.read(start).count(b"\n")
        file.seek(self.position)
        self._file = file

    def entries(self) -> Iterator[tuple[int, bytes]]:
        """(line from 1, bytes) of each entry; empty bytes between two commas."""
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
                    if token.end() == at + 1:  # its other part is still in the file
                        break
                    continue
                if depth == 0 or (depth == 1 and mark == _COMMA):
                    self.closed = b"" if depth else token[0]
                    line, raw = self._piece(buffer[begin:at])
                    self.position += at + 1 - begin
                    begin = at + 1
                    if raw or depth or not first:  # of an empty list there is no entry
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
        """The line on which an entry begins, and its bytes without the white space before them."""
        raw = piece.lstrip(b" \t\r\n")
        line = self.line + piece.count(b"\n", 0, len(piece) - len(raw)) + 1
        self.line += piece.count(b"\n")
        return line, raw
