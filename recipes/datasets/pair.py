"""The content of one row of training data: a query, its positives, its hard negatives and a teacher's answers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from megatron_embed.recipes.datasets.json_text import RowError

#: keys that most rows lack
_RARE = frozenset({"scores", "query_embedding", "positive_embedding", "query_prompt", "passage_prompt"})
_MOST = sys.float_info.max  # whole numbers in JSON can be greater; NaN also fails the comparison


class Teacher(NamedTuple):
    """A teacher's answers for one query, if the data has them (README, "Distillation").

    Attributes:
        scores: scores of the positive (in a :class:`Pair`, of each positive) and of each hard negative.
        query: the query's vector.
        passages: vectors of the positive and of each hard negative.
    """

    scores: list[float] | None = None
    query: list[float] | None = None
    passages: list[list[float]] | None = None


class Pair(NamedTuple):
    """The content of one row of a source. Prompts are the row's own ones, which replace those of the source."""

    query: str
    positives: list[str]
    negatives: list[str]
    teacher: Teacher = Teacher()
    query_prompt: str | None = None
    passage_prompt: str | None = None


def parse_pair(row: Any, names: Mapping[str, str] = MappingProxyType({})) -> Pair:
    """Read ``{"query": …, "positive": text or list, "negatives": list}`` and a teacher's answers, if any.

    ``scores`` holds a number for each positive and each negative. ``query_embedding``, ``positive_embedding`` and
    ``negative_embeddings`` hold vectors. Other keys are ignored.

    Args:
        names: the names of ``query``, ``positive`` and ``negatives`` in the file, for messages.

    Raises:
        RowError: a field is missing, of a wrong type or empty, or there is no positive.
    """
    if not isinstance(row, dict):
        raise RowError(f"found {kind_of(row)}; wanted {_wanted(names)}")
    if "query" not in row or "positive" not in row:
        missing = names.get("positive", "positive") if "query" in row else names.get("query", "query")
        raise RowError(f"no {missing!r}; found keys: {', '.join(map(str, row)) or 'none'}; wanted {_wanted(names)}")
    query, positive, negatives = row["query"], row["positive"], row.get("negatives")
    positives = positive if isinstance(positive, list) else [positive]
    if negatives is None:
        negatives = []
    elif not isinstance(negatives, list):
        raise RowError(f"{names.get('negatives', 'negatives')!r}: found {kind_of(negatives)}; wanted a list of texts")
    if not positives or positive is None:
        raise RowError(f"{names.get('positive', 'positive')!r} is empty; every query needs one")
    for field, texts in (("query", (query,)), ("positive", positives), ("negatives", negatives)):
        for text in texts:
            if not isinstance(text, str):
                raise RowError(f"{names.get(field, field)!r}: found {kind_of(text)}; wanted text")
            if not text or text.isspace():
                raise RowError(f"{names.get(field, field)!r} holds an empty text; fill it, or remove the row")
    if _RARE.isdisjoint(row):
        return Pair(query, positives, negatives)
    prompts = {key: row.get(key) for key in ("query_prompt", "passage_prompt")}
    for key, prompt in prompts.items():
        if prompt is not None and not isinstance(prompt, str):
            raise RowError(f"{names.get(key, key)!r}: found {kind_of(prompt)}; wanted text")
    teacher = _parse_teacher(row, positives, negatives, names.get("scores", "scores"))
    return Pair(query, positives, negatives, teacher, **prompts)


def _wanted(names: Mapping[str, str]) -> str:
    query, positive, negatives = (names.get(field, field) for field in ("query", "positive", "negatives"))
    return f"an object with {query}, {positive} and, optionally, {negatives}"


def _parse_teacher(row: Mapping[str, Any], positives: list[str], negatives: list[str], name: str) -> Teacher:
    scores, query, positive = (row.get(key) for key in ("scores", "query_embedding", "positive_embedding"))
    wanted = len(positives) + len(negatives)
    if scores is not None:
        _check_numbers(name, scores)
        if len(scores) != wanted:
            each = "the positive" if len(positives) == 1 else "each positive"
            raise RowError(f"{name!r}: found {len(scores)}; wanted {wanted}, one for {each} and each negative")
    passages = None
    if (query is None) != (positive is None):
        raise RowError("found one of 'query_embedding' and 'positive_embedding'; wanted both or neither")
    if positive is not None:
        if len(positives) > 1:
            raise RowError(
                f"found a teacher's vectors beside {len(positives)} positives; wanted a row for each positive"
            )
        of_negatives = row.get("negative_embeddings")
        if not isinstance(of_negatives, list | None):
            raise RowError(f"'negative_embeddings': found {kind_of(of_negatives)}; wanted a list of vectors")
        passages = [positive, *(of_negatives or [])]
        for vector in (query, *passages):
            _check_numbers("…_embedding", vector)
        if len(passages) != wanted:
            raise RowError(
                f"'negative_embeddings': found {len(passages) - 1}; wanted {len(negatives)}, one for each negative"
            )
    return Teacher(scores, query, passages)


def _check_numbers(field: str, values: Any) -> None:
    if not isinstance(values, list) or not all(type(x) in (int, float) and abs(x) <= _MOST for x in values):
        raise RowError(f"{field!r}: wanted a list of finite numbers")


def kind_of(value: Any) -> str:
    """Return JSON's name for the type of a value."""
    names = {dict: "an object", list: "a list", str: "a text", type(None): "null", bool: "true or false"}
    if type(value) in (int, float):
        return f"the number {value}"
    return names.get(type(value), type(value).__name__)  # Parquet has types that JSON lacks: bytes, datetime, …
