"""Entries of a JSON list, found without reading the file whole, are what json.loads makes of it, line for line."""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes.datasets import json_lists
from megatron_embed.recipes.datasets.json_text import RowError
from megatron_embed.recipes.datasets.rows import (
    JsonArrayRows,
    JsonLineRows,
    JsonObjectRows,
    Rows,
    open_rows,
    read_rows,
)

PIECES = [
    '"',
    "\\",
    "\\\\",
    '\\"',
    "[",
    "]",
    "{",
    "}",
    ",",
    ":",
    "\n",
    "\t",
    " ",
    "ü",
    "“",
    "中",
    "🙂",
    "a",
    "\u2028",
    "",
]
HEAD = {"corpus": [{"path": "a", "data": [1, {"data": 2}]}, "b, ]}"], "x": {"data": [[]]}}


def value(generator: random.Random, depth: int) -> Any:
    """Anything that JSON can hold, above all what looks like its own characters."""
    match generator.randrange(4 if depth else 2):
        case 0:
            return "".join(generator.choices(PIECES, k=generator.randrange(9)))
        case 1:
            return generator.choice([None, True, -1.5e-7, 0, 2**64 - 1, "\\", '"'])
        case 2:
            return [value(generator, depth - 1) for _ in range(generator.randrange(4))]
    return {str(value(generator, 0)): value(generator, depth - 1) for _ in range(generator.randrange(4))}


def spaced(text: str, generator: random.Random) -> str:
    """The same JSON with white space of all kinds around what is outside of strings."""
    found, in_text, escaped = [], False, False
    for character in text:
        if not in_text and character in '[]{},:"':
            found += generator.choices(["", "", " ", "\n", "\r\n", "\t \n"], k=1)
        found.append(character)
        if character == '"' and not escaped:
            in_text = not in_text
        escaped = in_text and character == "\\" and not escaped
        if not in_text and character in '[]{},:"':
            found += generator.choices(["", "", " ", "\n", "\r\n", "\t \n"], k=1)
    return "".join(found)


def lines_of(text: str, start: int) -> list[int]:
    """The line on which each entry of the list that opens at ``start`` begins, one after the other."""
    found, at = [], start + 1
    while True:
        at += len(text[at:]) - len(text[at:].lstrip(" \t\r\n,"))
        if text[at] == "]":
            return found
        found.append(text.count("\n", 0, at) + 1)
        _, at = json.JSONDecoder().raw_decode(text, at)


def entries(rows: Rows) -> tuple[list[Any], list[int]]:
    found = [*rows.scan()]
    return [row.value for row in found], [row.line for row in found]


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 18])
@pytest.mark.parametrize("form", ["array", "object", "data first"])
def test_entries_are_those_of_json_loads(
    block: int, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_lists, "BLOCK", block)
    generator = random.Random(f"{block} {form}")
    path = tmp_path / "a"
    for number in range(40):
        wanted = [value(generator, 3) for _ in range(generator.randrange(1, 7))]
        head = HEAD if form == "object" else {}
        whole: Any = wanted if form == "array" else {**head, "data": wanted, 'd"': ["data"]}
        text = json.dumps(whole, indent=(None, 1, 2)[number % 3], ensure_ascii=number % 2 == 0)
        if number % 5 == 0:
            text = spaced(text, generator)
        path.write_bytes(b"\xef\xbb\xbf" * (number % 7 == 0) + text.encode())
        rows = JsonArrayRows(path) if form == "array" else JsonObjectRows(path)
        before = {"array": 0, "data first": 1, "object": 4}[form]  # how many "data" there are up to the rows' own
        start = -1
        for _ in range(before):
            start = text.index('"data"', start + 1)
        assert entries(rows) == (wanted, lines_of(text, text.index("[", max(start, 0))))
        if isinstance(rows, JsonObjectRows):
            assert rows.head() == {key: entry for key, entry in whole.items() if key != "data"}


ONE_LINE = b'{"corpus": "msmarco", "query": "q", "positive": "p"}'


