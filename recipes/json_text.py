"""Bytes to text to values, for one line or a whole file: whatever is wrong is said, and Python's own limits, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_embed.bridge.errors import UserError

BOM = b"\xef\xbb\xbf"


class RowError(ValueError):
    """One row cannot be used; the message says why, without the place."""


def parse_json(raw: bytes) -> Any:
    """The value of one line.

    Raises:
        RowError: not UTF-8, not JSON, or text that no UTF-8 can hold.
    """
    text = decode(raw)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise RowError(f"not JSON: {_reason(error)}: {_clip(text)}") from None
    except (RecursionError, ValueError) as error:
        raise RowError(f"not usable JSON: {_limit(error)}") from None
    if _may_hold_surrogates(text):
        refuse_lone_surrogates(value)
    return value


def decode(raw: bytes) -> str:
    """The text of one line.

    Raises:
        RowError: not UTF-8.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RowError(
            f"not UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line; "
            f"wanted the file converted to UTF-8"
        ) from None


def _reason(error: json.JSONDecodeError) -> str:
    return f"{error.msg.removesuffix(' at')} at column {error.colno}"


def _limit(error: Exception) -> str:
    """What Python's parser, not JSON, has a limit for."""
    return "nested too deeply" if isinstance(error, RecursionError) else "a number of more than 4,300 digits"


def _may_hold_surrogates(text: str) -> bool:
    return "\\ud" in text or "\\uD" in text


def refuse_lone_surrogates(value: Any) -> None:
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
    return parse_json_file(path)[0]


def parse_json_file(path: Path) -> tuple[Any, bool]:
    """What :func:`read_json` gives, and whether any text in it may hold half a surrogate pair."""
    raw = path.read_bytes().removeprefix(BOM)
    try:
        text = raw.decode("utf-8")
        return json.loads(text), _may_hold_surrogates(text)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: not UTF-8: byte 0x{raw[error.start]:02x}; wanted the file converted to UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON: {_reason(error)}") from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path}: not usable JSON: {_limit(error)}") from None
