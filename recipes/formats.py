"""The forms in which training data comes, told apart by their keys, each put into this project's own.

``docs/data.md`` shows an example of each. A file has one form: that of its first row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes.beir import document_text
from megatron_embed.recipes.corpus import Corpus
from megatron_embed.recipes.data_index import Index, indexed
from megatron_embed.recipes.json_text import RowError, read_json
from megatron_embed.recipes.pairs import Pair, kind_of, parse_pair
from megatron_embed.recipes.rows import JsonObjectRows, Rows, place
from megatron_embed.recipes.text_ids import exact_id

#: (corpus id or None, document id) → text
Lookup = Callable[[Any, Any], str]

_NEGATIVE = re.compile(r"negative(_\d+)?")


@dataclass(frozen=True)
class Form:
    """A form of a row.

    Attributes:
        key: a row that has it is of this form.
        own: (row, where documents are found) → the row in this project's own form.
        names: what the own form's fields are called in this one.
    """

    name: str
    key: str
    own: Callable[[Mapping[str, Any], Lookup], dict[str, Any]]
    names: Mapping[str, str] = field(default_factory=dict)


def _columns(row: Mapping[str, Any], lookup: Lookup) -> dict[str, Any]:
    """``negative``, ``negative_1``, … as well as ``negatives``: columns of sentence-transformers."""
    numbered = [key for key in row if isinstance(key, str) and _NEGATIVE.fullmatch(key)]
    numbered.sort(key=lambda key: int(key.partition("_")[2] or 0))
    found = dict(row)
    if "anchor" in row:
        found.setdefault("query", row["anchor"])
    if numbered:
        if row.get("negatives"):
            raise RowError(f"both 'negatives' and {numbered[0]!r}; wanted one of them")
        values = [row[key] for key in numbered if row[key] is not None]
        found["negatives"] = [text for value in values for text in (value if isinstance(value, list) else [value])]
    return found


def _flag_embedding(row: Mapping[str, Any], lookup: Lookup) -> dict[str, Any]:
    found = {"positive": row["pos"], "negatives": row.get("neg"), "query_prompt": row.get("prompt") or None}
    if "query" in row:
        found["query"] = row["query"]
    positive, negative = row.get("pos_scores"), row.get("neg_scores")
    if positive is not None:
        if not isinstance(positive, list) or not isinstance(negative or [], list):
            raise RowError("'pos_scores', 'neg_scores': wanted lists of numbers")
        found["scores"] = [*positive, *(negative or [])]
    elif negative is not None:
        raise RowError("'neg_scores' without 'pos_scores'")
    return found


def _tevatron_inline(row: Mapping[str, Any], lookup: Lookup) -> dict[str, Any]:
    def texts(key: str) -> Any:
        passages = row.get(key)
        return [_passage(key, p) for p in passages] if isinstance(passages, list) else passages

    return _query(row, "query", "query_text") | {
        "positive": texts("positive_passages"),
        "negatives": texts("negative_passages"),
    }


def _tevatron_ids(row: Mapping[str, Any], lookup: Lookup) -> dict[str, Any]:
    def texts(key: str) -> Any:
        ids = row.get(key)
        return [lookup(None, id_) for id_ in ids] if isinstance(ids, list) else ids

    return _query(row, "query_text", "query") | {
        "positive": texts("positive_document_ids"),
        "negatives": texts("negative_document_ids"),
    }


def _automodel(row: Mapping[str, Any], lookup: Lookup) -> dict[str, Any]:
    def texts(key: str) -> Any:
        documents = row.get(key)
        documents = documents if isinstance(documents, list) or documents is None else [documents]
        return documents and [_document(key, document, row, lookup) for document in documents]

    return _query(row, "question", "query") | {"positive": texts("pos_doc"), "negatives": texts("neg_doc")}


def _document(key: str, document: Any, row: Mapping[str, Any], lookup: Lookup) -> str:
    if "corpus_id" in row:
        return lookup(row["corpus_id"], document.get("id") if isinstance(document, Mapping) else document)
    return document if isinstance(document, str) else _passage(key, document)


def _passage(key: str, passage: Any) -> str:
    if not isinstance(passage, Mapping) or not isinstance(passage.get("text"), str):
        raise RowError(f"{key!r}: found {kind_of(passage)} without text; wanted text, and perhaps title")
    return document_text(dict(passage))


def _query(row: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return next(({"query": row[key]} for key in keys if key in row), {})


FORMS = (
    Form(
        "Tevatron, documents by id",
        "positive_document_ids",
        _tevatron_ids,
        {"query": "query_text", "positive": "positive_document_ids", "negatives": "negative_document_ids"},
    ),
    Form(
        "Tevatron, passages in the rows",
        "positive_passages",
        _tevatron_inline,
        {"positive": "positive_passages", "negatives": "negative_passages"},
    ),
    Form("AutoModel", "pos_doc", _automodel, {"query": "question", "positive": "pos_doc", "negatives": "neg_doc"}),
    Form(
        "FlagEmbedding",
        "pos",
        _flag_embedding,
        {"positive": "pos", "negatives": "neg", "scores": "pos_scores, neg_scores", "query_prompt": "prompt"},
    ),
    Form("sentence-transformers columns", "anchor", _columns, {"query": "anchor", "negatives": "negative_1, …"}),
    Form("query, positive, negatives", "positive", _columns),
)


def form_of(row: Any) -> Form | None:
    """The form of a row, or None if it has the keys of none."""
    if not isinstance(row, Mapping):
        return None
    for form in FORMS:  # a generator is slower, and this is asked of every row
        if form.key in row:
            return form
    return None


def _first_form(rows: Rows) -> Index:
    """The form of the first row that has one, and the row's line."""
    for index, value in enumerate(rows.scan()):
        if (found := form_of(value)) is not None:
            return Index(facts={"key": found.key, "line": rows.line(index)})
    return Index(facts={"key": FORMS[-1].key, "line": 0})


