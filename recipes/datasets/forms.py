"""The supported forms of training data. Their keys identify them, and each is converted to this project's own form.

``docs/data.md`` shows an example of each. A file has one form, that of its first row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes.datasets.corpus import Corpus, document_text
from megatron_embed.recipes.datasets.documents import DocumentIds, Documents
from megatron_embed.recipes.datasets.json_text import RowError, read_json
from megatron_embed.recipes.datasets.pair import Pair, kind_of, parse_pair
from megatron_embed.recipes.datasets.rows import JsonObjectRows, Row, Rows

#: (corpus id or None, document id) → text
Lookup = Callable[[Any, Any], str]

_NEGATIVE = re.compile(r"negative(_\d+)?")


@dataclass(frozen=True)
class Form:
    """A form of a row.

    Attributes:
        key: a row with this key has this form.
        own: (row, lookup of documents) → the row in this project's own form.
        names: field of this project's own form → its name in this form.
    """

    name: str
    key: str
    own: Callable[[Mapping[str, Any], Lookup], Mapping[str, Any]]
    names: Mapping[str, str] = field(default_factory=dict)


def _columns(row: Mapping[str, Any], lookup: Lookup) -> Mapping[str, Any]:
    """Convert columns of sentence-transformers: ``negative``, ``negative_1``, …, or ``negatives``."""
    numbered = _numbered(*row)
    if not numbered and "anchor" not in row:
        return row
    found = dict(row)
    if "anchor" in row:
        found.setdefault("query", row["anchor"])
    if numbered:
        if row.get("negatives"):
            raise RowError(f"both 'negatives' and {numbered[0]!r}; wanted one of them")
        values = [row[key] for key in numbered if row[key] is not None]
        found["negatives"] = [text for value in values for text in (value if isinstance(value, list) else [value])]
    return found


@lru_cache(maxsize=64)
def _numbered(*keys: str) -> list[str]:
    """Return the keys of numbered negatives in their order. It is cached, because most rows have the same keys."""
    return sorted(filter(_NEGATIVE.fullmatch, keys), key=lambda key: int(key.partition("_")[2] or 0))


def _flag_embedding(row: Mapping[str, Any], lookup: Lookup) -> dict[str, Any]:
    found = {"positive": row["pos"], "negatives": row.get("neg"), "query_prompt": row.get("prompt") or None}
    if "query" in row:
        found["query"] = row["query"]
    positive, negative = row.get("pos_scores"), row.get("neg_scores")
    if positive is not None:
        if not isinstance(positive, list) or not isinstance(negative or [], list):
            raise RowError(
                f"'pos_scores', 'neg_scores': found {kind_of(positive)}, {kind_of(negative)}; wanted lists of numbers"
            )
        found["scores"] = [*positive, *(negative or [])]
    elif negative is not None:
        raise RowError("'neg_scores' without 'pos_scores'; wanted both or neither")
    return found


def _tevatron_inline(row: Mapping[str, Any], lookup: Lookup) -> dict[str, Any]:
    return _texts(row, ("query", "query_text"), ("positive_passages", "negative_passages"), _passage)


def _tevatron_ids(row: Mapping[str, Any], lookup: Lookup) -> dict[str, Any]:
    keys = ("positive_document_ids", "negative_document_ids")
    return _texts(row, ("query_text", "query"), keys, lambda _, id_: lookup(None, id_))


def _automodel(row: Mapping[str, Any], lookup: Lookup) -> dict[str, Any]:
    def text(key: str, document: Any) -> str:
        if "corpus_id" in row:
            return lookup(row["corpus_id"], document.get("id") if isinstance(document, Mapping) else document)
        return document if isinstance(document, str) else _passage(key, document)

    single = {key: [row[key]] for key in ("pos_doc", "neg_doc") if not isinstance(row.get(key), list | None)}
    return _texts({**row, **single}, ("question", "query"), ("pos_doc", "neg_doc"), text)


def _texts(
    row: Mapping[str, Any], queries: Sequence[str], passages: tuple[str, str], text: Callable[[str, Any], str]
) -> dict[str, Any]:
    """Return the query under the first of its keys, and the positives and negatives that ``text`` makes of lists."""
    found = next(({"query": row[key]} for key in queries if key in row), {})
    for name, key in zip(("positive", "negatives"), passages, strict=True):
        value = row.get(key)
        found[name] = [text(key, each) for each in value] if isinstance(value, list) else value
    return found


def _passage(key: str, passage: Any) -> str:
    if not isinstance(passage, Mapping) or not isinstance(passage.get("text"), str):
        raise RowError(f"{key!r}: found {kind_of(passage)} without text; wanted text, and perhaps title")
    return document_text(dict(passage))


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
_BY_KEY = {form.key: form for form in FORMS}


def form_of(row: Any) -> Form | None:
    """Return the form of a row, or None if the row has the key of no form."""
    if not isinstance(row, dict):
        return None
    for key in _BY_KEY:  # a loop, because a generator is slower and every row comes here
        if key in row:
            return _BY_KEY[key]
    return None


def _first_form(rows: Rows) -> tuple[Form, int]:
    """Return the form of the first row that has one, and the row's line.

    Raises:
        UserError: no row has a form, or there are no rows.
    """
    first, count = None, 0
    for row in rows.scan():
        if (found := form_of(row.value)) is not None:
            return found, row.line
        first = first or row
        count += 1
    if first is None:
        raise UserError(f"{rows.path}: holds no rows; wanted training pairs (docs/data.md shows the forms)")
    raise UserError(f"{rows.path}, {_no_form(first, count)}")


def _no_form(first: Row, count: int) -> str:
    """Return one message about a file in which no row has a form; it describes the first row only."""
    problem = str(first.value) if isinstance(first.value, RowError) else ""
    if not problem:
        try:
            parse_pair(first.value, FORMS[-1].names)
        except RowError as error:
            problem = str(error)
    if "wanted" not in problem:
        problem += "; wanted an object with query, positive and, optionally, negatives"
    alike = f"; of {count:,} rows none has the keys of a form (docs/data.md shows them)" if count > 1 else ""
    return f"{first.place}: {problem}{alike}"


class PairReader:
    """A reader of the rows of one file, which all have the form of the first row that has one.

    Args:
        stated: those of ``query_prompt`` and ``passage_prompt`` that replace a corpus's instructions.

    Raises:
        UserError: no row has a form, or the documents that rows name cannot be found.
    """

    def __init__(self, rows: Rows, stated: Collection[str] = ()) -> None:
        self.stated = stated
        self.form, self.line = _first_form(rows)
        #: value of the key ``corpus`` in a file of AutoModel's, which names its corpora
        self.named: Any = rows.head().get("corpus") if isinstance(rows, JsonObjectRows) else None
        self.found = corpora_of(rows, self.form.key, self.named)
        #: the documents that rows may name by id
        self.documents = Documents([Corpus(file) for file in self.found.texts])
        self._ids: dict[str | None, DocumentIds] = {}
        first, count = 0, 0
        for name, files in self.found.corpora.items():
            corpora = self.documents.corpora[count : count + len(files)]
            self._ids[name] = DocumentIds(self.documents, corpora, first=first)
            first, count = first + sum(map(len, corpora)), count + len(files)

    def pair(self, value: Any) -> Pair:
        """Return the pair of a row.

        Raises:
            RowError: the row is unusable, or its form differs from the file's.
        """
        if isinstance(value, RowError):
            raise value
        found = form_of(value)
        if found is not None and found is not self.form:
            raise RowError(
                f"a row of another form: {found.name} ({found.key!r}), where line {self.line} is {self.form.name}; "
                f"wanted one form in each file"
            )
        own = value if found is None else self.form.own(value, self._lookup)
        if isinstance(value, dict) and (found is None or "query" not in own):
            own = self._without(value)
        if self.found.instructions and isinstance(value, dict):
            prompts = self.found.instructions.get(str(value.get("corpus_id")), {})
            own = {**own, **{key: prompt for key, prompt in prompts.items() if key not in self.stated}}
        return parse_pair(own, self.form.names)

    def _without(self, value: Mapping[str, Any]) -> Mapping[str, Any]:
        """Rename the query's key in a row that lacks a key of its form, so that the message names the file's keys."""
        theirs = self.form.names.get("query", "query")
        return {"query" if key == theirs else key: value for key, value in value.items()}

    def _lookup(self, corpus: Any, document: Any) -> str:
        ids = self._ids.get(None if corpus is None else str(corpus))
        if ids is None:
            known = ", ".join(map(str, self._ids)) or "none: the file is no object with 'corpus' and 'data'"
            raise RowError(f"'corpus_id': found {corpus!r}; known: {known}")
        return ids.document(document)


@dataclass(frozen=True)
class NamedCorpora:
    """The files of the documents that rows name by id.

    Attributes:
        corpora: id of a corpus → its files; the id None stands for a single corpus without id.
        metadata: the files that define the corpora.
        instructions: id of a corpus → the ``query_prompt`` and ``passage_prompt`` of its instructions. If any corpus
            has instructions, they are used as with AutoModel's ``use_dataset_instruction: true``: the instruction, a
            space and the text, or the text alone if the instruction is empty.
    """

    corpora: Mapping[str | None, list[Path]] = field(default_factory=dict)
    metadata: list[Path] = field(default_factory=list)
    instructions: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def texts(self) -> list[Path]:
        """The files with documents, in the order of the documents' numbers."""
        return [file for files in self.corpora.values() for file in files]

    @property
    def files(self) -> list[Path]:
        return [*self.metadata, *self.texts]


