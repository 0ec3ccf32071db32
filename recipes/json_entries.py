"""Where the entries of a JSON list lie in its file, found in one pass that holds a block of it at a time.

A list is cut at its commas; each piece is parsed by itself, when it is wanted. Pieces that all are JSON, between
commas and brackets, are a JSON list: so whatever is wrong with a file shows in a piece, at the list's end or around it.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes.data_index import Index
from megatron_embed.recipes.json_text import BOM, RowError, parse_file, parse_json, read_json

BLOCK = 1 << 17  # bytes looked through at once: their masks and places stay in the processor's cache
AROUND = 4 << 20  # bytes that a file may hold before its list, and as many behind

_BLANK, _BREAK, _OTHER, _COMMA, _OPEN, _CLOSE, _QUOTE, _ESCAPE = range(8)
_MEMBERS = {_BLANK: b" \t\r", _BREAK: b"\n", _COMMA: b",", _OPEN: b"[{", _CLOSE: b"]}", _QUOTE: b'"', _ESCAPE: b"\\"}
#: what each byte is, for bytes.translate. Bytes of longer UTF-8 characters are none of these.
_KINDS = bytes(next((kind for kind, found in _MEMBERS.items() if byte in found), _OTHER) for byte in range(256))
_DEEPER = np.array([{_OPEN: 1, _CLOSE: -1}.get(kind, 0) for kind in range(8)], dtype=np.int8)

_SPACE = re.compile(r"[ \t\r\n]*")
_WANTED = "wanted an object with 'corpus' and 'data', a list of rows"


def is_object(path: Path) -> bool:
    """Whether a file that begins with a key ``corpus`` or ``data`` is one object with a list of rows under ``data``.

    Else it holds JSON lines whose rows have such a key: the first line is JSON by itself, and others follow, or its
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


def entries_of_array(file: int, path: Path) -> Index:
    """``starts``, ``ends`` and ``lines`` (from 0) of the entries of a file that is one list.

    Raises:
        UserError: the list has no end, or something stands behind it.
    """
    found, _ = _entries(file, path, os.pread(file, AROUND, 0).index(b"["))
    return Index(found)


def entries_of_data(file: int, path: Path) -> Index:
    """The same of the list under ``data``; a fact, ``head``, is the object without it.

    Raises:
        UserError: as for an array; no such list.
    """
    head = os.pread(file, AROUND, 0)
    start = _list_of_data(head)
    if start is None:
        if len(head) < AROUND:
            read_json(path)  # says what is no JSON
        raise UserError(f"{path}: {_WANTED}")
    found, around = _entries(file, path, start)
    if around.pop("data") != []:
        raise UserError(f"{path}: 'data' stands in it twice; {_WANTED}")
    return Index(found, {"head": around})


def _list_of_data(head: bytes) -> int | None:
    """Where the list under ``data`` opens in the beginning of a file; None: an object without, or no JSON."""
    text = head.decode("latin-1")  # a character a byte, so that places are the file's
    parse = json.JSONDecoder().raw_decode

    def skip(at: int) -> int:
        found = _SPACE.match(text, at)
        assert found is not None
        return found.end()

    at, key, before = text.find("{"), None, "{"
    try:
        while key != "data":
            if text[at] != before:
                return None
            key, at = parse(text, skip(at + 1))
            at = skip(at)
            if text[at] != ":":
                return None
            at, before = skip(at + 1), ","
            if key != "data":
                _, at = parse(text, at)
                at = skip(at)
        return at if text[at] == "[" else None
    except (ValueError, IndexError, RecursionError):
        return None


def _entries(file: int, path: Path, start: int) -> tuple[dict[str, np.ndarray], Any]:
    """The arrays of a list that opens at ``start``, and the value of the file with this list empty."""
    before = os.pread(file, start, 0)
    scan = _Scan(start + 1, before.count(b"\n"))
    while not scan.closed and (block := os.pread(file, BLOCK, scan.at)):
        scan.read(block)
    if not scan.closed or os.pread(file, 1, scan.ends[-1]) != b"]":
        found = "'}' ends the list" if scan.closed else "the file ends before its list does"
        bad = _first_bad_entry(file, scan) or f"{scan.line + 1}: not JSON: {found}; wanted ']'"
        raise UserError(f"{path}, line {bad}")
    if len(scan.starts) == 1 and scan.starts[0] == scan.ends[0]:
        scan.starts, scan.ends, scan.lines = array("q"), array("q"), array("q")
    breaks = b"\n" * (scan.line - before.count(b"\n"))  # in the place of the list's: lines are named by the file's
    after = os.pread(file, AROUND, scan.at)
    try:
        around = parse_file(path, b"%b[%b]%b" % (before.removeprefix(BOM), breaks, after), columns=False)
    except UserError:
        if bad := _first_bad_entry(file, scan):  # it may have closed the list too early
            raise UserError(f"{path}, line {bad}") from None
        raise
    if len(after) == AROUND:
        raise UserError(f"{path}: holds more than {AROUND >> 20} MiB behind its list of rows; {_WANTED}")
    places = {"starts": scan.starts, "ends": scan.ends, "lines": scan.lines}
    return {name: np.frombuffer(found, dtype=np.int64) for name, found in places.items()}, around


