"""Recognise files of unsupported kinds by their beginning, and refuse each once with a way to convert it."""

from __future__ import annotations

import codecs
import re
import shlex
from pathlib import Path

from megatron_embed.bridge.errors import UserError

_WANTED = "wanted UTF-8 text (JSON lines, a JSON list) or Parquet"
#: (beginning of a file, its kind, a command that converts it)
_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (b"\xff\xfe\0\0", "UTF-32 text", "iconv -f UTF-32 -t UTF-8 {file} > {file}.utf8"),
    (b"\0\0\xfe\xff", "UTF-32 text", "iconv -f UTF-32 -t UTF-8 {file} > {file}.utf8"),
    (b"\xff\xfe", "UTF-16 text", "iconv -f UTF-16 -t UTF-8 {file} > {file}.utf8"),
    (b"\xfe\xff", "UTF-16 text", "iconv -f UTF-16 -t UTF-8 {file} > {file}.utf8"),
    (b"\x1f\x8b", "compressed by gzip", "gzip -dk {file}"),
    (b"BZh", "compressed by bzip2", "bzip2 -dk {file}"),
    (b"\xfd7zXZ", "compressed by xz", "xz -dk {file}"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "zstd -dk {file}"),
    (b"PK\x03\x04", "a ZIP archive or an Excel table", "unzip {file}, or export the table as CSV"),
    (b"ARROW1", "an Arrow table", "with datasets, Dataset.from_file(…).to_parquet(…)"),
    (b"SQLite format 3", "an SQLite database", "select its rows into JSON lines"),
)
#: column names; the first line of a table has at least two of them
_COLUMNS = {
    *("id", "_id", "docid", "query_id", "query", "question", "anchor", "positive", "negative", "negatives"),
    *("passage", "document", "answer", "text", "title"),
}
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1b"))
_SEPARATORS = {"\t": "tabs", ",": "commas", ";": "semicolons"}


def refuse_foreign(path: str, head: bytes) -> None:
    """Refuse a file that is neither UTF-8 text of rows nor Parquet.

    Args:
        head: its first kilobytes, without a BOM of UTF-8.

    Raises:
        UserError: the message names the kind found and a way to convert it.
    """
    for start, kind, way in _KINDS:
        if head.startswith(start):
            raise UserError(f"{path}: found {kind}; {_WANTED}: {way.format(file=shlex.quote(path))}")
    if (order := _byte_order(head)) is not None:
        convert = f"iconv -f UTF-16{order} -t UTF-8 {shlex.quote(path)} > {shlex.quote(path)}.utf8"
        raise UserError(f"{path}: found UTF-16 text without a byte order mark; {_WANTED}: {convert}")
    if _is_binary(head):
        raise UserError(f"{path}: found binary data, beginning with {head[:8].hex(' ')}; {_WANTED}")
    if (separator := _separator(path, head)) is not None:
        columns = ", ".join(_cells(head, separator)[:8])
        stem, sep = str(Path(path).with_suffix("")), "" if separator == "," else f", sep={separator!r}"
        convert = (
            f"import pandas; pandas.read_csv({path!r}{sep}, dtype=str, keep_default_na=False)"
            f".to_json({stem + '.jsonl'!r}, orient='records', lines=True, force_ascii=False)"
        )
        raise UserError(
            f"{path}: found a table between {_SEPARATORS[separator]} ({columns}); wanted JSON lines, a JSON list or "
            f'Parquet: python -c "{convert}"'
        )


def _byte_order(head: bytes) -> str | None:
    """Return ``BE`` or ``LE`` if the bytes look like UTF-16 in a Latin script, where every other byte is NUL."""
    if len(head) < 4:
        return None
    zeros = [head[first::2].count(0) / len(head[first::2]) for first in (0, 1)]
    if max(zeros) < 0.4 or min(zeros) > 0.1:
        return None
    return "BE" if zeros[0] > zeros[1] else "LE"


def _is_binary(head: bytes) -> bool:
    controls = (len(head) - len(head.translate(None, _CONTROLS))) / max(1, len(head))
    if 0.02 < controls <= 0.3:  # fewer control characters are stray ones, which their rows report
        try:
            codecs.getincrementaldecoder("utf-8")().decode(head)  # accepts an incomplete last character
        except UnicodeDecodeError:
            return True
    return controls > 0.3


def _separator(path: str, head: bytes) -> str | None:
    """Return the separator of the cells in a table's first line, or None if the file is no table."""
    if head.lstrip().startswith((b"{", b"[")):
        return None
    named = Path(path).suffix.lower() in (".csv", ".tsv")
    for separator in _SEPARATORS:
        cells = _cells(head, separator)
        if len(cells) > 1 and (named or len(_COLUMNS.intersection(cell.lower() for cell in cells)) > 1):
            return separator
    return None


def _cells(head: bytes, separator: str) -> list[str]:
    line = head.lstrip().partition(b"\n")[0].decode("utf-8", errors="replace")
    return [re.sub(r'^\s*"?|"?\s*$', "", cell) for cell in line.split(separator)]
