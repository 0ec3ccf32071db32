"""Every row of a training source read once, so that a bad line ends a run before it began."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes.data_index import Index
from megatron_embed.recipes.duplicates import TextIds, repeated_pairs
from megatron_embed.recipes.formats import PairReader
from megatron_embed.recipes.json_text import RowError
from megatron_embed.recipes.odd_rows import REPEATED_PAIRS, OddRows, of_pair
from megatron_embed.recipes.pairs import Pair
from megatron_embed.recipes.rows import Rows, place
from megatron_embed.recipes.text_ids import text_id


def checked(rows: Rows, reader: PairReader) -> Iterator[tuple[Pair | None, str]]:
    """(pair, "") of every row, or (None, what is wrong with it)."""
    for value in rows.scan():
        try:
            yield reader.pair(value), ""
        except RowError as error:
            yield None, str(error)


def read_through(rows: Rows, reader: PairReader) -> Index:
    """What :class:`megatron_embed.recipes.data.PairSource` has to know of all rows.

    Arrays: ``groups``, see :meth:`megatron_embed.recipes.duplicates.TextIds.groups`; ``ends``, ``[rows]`` int64, the
    examples up to and with each row, where any has several positives. Facts: the attributes of ``PairSource``.

    Raises:
        UserError: a row that cannot be used; the first is named, the others are counted.
    """
    first_problem, unusable, counts = "", 0, np.ones(len(rows), dtype=np.int32)
    most, no_scores, no_vectors = 0, -1, -1
    widths: set[int] = set()
    ids, odd = TextIds(), OddRows(rows.path)
    prompts: set[str] = set()
    for index, (pair, problem) in enumerate(checked(rows, reader)):
        if pair is None:
            first_problem = first_problem or f"{place(rows, index)}: {problem}"
            unusable += 1
            continue
        if len(pair.positives) != 1:
            counts[index] = len(pair.positives)
        for remark in of_pair(pair):
            odd.add(remark, rows.line(index))
        query = text_id(pair.query)
        for text in pair.positives:
            ids.add(query, text_id(text))
        most = max(most, len(pair.negatives))
        if pair.passage_prompt is not None:
            prompts.add(pair.passage_prompt)
        if pair.teacher.scores is None and no_scores < 0:
            no_scores = index
        if pair.teacher.passages is None:
            no_vectors = index if no_vectors < 0 else no_vectors
        else:
            widths.update(len(vector) for vector in (pair.teacher.query, *pair.teacher.passages) if vector is not None)
    if unusable:
        more = f" ({unusable - 1} more cannot be used)" if unusable > 1 else ""
        raise UserError(f"{rows.path}, {first_problem}{more}")
    arrays = {}
    if not (counts == 1).all():
        arrays["ends"] = np.cumsum(counts, dtype=np.int64)
    if (groups := ids.groups()) is not None:
        arrays["groups"] = groups
        if len(again := repeated_pairs(groups)):
            row = int(np.searchsorted(arrays["ends"], again[0], side="right")) if "ends" in arrays else int(again[0])
            odd.add(REPEATED_PAIRS, rows.line(row), len(again))
    rows.check_unchanged()
    facts = {"max_negatives": most, "no_scores": no_scores, "no_vectors": no_vectors, "vector_widths": sorted(widths)}
    return Index(arrays, {**facts, "passage_prompts": sorted(prompts), "odd": odd.found})
