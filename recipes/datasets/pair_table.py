"""Training pairs as a table. Every row of a source is read and checked once, so a bad line ends a run at its start."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow

from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes.datasets.documents import Document
from megatron_embed.recipes.datasets.duplicates import TextIds, repeated_pairs
from megatron_embed.recipes.datasets.forms import PairReader
from megatron_embed.recipes.datasets.json_text import RowError
from megatron_embed.recipes.datasets.odd_rows import REPEATED_PAIRS, OddRows, of_pair
from megatron_embed.recipes.datasets.pair import Pair, Teacher
from megatron_embed.recipes.datasets.rows import Row, Rows, read_rows
from megatron_embed.recipes.datasets.table import Found, TableWriter
from megatron_embed.recipes.datasets.text_ids import text_id

_TEXT, _VECTOR = pyarrow.large_string(), pyarrow.list_(pyarrow.float64())
#: Passages are texts or numbers of documents. All positives of a row have the same kind, and so have its negatives.
SCHEMA = pyarrow.schema(
    {
        "query": _TEXT,
        "positives": pyarrow.list_(_TEXT),
        "negatives": pyarrow.list_(_TEXT),
        "positive_documents": pyarrow.list_(pyarrow.int64()),
        "negative_documents": pyarrow.list_(pyarrow.int64()),
        "query_prompt": _TEXT,
        "passage_prompt": _TEXT,
        "scores": _VECTOR,
        "query_vector": _VECTOR,
        "passage_vectors": pyarrow.list_(_VECTOR),
        "line": pyarrow.int64(),
    }
)


def checked(rows: Rows, reader: PairReader) -> Iterator[tuple[Row, Pair | None, str]]:
    """Yield (row, its pair, "") for every usable row and (row, None, the problem) for every other row."""
    for row in read_rows(rows):
        try:
            yield row, reader.pair(row.value), ""
        except RowError as error:
            yield row, None, str(error)


def pair_of(row: list[Any], document: Callable[[int], str]) -> Pair:
    """Return the pair of a table's row; ``document`` returns the text of a document by its number."""
    query, positives, negatives, positive_documents, negative_documents, *prompts, scores, vector, vectors, _ = row
    if positive_documents is not None:
        positives = [document(number) for number in positive_documents]
    if negative_documents is not None:
        negatives = [document(number) for number in negative_documents]
    return Pair(query, positives, negatives, Teacher(scores, vector, vectors), *prompts)


def _columns(rows: list[tuple[Pair, int]]) -> list[Any]:
    """Return the columns of the table for pairs and their lines."""
    pairs, lines = zip(*rows, strict=True)
    query, positives, negatives, teachers, *prompts = zip(*pairs, strict=True)
    texts, numbers = zip(*map(_texts_and_numbers, (positives, negatives)), strict=True)
    return [query, *texts, *numbers, *prompts, *zip(*teachers, strict=True), lines]


def _texts_and_numbers(column: Sequence[list[str]]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return the passages of rows that are texts, and the numbers of those that are documents; None for the others."""
    of_documents = [bool(passages) and isinstance(passages[0], Document) for passages in column]
    if not any(of_documents):
        return column, [None] * len(column)
    both = list(zip(column, of_documents, strict=True))
    numbers = [[text.number for text in passages] if known else None for passages, known in both]  # type: ignore[attr-defined]
    return [None if known else passages for passages, known in both], numbers


def _keep(numbers: array[int], row: int, number: int) -> None:
    """Append a row's number; store nothing while all numbers count the rows from 1."""
    if numbers or number != row + 1:
        if not numbers:
            numbers.extend(range(1, row + 1))
        numbers.append(number)


def write_pairs(rows: Rows, reader: PairReader, writer: TableWriter) -> Found:
    """Write all rows and return the facts about them for :class:`megatron_embed.recipes.datasets.pairs.PairSource`.

    The arrays are ``groups``, see :meth:`megatron_embed.recipes.datasets.duplicates.TextIds.groups`, and ``ends``,
    ``[rows]`` int64, the number of examples up to and including each row, present if a row has several positives. The
    facts are the attributes of ``PairSource``.

    Raises:
        UserError: a row is unusable; the message names the first one and counts the others.
    """
    writer.columns = _columns
    first_problem, unusable = "", 0
    most, no_scores, no_vectors = 0, -1, -1
    widths: set[int] = set()
    ids, odd = TextIds(), OddRows(rows.path)
    prompts: set[str] = set()
    lines, ends, examples = array("q"), array("q"), 0
    for index, (row, pair, problem) in enumerate(checked(rows, reader)):
        if pair is None:
            first_problem = first_problem or f"{row.place}: {problem}"
            unusable += 1
            continue
        if unusable:
            continue  # the table will not be kept
        for remark in of_pair(pair):
            odd.add(remark, row.line)
        query = text_id(pair.query)
        for text in pair.positives:
            ids.add(query, text_id(text))
        examples += len(pair.positives)
        _keep(ends, index, examples)
        _keep(lines, index, row.line)
        most = max(most, len(pair.negatives))
        if pair.passage_prompt is not None:
            prompts.add(pair.passage_prompt)
        if pair.teacher.scores is None and no_scores < 0:
            no_scores = index
        if pair.teacher.passages is None:
            no_vectors = index if no_vectors < 0 else no_vectors
        else:
            widths.update(len(vector) for vector in (pair.teacher.query, *pair.teacher.passages) if vector is not None)
        writer.add((pair, row.line))
    if unusable:
        more = f" ({unusable - 1} more cannot be used)" if unusable > 1 else ""
        raise UserError(f"{rows.path}, {first_problem}{more}")
    arrays = {}
    if ends:
        arrays["ends"] = np.frombuffer(ends, dtype=np.int64)
    if (groups := ids.groups()) is not None:
        arrays["groups"] = groups
        if len(again := repeated_pairs(groups)):
            of_again = int(np.searchsorted(arrays["ends"], again[0], side="right")) if ends else int(again[0])
            odd.add(REPEATED_PAIRS, lines[of_again] if lines else of_again + 1, len(again))
    facts = {"max_negatives": most, "no_scores": no_scores, "no_vectors": no_vectors, "vector_widths": sorted(widths)}
    return Found(arrays, {**facts, "passage_prompts": sorted(prompts), "odd": odd.found})