def _no_form(rows: Rows) -> str:
    """What is said of a file none of whose rows has a form: once, by its first row, and not of each row."""
    try:
        parse_pair(rows[0], FORMS[-1].names)
        problem = ""
    except RowError as error:
        problem = str(error)
    if "wanted" not in problem:
        problem += "; wanted an object with query, positive and, optionally, negatives"
    alike = f"; of {len(rows):,} rows none has the keys of a form (docs/data.md shows them)" if len(rows) > 1 else ""
    return f"{rows.path}, {place(rows, 0)}: {problem}{alike}"


class PairReader:
    """Reads the rows of one file, all in the form of the first row that has one.

    Raises:
        UserError: no row has one, or the documents that rows name cannot be found.
    """

    def __init__(self, rows: Rows) -> None:
        found = indexed("form", rows.files, lambda: _first_form(rows)).facts
        self.form = next(form for form in FORMS if form.key == found["key"])
        self.line: int = found["line"]
        if not self.line:
            raise UserError(_no_form(rows))
        #: where the documents that rows name by id lie
        self.files: list[Path] = []
        #: ``query_prompt``, ``passage_prompt``: those that stand in the place of a corpus's instructions
        self.stated: Collection[str] = ()
        #: corpus id → the prompts that its instructions make
        self.instructions: dict[str, dict[str, str]] = {}
        self._documents: dict[str, Documents] = {}
        self._all: Documents | None = None
        if isinstance(rows, JsonObjectRows):
            self._documents, self.files, self.instructions = automodel_corpora(rows)
        elif self.form.key == "positive_document_ids":
            self.files = _corpus_beside(Path(rows.path))
            self._all = Documents(self.files)

    def pair(self, value: Any) -> Pair:
        """What a row says.

        Raises:
            RowError: it cannot be used, or is of another form than the file.
        """
        if isinstance(value, RowError):
            raise value
        found = form_of(value)
        if found is not None and found is not self.form:
            raise RowError(
                f"a row of another form: {found.name} ({found.key!r}), where line {self.line} is {self.form.name}; "
                f"wanted one form a file"
            )
        own = value if found is None else self.form.own(value, self._lookup)
        if isinstance(value, Mapping) and (found is None or "query" not in own):
            own = self._without(value)
        if self.instructions and isinstance(value, Mapping):
            prompts = self.instructions.get(str(value.get("corpus_id")), {})
            own = {**own, **{key: prompt for key, prompt in prompts.items() if key not in self.stated}}
        return parse_pair(own, self.form.names)

    def _without(self, value: Mapping[str, Any]) -> Mapping[str, Any]:
        """A row that lacks a key of its form, so that the message says which, and names its own keys."""
        theirs = self.form.names.get("query", "query")
        return {"query" if key == theirs else key: value for key, value in value.items()}

    def _lookup(self, corpus: Any, document: Any) -> str:
        documents = self._all if corpus is None else self._documents.get(str(corpus))
        if documents is None:
            known = ", ".join(self._documents) or "none: the file is no object with 'corpus' and 'data'"
            raise RowError(f"'corpus_id': found {corpus!r}; known: {known}")
        return documents.text(document)