def corpora_of(rows: Rows, key: str, named: Any) -> NamedCorpora:
    """Return the corpora of a file whose rows have the form with this key.

    Args:
        named: the value of ``corpus`` in an AutoModel file.

    Raises:
        UserError: a folder or file is missing, or metadata is unusable.
    """
    if isinstance(rows, JsonObjectRows):
        return _automodel_corpora(rows.path, named)
    if key == "positive_document_ids":
        return NamedCorpora({None: _corpus_beside(Path(rows.path))})
    return NamedCorpora()


def _corpus_beside(path: Path) -> list[Path]:
    """Return ``corpus.jsonl``, ``corpus.parquet`` or the files of ``corpus/`` in the folder of the training file."""
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


def _automodel_corpora(file: str, named: Any) -> NamedCorpora:
    """Return the corpora in the folders that ``"corpus"`` names, relative to the file."""
    found: dict[str | None, list[Path]] = {}
    told: dict[str, dict[str, str]] = {}
    folders: dict[str, Path] = {}
    read: list[Path] = []
    for entry in named if isinstance(named, list) else [named]:
        path = entry.get("path") if isinstance(entry, Mapping) else entry
        if not isinstance(path, str):
            raise UserError(f"{file}: 'corpus': found {kind_of(entry)}; wanted {{\"path\": FOLDER}}, or a list of them")
        folder = Path(file).parent / path
        metadata = folder / "merlin_metadata.json"
        if not metadata.is_file():
            raise UserError(f"{metadata}: no such file; wanted a corpus folder with its corpus_id")
        value = read_json(metadata)
        if not isinstance(value, Mapping) or "corpus_id" not in value:
            raise UserError(
                f"{metadata}: no 'corpus_id'; wanted an object with the name by which rows call this corpus"
            )
        name = str(value["corpus_id"])
        if (first := folders.setdefault(name, folder)) != folder:
            raise UserError(f"{file}: 'corpus': {first} and {folder} both have corpus_id {name!r}; rename one")
        files = _files(folder)
        if not files:
            raise UserError(f"{folder}: no *.parquet or *.jsonl; wanted files of documents with id and text")
        found[name] = files
        told[name] = {f"{kind}_prompt": _instruction(metadata, value, kind) for kind in ("query", "passage")}
        read.append(metadata)
    any_told = any(prompt for prompts in told.values() for prompt in prompts.values())
    return NamedCorpora(found, read, told if any_told else {})


def _instruction(metadata: Path, value: Mapping[str, Any], kind: str) -> str:
    """Return the prompt of a corpus's instruction, or "" if it has none."""
    key = f"{kind}_instruction"
    instruction = value.get(key)
    if not isinstance(instruction, str | None):
        raise UserError(f"{metadata}: {key!r}: found {kind_of(instruction)}; wanted text")
    return f"{instruction} " if instruction else ""
