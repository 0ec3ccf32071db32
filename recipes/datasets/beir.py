"""BEIR folders: corpus.jsonl, queries.jsonl, qrels/<split>.tsv."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_embed.bridge.errors import UsageError, UserError
from megatron_embed.recipes.datasets.corpus import BeirTexts, text_file
from megatron_embed.recipes.datasets.json_text import BOM, RowError, decode
from megatron_embed.recipes.datasets.odd_rows import OddRows

#: way out of a judgement that names a query or document that is nowhere
MEND = "add it there, or remove the judgement"
ABSENT = "judgements name documents that the corpus lacks; they count as never found"


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
    read = [BeirTexts(folder, name) for name in ("corpus.jsonl", "queries.jsonl")]
    corpus, texts = (dict(each.texts()) for each in read)
    path = qrels_path(folder, split)
    odd = OddRows(str(path))
    qrels: dict[str, dict[str, int]] = {}
    lines: dict[str, int] = {}
    present = 0
    for query, document, grade, line in read_qrels(folder, split):
        if query not in texts:
            raise UserError(f"{path}, line {line}: query {query!r} is not in queries.jsonl; {MEND}")
        if document in qrels.setdefault(query, {}):
            odd.add("judgements are of a query and document judged before; the last counts", line)
        if document not in corpus:
            odd.add(ABSENT, line)
        present += document in corpus
        qrels[query][document] = grade
        lines.setdefault(query, line)
    answerable = {query: grades for query, grades in qrels.items() if max(grades.values()) > 0}
    if not answerable:
        raise UserError(f"{path}: no judgement has a grade above 0; wanted a relevant document for at least one query")
    if not present:
        count = odd.counts()[ABSENT]
        raise UserError(
            f"{path}: none of {count} judgements names a document of corpus.jsonl; wanted its values of _id"
        )
    for query, line in lines.items():
        if query not in answerable:
            odd.add("queries have no document of a grade above 0; they are left out", line)
    queries = {query: texts[query] for query in answerable}
    return Collection(folder.resolve().name, corpus, queries, answerable, (*(each.odd for each in read), odd))


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
        raise UserError(f"{path}: no judgements; wanted lines of query-id, corpus-id and score between tabs")


def _is_header(fields: list[str]) -> bool:
    """Return whether the fields are three names; a digit in the third one means a (maybe malformed) judgement."""
    return len(fields) == 3 and bool(fields[2].strip()) and not any(map(str.isdigit, fields[2]))


def _is_grade(text: str) -> bool:
    return text.removeprefix("-").isdecimal()