class Documents:
    """Documents by id: 16 bytes a document, mapped into memory where they are kept; texts stay on the disk."""

    def __init__(self, paths: list[Path]) -> None:
        self.corpora = [Corpus(path) for path in paths]
        arrays = indexed("documents", paths, self._sorted).arrays
        self._ids, self._order = arrays["ids"], arrays["order"]

    def _sorted(self) -> Index:
        """``ids``, sorted, and the numbers of their documents, ``order``."""
        ids = (exact_id(corpus.read_id(row)) for corpus in self.corpora for row in range(len(corpus)))
        found = np.fromiter(ids, dtype=np.uint64)
        order = np.argsort(found, kind="stable")
        found = found[order]
        again = np.flatnonzero(found[1:] == found[:-1])
        if len(again):
            corpus, row = self._place(int(order[again + 1].min()))
            where = f"{corpus.path}, line {corpus.rows.line(row)}"
            raise UserError(f"{where}: _id {corpus.read_id(row)!r} stands in the corpus twice")
        return Index({"ids": found, "order": order})

    def text(self, id_: Any) -> str:
        """The document, title first."""
        wanted = np.uint64(exact_id(str(id_)))
        at = int(np.searchsorted(self._ids, wanted))
        if at == len(self._ids) or self._ids[at] != wanted:
            raise RowError(f"document {id_!r} is not in {', '.join(corpus.path for corpus in self.corpora)}")
        corpus, row = self._place(int(self._order[at]))
        return corpus.read(row, row + 1)[1][0]

    def _place(self, number: int) -> tuple[Corpus, int]:
        for corpus in self.corpora:
            if number < len(corpus):
                return corpus, number
            number -= len(corpus)
        raise IndexError(number)


def _corpus_beside(path: Path) -> list[Path]:
    """``corpus.jsonl``, ``corpus.parquet`` or the files of ``corpus/`` in the folder of the training file."""
    for name in ("corpus.jsonl", "corpus.parquet"):
        if (path.parent / name).is_file():
            return [path.parent / name]
    found = _files(path.parent / "corpus")
    if not found:
        raise UserError(
            f"{path}: its rows name documents by id; wanted corpus.jsonl, corpus.parquet or corpus/ beside it, "
            f"rows of docid, text and perhaps title"
        )
    return found


def _files(folder: Path) -> list[Path]:
    return sorted(file for end in ("parquet", "jsonl") for file in folder.glob(f"*.{end}"))


def automodel_corpora(rows: JsonObjectRows) -> tuple[dict[str, Documents], list[Path], dict[str, dict[str, str]]]:
    """What the folders hold that ``"corpus"`` names, relative to the file.

    Returns:
        corpus id → documents; all files of these; corpus id → ``query_prompt`` and ``passage_prompt`` that its
        instructions make. Where any corpus has instructions, they are used as by AutoModel's
        ``use_dataset_instruction: true``: an instruction, a space and the text; the text alone where it is empty.

    Raises:
        UserError: no such folder, or metadata that cannot be used.
    """
    named = rows.head.get("corpus")
    found: dict[str, Documents] = {}
    told: dict[str, dict[str, str]] = {}
    folders: dict[str, Path] = {}
    read: list[Path] = []
    for entry in named if isinstance(named, list) else [named]:
        path = entry.get("path") if isinstance(entry, Mapping) else entry
        if not isinstance(path, str):
            raise UserError(
                f"{rows.path}: 'corpus': found {kind_of(entry)}; wanted {{\"path\": FOLDER}}, or a list of them"
            )
        folder = Path(rows.path).parent / path
        metadata = folder / "merlin_metadata.json"
        if not metadata.is_file():
            raise UserError(f"{metadata}: no such file; wanted a corpus folder with its corpus_id")
        value = read_json(metadata)
        if not isinstance(value, Mapping) or "corpus_id" not in value:
            raise UserError(f"{metadata}: no 'corpus_id'")
        name = str(value["corpus_id"])
        if (first := folders.setdefault(name, folder)) != folder:
            raise UserError(f"{rows.path}: 'corpus': {first} and {folder} both have corpus_id {name!r}; rename one")
        files = _files(folder)
        if not files:
            raise UserError(f"{folder}: no *.parquet or *.jsonl with the documents' id and text")
        found[name] = Documents(files)
        told[name] = {f"{kind}_prompt": _instruction(metadata, value, kind) for kind in ("query", "passage")}
        read += [metadata, *files]
    return found, read, told if any(prompt for prompts in told.values() for prompt in prompts.values()) else {}


def _instruction(metadata: Path, value: Mapping[str, Any], kind: str) -> str:
    """The prompt that a corpus's instruction makes; "": it has none."""
    key = f"{kind}_instruction"
    instruction = value.get(key)
    if not isinstance(instruction, str | None):
        raise UserError(f"{metadata}: {key!r}: found {kind_of(instruction)}; wanted text")
    return f"{instruction} " if instruction else ""
