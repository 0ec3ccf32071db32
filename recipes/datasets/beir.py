"""BEIR folders: corpus.jsonl, queries.jsonl, qrels/<split>.tsv."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_embed.bridge.errors import UsageError, UserError
from megatron_embed.recipes.datasets.json_text import BOM, RowError, decode
from megatron_embed.recipes.datasets.odd_rows import NO_TEXT, OddRows, of_text
from megatron_embed.recipes.datasets.pair import kind_of
from megatron_embed.recipes.datasets.rows import JsonLineRows, check_file

ABSENT = "judgements name documents that the corpus lacks; they count as never found"
WANTED = "an object with _id, text and, for documents, title"


@dataclass(frozen=True)
class Collection:
    """The data of one evaluation of a retriever.

    Attributes:
        corpus: document id → text, title first.
        queries: query id → text of the query, for the queries in ``qrels``.
        qrels: query id → {document id: grade}. Queries without a relevant document are left out, because nothing can
            answer them. Judged documents that the corpus lacks are kept, and no search finds them.
        odd: usable but odd rows of each file, above all judgements of documents that the corpus lacks.
    """

    name: str
    corpus: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]
    odd: tuple[OddRows, ...] = ()


def is_beir(path: str | Path) -> bool:
    """Return whether ``path`` is a folder with a corpus and queries."""
    return (Path(path) / "corpus.jsonl").is_file() and (Path(path) / "queries.jsonl").is_file()


def document_text(row: dict[str, Any]) -> str:
    """Return title and text joined as BEIR joins them."""
    return f"{row.get('title') or ''} {row.get('text') or ''}".strip()


def id_of(row: Mapping[str, Any], key: str) -> str:
    """Return a row's id as text.

    Raises:
        RowError: the id is neither text nor a whole number; ``null`` would become the same id for every such row.
    """
    id_ = row[key]
    if isinstance(id_, bool) or not isinstance(id_, str | int):
        raise RowError(f"{key!r}: found {json.dumps(id_, default=str)[:60]}; wanted text or a whole number below 2^64")
    return str(id_)


def text_row(row: Any, keys: Sequence[str] = ("_id",)) -> tuple[str, dict[str, Any]]:
    """Return (id, row) of a document or query.

    Args:
        keys: keys that may hold the id.

    Raises:
        RowError: the row is no object, lacks an id or a text, or has one of another type.
    """
    if not isinstance(row, Mapping):
        raise RowError(f"found {kind_of(row)}; wanted {WANTED}")
    key = next((key for key in keys if key in row), None)
    if key is None or "text" not in row:
        raise RowError(f"found {', '.join(map(str, row)) or 'nothing'}; wanted {WANTED}")
    for name, value in (("text", row["text"]), ("title", row.get("title") or "")):
        if not isinstance(value, str):
            raise RowError(f"{name!r}: found {kind_of(value)}; wanted text")
    return id_of(row, key), dict(row)


def check_folder(folder: str | Path, split: str) -> None:
    """Refuse a path that is no BEIR folder with this split. Read only the first kilobytes of its files.

    Raises:
        UserError: the folder or a file is missing, or a file does not hold JSON lines.
    """
    for name in ("corpus.jsonl", "queries.jsonl"):
        text_file(Path(folder), name)
    _qrels_file(Path(folder), split)


def load_beir(folder: str | Path, split: str = "test") -> Collection:
    """Read a BEIR folder.

    Raises:
        UserError: a file or split is missing, a line is malformed, the corpus is empty, a judged query is missing, or
            no judgement names a document of the corpus.
    """
    folder = Path(folder)
    corpus, odd_documents = _read_texts(folder, "corpus.jsonl", "document")
    texts, odd_queries = _read_texts(folder, "queries.jsonl", "query")
    path = qrels_path(folder, split)
    odd = OddRows(str(path))
    qrels: dict[str, dict[str, int]] = {}
    lines: dict[str, int] = {}
    present = 0
    for query, document, grade, line in read_qrels(folder, split):
        if query not in texts:
            raise UserError(f"{path}, line {line}: query {query!r} is not in queries.jsonl")
        if document in qrels.setdefault(query, {}):
            odd.add("judgements are of a query and document judged before; the last counts", line)
        if document not in corpus:
            odd.add(ABSENT, line)
        present += document in corpus
        qrels[query][document] = grade
        lines.setdefault(query, line)
    answerable = {query: grades for query, grades in qrels.items() if max(grades.values()) > 0}
    if not answerable:
        raise UserError(f"{path}: no judgement has a grade above 0")
    if not present:
        raise UserError(f"{path}: none of {odd.counts()[ABSENT]} judgements names a document of corpus.jsonl")
    for query, line in lines.items():
        if query not in answerable:
            odd.add("queries have no document of a grade above 0; they are left out", line)
    queries = {query: texts[query] for query in answerable}
    return Collection(folder.resolve().name, corpus, queries, answerable, (odd_documents, odd_queries, odd))


def _read_texts(folder: Path, name: str, what: str) -> tuple[dict[str, str], OddRows]:
    """Read ``corpus.jsonl`` or ``queries.jsonl``: return id → text, and the odd rows."""
    texts, odd = {}, OddRows(str(folder / name))
    for id_, row, line in read_texts(folder, name):
        texts[id_] = text = document_text(row)
        for remark in (*of_text(text), *([] if text else [NO_TEXT])):
            odd.add(remark, line)
    if not any(texts.values()):
        raise UserError(f"{folder / name}: no {what} has any text; wanted {WANTED}")
    return texts, odd


def load_collections(folders: Sequence[str | Path], split: str = "test") -> list[Collection]:
    """Read several BEIR folders. Their names must differ, because they name the results."""
    check_names(folders)
    return [load_beir(folder, split) for folder in folders]


def check_names(folders: Sequence[str | Path]) -> None:
    """Refuse two BEIR folders with the same name."""
    names = [Path(folder).resolve().name for folder in folders]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two BEIR folders are named {name!r}, which names their results; rename one")


def read_texts(folder: Path, name: str) -> Iterator[tuple[str, dict[str, Any], int]]:
    """Yield (id, row, line) of every row of ``corpus.jsonl`` or ``queries.jsonl``; refuse a repeated id."""
    rows = JsonLineRows(text_file(folder, name))
    seen: set[str] = set()
    for line, value, _ in rows.scan():
        try:
            if isinstance(value, RowError):
                raise value
            id_, row = text_row(value)
        except RowError as error:
            raise UserError(f"{rows.path}, line {line}: {error}") from None
        if id_ in seen:
            raise UserError(f"{rows.path}, line {line}: _id {id_!r} stands in the file twice")
        seen.add(id_)
        yield id_, row, line
    if not seen:
        raise UserError(f"{rows.path}: holds no rows; wanted {WANTED}")


def text_file(folder: Path, name: str) -> Path:
    """Return the path of ``corpus.jsonl`` or ``queries.jsonl``.

    Raises:
        UserError: the file is missing or does not hold JSON lines.
    """
    path = folder / name
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; wanted a BEIR folder with corpus.jsonl, queries.jsonl, qrels/")
    if not path.is_file():
        raise UserError(f"{path}: no such file; a BEIR folder holds corpus.jsonl, queries.jsonl and qrels/")
    check_file(str(path))
    return path


def qrels_path(folder: Path, split: str) -> Path:
    """Return the path of the judgements of ``split``."""
    return folder / "qrels" / f"{split}.tsv"


def _qrels_file(folder: Path, split: str) -> Path:
    path = qrels_path(folder, split)
    if not path.is_file():
        present = sorted(file.stem for file in path.parent.glob("*.tsv"))
        raise UserError(f"{path}: no such split; present: {', '.join(present) or 'none'}")
    return path


def read_qrels(folder: Path, split: str) -> Iterator[tuple[str, str, int, int]]:
    """Yield (query id, document id, grade, line) of every judgement."""
    path = _qrels_file(folder, split)
    empty = True
    for number, raw in enumerate(path.read_bytes().removeprefix(BOM).split(b"\n"), start=1):
        try:
            line = decode(raw)
        except RowError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        fields = line.rstrip("\r").split("\t")
        if not line.strip() or (number == 1 and _is_header(fields)):
            continue
        if len(fields) != 3 or not _is_grade(fields[2]):
            raise UserError(f"{path}, line {number}: found {line!r}; wanted query-id, corpus-id, score between tabs")
        empty = False
        yield fields[0], fields[1], int(fields[2]), number
    if empty:
        raise UserError(f"{path}: no judgements")


def _is_header(fields: list[str]) -> bool:
    """Return whether the fields are three names; a digit in the third one means a (maybe malformed) judgement."""
    return len(fields) == 3 and bool(fields[2].strip()) and not any(map(str.isdigit, fields[2]))


def _is_grade(text: str) -> bool:
    return text.removeprefix("-").isdecimal()
