"""Decode and parse one line or a whole file of JSON; the errors name what is wrong, also limits of Python's parser."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from megatron_embed.bridge.errors import UserError

BOM = b"\xef\xbb\xbf"


class RowError(ValueError):
    """An error about an unusable row; its message gives the reason without the place."""


def parse_json(raw: bytes, line: int | None = None) -> Any:
    """Parse one line, or an entry that begins on ``line`` of its file and may span several lines.

    Raises:
        RowError: the bytes are not UTF-8 or not JSON, or a text cannot be encoded as UTF-8.
    """
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        pass  # the standard parser takes more (NaN, deep nesting), and its errors are the ones that messages quote
    text = decode(raw, line)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}"
        if line is not None:  # on the first line of an entry, columns count from its beginning
            place = f"line {line + error.lineno - 1}, {place}" if error.lineno > 1 else f"{place} of the entry"
        raise RowError(f"not JSON: {_reason(error)} at {place}: {_clip(text)}") from None
    except (RecursionError, ValueError) as error:
        raise RowError(f"not usable JSON: {_limit(error)}") from None
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can hold half a surrogate pair, but files and tokenizers refuse it
        raise RowError(
            f"half a surrogate pair, \\u{ord(error.object[error.start]):04x}, is no text; write the whole character"
        ) from None
    return value


def value_or_error(read: Callable[..., Any], *arguments: Any) -> Any:
    """Return what ``read`` returns, or the :class:`RowError` that it raises."""
    try:
        return read(*arguments)
    except RowError as error:
        return error


def decode(raw: bytes, line: int | None = None) -> str:
    """Decode one line, or an entry that begins on ``line``.

    Raises:
        RowError: the bytes are not UTF-8.
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
    """Name the limit of Python's parser (not of JSON) that an error reports."""
    return "nested too deeply" if isinstance(error, RecursionError) else "a number of more than 4,300 digits"


def _clip(text: str, length: int = 60) -> str:
    return repr(text if len(text) <= length else text[: length - 1] + "…")


def read_json(path: Path) -> Any:
    """Read a whole JSON file.

    Raises:
        UserError: the file is not UTF-8 or not JSON; the message names the line.
    """
    return parse_file(path, path.read_bytes().removeprefix(BOM))


def parse_file(path: Path, raw: bytes, *, columns: bool = True) -> Any:
    """Parse bytes as the content of the file ``path``, whose lines they have.

    Args:
        columns: True if the bytes also have the columns of the file, so that messages can name them.

    Raises:
        UserError: see :func:`read_json`.
    """
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
