"""Bytes to text to values, for one line or a whole file: whatever is wrong is said, and Python's own limits, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_embed.bridge.errors import UserError

BOM = b"\xef\xbb\xbf"


class RowError(ValueError):
    """One row cannot be used; the message says why, without the place."""


def parse_json(raw: bytes, line: int | None = None) -> Any:
    """The value of one line, or of an entry that begins on ``line`` of its file and may stretch over several.

    Raises:
        RowError: not UTF-8, not JSON, or text that no UTF-8 can hold.
    """
    text = decode(raw, line)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}"
        if line is not None:  # columns count from the entry's beginning, on its first line
            place = f"line {line + error.lineno - 1}, {place}" if error.lineno > 1 else f"{place} of the entry"
        raise RowError(f"not JSON: {_reason(error)} at {place}: {_clip(text)}") from None
    except (RecursionError, ValueError) as error:
        raise RowError(f"not usable JSON: {_limit(error)}") from None
    if "\\ud" in text or "\\uD" in text:
        _refuse_lone_surrogates(value)
    return value


def decode(raw: bytes, line: int | None = None) -> str:
    """The text of one line, or of an entry that begins on ``line``.

    Raises:
        RowError: not UTF-8.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        place = f"at byte {error.start + 1} of the line"
        if line is not None:
            below = raw.count(b"\n", 0, error.start)
            place = f"on line {line + below}"
        raise RowError(
            f"not UTF-8: byte 0x{raw[error.start]:02x} {place}; wanted the file converted to UTF-8"
        ) from None


def _reason(error: json.JSONDecodeError) -> str:
    return error.msg.removesuffix(" at")


def _limit(error: Exception) -> str:
    """What Python's parser, not JSON, has a limit for."""
    return "nested too deeply" if isinstance(error, RecursionError) else "a number of more than 4,300 digits"


def _refuse_lone_surrogates(value: Any) -> None:
    """What JSON can write, and no file, tokenizer or hash takes, is a :class:`RowError`."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"half a surrogate pair, \\u{ord(error.object[error.start]):04x}, is no text") from None


def _clip(text: str, length: int = 60) -> str:
    return repr(text if len(text) <= length else text[: length - 1] + "…")


def read_json(path: Path) -> Any:
    """A whole JSON file.

    Raises:
        UserError: not UTF-8, not JSON; the line is named.
    """
    return parse_file(path, path.read_bytes().removeprefix(BOM))


def parse_file(path: Path, raw: bytes, *, columns: bool = True) -> Any:
    """The same of bytes that stand for the file's; ``columns``: whether theirs are the file's, too."""
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: not UTF-8: byte 0x{raw[error.start]:02x}; wanted the file converted to UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        place = f" at column {error.colno}" if columns else ""
        raise UserError(f"{path}, line {error.lineno}: not JSON: {_reason(error)}{place}") from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path}: not usable JSON: {_limit(error)}") from None