@pytest.mark.parametrize(
    ("content", "form"),
    [
        (ONE_LINE, JsonLineRows),
        (ONE_LINE + b"\n", JsonLineRows),
        (ONE_LINE + b"\r\n\n" + ONE_LINE, JsonLineRows),
        (b'\n{"data": "x", "query": "q", "positive": "p"}\n', JsonLineRows),
        (b'{"data": [1], "query": "q", "positive": "p"}\n' * 2, JsonLineRows),
        (b'{"corpus": {"data": [1]}, "query": "q", "positive": "p"}', JsonLineRows),
        (b'{"corpus": "a", "data": [{}]}', JsonObjectRows),
        (b'\xef\xbb\xbf \n{"corpus": "a", "data": [{}]} \n\n', JsonObjectRows),
        (b'{"data": [{}], "corpus": "\xc3\xbc \\" ["}', JsonObjectRows),
        (b'{"corpus": "a", "data":\n[{}]}', JsonObjectRows),
        (b'{"corpus":\n"a", "data": [{}]}', JsonObjectRows),
    ],
)
def test_the_object_with_corpus_and_data_is_told_from_json_lines(content: bytes, form: type, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content)
    assert type(open_rows(str(tmp_path / "a"))) is form


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1},\n{"a": 2}\n', "line 3: not JSON: the file ends before its list does; wanted ']'"),
        ('[{"a": 1},\n', "line 2: not JSON: the file ends before its list does; wanted ']'"),
        (
            '[{"a": 1},\n\n{"a":',
            "line 3: not JSON: Expecting value at column 6 of the entry: '{\"a\":'; the file ends before its list does",
        ),
        # a quote that is not there turns what is text and what is not about, up to the end
        (
            '[{"a": "1"},\n{"a": "2},\n{"a": "3"}]',
            """line 2: not JSON: Invalid control character at column 11 of the entry: '{"a": "2},\\n{"a": "3"}]'""",
        ),
        (
            '[{"a": 1},\n{"a": [2},\n3]',
            "line 2: not JSON: Expecting ',' delimiter at column 9 of the entry: '{\"a\": [2}",
        ),
        (
            '[{"a": "6" pipe"},\n{"a": "see [1]"},\n{"a": "[2]]"}]',
            """line 1: not JSON: Expecting ',' delimiter at column 11 of the entry: '{"a": "6" pipe"},\\n{""",
        ),
        # here what is not text ends the list
        (
            '[{"a": 1},\n{"a": "6" pipe"},\n{"a": "]]"}\n, {"a": "3"}]',
            """line 2: not JSON: Expecting ',' delimiter at column 11 of the entry: '{"a": "6" pipe"},\\n{"a": "]'""",
        ),
        ('[{"a": 1}\n}', "line 2: not JSON: '}' ends the list; wanted ']'"),
        ('[{"a": 1},\n{"a": 2}},\n{"a": 3}]', "line 2: not JSON: '}' ends the list; wanted ']'"),
        ('[{"a": 1}]\n x', "line 2: not JSON: Extra data"),
        ('[{"a": 1}][{"a": 1}]', "line 1: not JSON: Extra data"),
        ("\n[{}\n,{}]\n,", "line 4: not JSON: Extra data"),
        ('{"corpus": "a"\n}', "wanted an object with 'corpus' and 'data', a list of rows"),
        ('{"corpus": "a",\n"data": {"a": [1]}}', "wanted an object with 'corpus' and 'data', a list of rows"),
        ('{"data": [1],\n"data": [2]}', "'data' stands in it twice; wanted an object with 'corpus' and 'data', a list"),
        ('{"corpus": "a",\n"b": x, "data": [1]}', "line 2: not JSON: Expecting value at column 6"),
        ('{"corpus": "a",\n"data": [{}\n,\n\n{}]\n,"b": x}', "line 6: not JSON: Expecting value"),
        ('{"corpus": "a",\n"data": [{}\n]\n', "line 4: not JSON: Expecting ',' delimiter"),
        ('{"corpus": "a",\n"data": [{}\n]}\n]', "line 4: not JSON: Extra data"),
    ],
)
@pytest.mark.parametrize("block", [1, 1 << 18])
def test_what_is_wrong_with_a_list_is_named_with_its_line(
    content: str, message: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_lists, "BLOCK", block)
    path = tmp_path / "a"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        entries(open_rows(str(path)))
    beginning = f"{path}: " if message.startswith(("wanted", "'data'")) else f"{path}, "
    assert str(error.value).startswith(beginning + message)


def test_what_is_wrong_with_an_entry_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text('[{"a": 1},\n{"a":\n\n 2 3},, {"a": 4} 5,\n "a": "\\ud83d", ["\\ud83d"], {},]')
    rows = [*read_rows(open_rows(str(path)))]
    problems = [str(row.value) if isinstance(row.value, RowError) else row.value for row in rows]
    assert [row.line for row in rows] == [1, 2, 4, 4, 5, 5, 5, 5]
    places = ["line 1", "line 2", "line 4, entry 3", "line 4, entry 4", *(f"line 5, entry {n}" for n in (5, 6, 7, 8))]
    assert [row.place for row in rows] == places
    assert problems == [
        {"a": 1},
        "not JSON: Expecting ',' delimiter at line 4, column 4: '{\"a\":\\n\\n 2 3}'",
        "not JSON: Expecting value at column 1 of the entry: ''",
        "not JSON: Extra data at column 10 of the entry: '{\"a\": 4} 5'",
        'not JSON: Extra data at column 4 of the entry: \'"a": "\\\\ud83d"\'',
        "half a surrogate pair, \\ud83d, is no text; write the whole character",
        {},
        "not JSON: Expecting value at column 1 of the entry: ''",
    ]


@pytest.mark.parametrize("form", ["array", "object"])
def test_a_large_list_is_never_in_memory(form: str, tmp_path: Path) -> None:
    path, count = tmp_path / "a", 20_000
    row = json.dumps({"query": 'a "b" \\ ü', "positive": "word, " * 400})
    with path.open("w") as file:
        file.write("[" if form == "array" else '{"corpus": 5, "data": [')
        for number in range(count):
            file.write(f"{row},\n" if number < count - 1 else row)
        file.write("]" if form == "array" else "]}")
    tracemalloc.start()
    try:
        lines, value = [], None
        for line, found, _ in open_rows(str(path)).scan():
            lines.append(line)
            value = found
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert lines == [*range(1, count + 1)]
    assert value == json.loads(row)
    assert os.path.getsize(path) > 45e6
    assert most < 20e6