def _first_bad_entry(file: int, scan: _Scan) -> str:
    """The line of the first entry that is no JSON, and why; "": all are. One that is cut short counts."""
    whole = len(scan.ends)
    for index, (start, line) in enumerate(zip(scan.starts, scan.lines, strict=True)):
        end = scan.ends[index] if index < whole else start + AROUND
        raw = os.pread(file, end - start, start)
        if len(raw) == AROUND and index == whole:
            return f"{line + 1}: not JSON: the entry that begins here has no end"
        try:
            parse_json(raw, line + 1)
        except RowError as error:
            end_too = "; the file ends before its list does" if index == whole else ""
            return f"{line + 1}: {error}{end_too}"
    return ""


class _Scan:
    """A list read block by block, from behind its opening bracket to its closing one.

    Attributes:
        at, line: where the next block begins; where the list ends, once it is closed.
        starts: the first byte of each entry that is not blank (of one that is, its end).
        ends: the comma or bracket behind each. While the list is open, an entry may have begun and not ended.
        lines: of the starts, from 0.
    """

    def __init__(self, at: int, line: int) -> None:
        self.at, self.line, self.closed = at, line, False
        self.starts, self.ends, self.lines = array("q"), array("q"), array("q")
        self._depth, self._in_text, self._escaped, self._waiting = 1, 0, False, True

    def read(self, block: bytes) -> None:
        """Take the next bytes of the file."""
        kinds = np.frombuffer(block.translate(_KINDS), dtype=np.uint8)
        ends = self._ends_in(kinds)
        before = np.concatenate([[-1], ends]) if self._waiting else ends
        if self.closed:
            kinds, before = kinds[: ends[-1] + 1], before[:-1]
        solid, breaks = np.flatnonzero(kinds > _BREAK), np.flatnonzero(kinds == _BREAK)
        first = np.searchsorted(solid, before, side="right")
        self._waiting = bool(len(first) and first[-1] == len(solid))  # of the last alone: a comma is solid, too
        starts = solid[first[: len(first) - self._waiting]]
        _append(self.ends, ends + self.at)
        _append(self.starts, starts + self.at)
        _append(self.lines, np.searchsorted(breaks, starts) + self.line)
        self.line += len(breaks)
        self.at += len(kinds)

    def _ends_in(self, kinds: np.ndarray) -> np.ndarray:
        """Places of the commas between the list's entries and, last, of the bracket that closes it."""
        marks = np.flatnonzero(kinds > _OTHER)
        found = kinds[marks]
        if self._escaped or (found == _ESCAPE).any():
            marks = marks[~self._escaped_in(marks[found == _ESCAPE], len(kinds))[marks]]
            found = kinds[marks]
        quotes = found == _QUOTE
        in_text = (np.cumsum(quotes, dtype=np.uint8) + self._in_text) & 1  # uint8: only whether it is odd counts
        self._in_text = int(in_text[-1]) if len(in_text) else self._in_text
        outside = ~(quotes | in_text.astype(np.bool_))
        marks, found = marks[outside], found[outside]
        depth = np.cumsum(_DEEPER[found], dtype=np.int64) + self._depth
        self._depth = int(depth[-1]) if len(depth) else self._depth
        closing = np.flatnonzero(depth == 0)[:1]
        commas = np.flatnonzero((found == _COMMA) & (depth == 1))
        if len(closing):
            self.closed = True
            commas = commas[commas < closing]
        return marks[np.concatenate([commas, closing])]

    def _escaped_in(self, escapes: np.ndarray, length: int) -> np.ndarray:
        """Which bytes of a block stand behind a backslash that no other escapes: ``[length + 1]`` bool."""
        found = np.zeros(length + 1, dtype=np.bool_)
        found[0] = self._escaped
        escapes = escapes[escapes > 0] if self._escaped else escapes
        first = np.diff(escapes, prepend=-2) > 1  # of a run, in which every other one escapes the next
        run = np.maximum.accumulate(np.where(first, escapes, 0))
        found[escapes[(escapes - run) % 2 == 0] + 1] = True
        self._escaped = bool(found[length])
        return found


def _append(values: array[int], more: np.ndarray) -> None:
    values.frombytes(more.astype(np.int64).tobytes())
