"""Inspect a data file as training will read it."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from megatron_embed.recipes.config.schema import DataSource
from megatron_embed.recipes.datasets.duplicates import repeats
from megatron_embed.recipes.datasets.forms import PairReader
from megatron_embed.recipes.datasets.odd_rows import REPEATED_PAIRS, OddRows, of_pair
from megatron_embed.recipes.datasets.pair import Pair
from megatron_embed.recipes.datasets.pair_table import checked
from megatron_embed.recipes.datasets.pairs import open_source
from megatron_embed.recipes.datasets.rows import Rows

if TYPE_CHECKING:
    from megatron_embed.recipes.datasets.tokenization import Kind, TextTokenizer

_SHOWN = 20  # problems to list one by one
_SAMPLES = 3
_TOKENIZED = 1000  # rows to measure in tokens, because ten million rows would take minutes


@dataclass
class Findings:
    """The findings of :func:`look_through` in one file."""

    rows: Rows
    reader: PairReader
    form: str
    odd: OddRows
    count: int = 0
    examples: int = 0
    with_negatives: int = 0
    #: kind of text → {number of characters: number of texts}
    lengths: dict[str, Counter[int]] = field(
        default_factory=lambda: {"query": Counter(), "positive": Counter(), "negative": Counter()}
    )
    duplicate_queries: int = 0
    duplicate_pairs: int = 0
    #: number of unusable rows; ``problems`` describes the first ones
    unusable: int = 0
    problems: list[str] = field(default_factory=list)
    samples: list[Pair] = field(default_factory=list)


def look_through(path: str, stated: Collection[str] = ()) -> Findings:
    """Read every row of a source and return the findings, with lengths in characters. Keep 24 bytes for each pair.

    Args:
        stated: see :class:`megatron_embed.recipes.datasets.forms.PairReader`.
    """
    rows = open_source(path)
    reader = PairReader(rows, stated)
    found = Findings(rows, reader, f"{rows.form}; {reader.form.name}", OddRows(rows.path))
    queries, pairs, line_of_pair = array("q"), array("q"), array("q")
    for row, pair, problem in checked(rows, reader):
        found.count += 1
        if pair is None:
            found.unusable += 1
            if len(found.problems) < _SHOWN:
                found.problems.append(f"{row.place}: {problem}")
            continue
        for remark in of_pair(pair):
            found.odd.add(remark, row.line)
        found.examples += len(pair.positives)
        found.with_negatives += bool(pair.negatives)
        found.lengths["query"][len(pair.query)] += 1
        found.lengths["positive"].update(map(len, pair.positives))
        found.lengths["negative"].update(map(len, pair.negatives))
        query = pair.query.strip()  # text_id also ignores white space around a text
        queries.append(hash(query))
        pairs.extend(hash((query, positive.strip())) for positive in pair.positives)
        line_of_pair.extend([row.line] * len(pair.positives))
        if len(found.samples) < _SAMPLES:
            found.samples.append(pair)
    found.duplicate_queries = len(_repeats(queries))
    again = _repeats(pairs)
    found.duplicate_pairs = len(again)
    if len(again):
        found.odd.add(REPEATED_PAIRS, line_of_pair[again[0]], len(again))
    return found


def _repeats(hashes: array[int]) -> np.ndarray:
    """Return the positions of hashes that occurred earlier."""
    return repeats(np.frombuffer(hashes, dtype=np.int64))


def findings_as_text(found: Findings, source: DataSource, tokenizer: TextTokenizer | None = None) -> str:
    """Return the findings as text, with samples that include their prompts.

    Args:
        source: the source with its prompts filled in.
        tokenizer: if given, samples are truncated and show BOS and EOS.
    """

    def seen(text: str, kind: Kind, prompt: str) -> str:
        if tokenizer is None:
            return _clip(prompt + text)
        (ids,) = tokenizer.tokenize([text], kind, [prompt])
        return f"{_clip(tokenizer.tokenizer.decode(ids))}, {len(ids)} tokens"

    rows = found.rows
    lines = [
        f"{rows.path}",
        f"  form       {found.form}",
        f"  rows       {found.count:,}",
        f"  examples   {found.examples:,} (query, positive) pairs, {found.with_negatives:,} rows with hard negatives",
        f"  duplicates {found.duplicate_queries:,} repeated queries, {found.duplicate_pairs:,} repeated pairs",
    ]
    for name, lengths in found.lengths.items():
        if lengths:
            low, middle, high, most = _percentiles(lengths, [5, 50, 95, 100])
            lines.append(f"  {name:10} characters: 5 % {low:,}, median {middle:,}, 95 % {high:,}, most {most:,}")
    for corpus, prompts in found.reader.found.instructions.items():
        own = [f"{key} {prompt!r}" for key, prompt in prompts.items() if key not in found.reader.stated]
        lines.extend([f"  prompts    of corpus {corpus!r}, by its instructions: {', '.join(own)}"] if own else [])
    if tokenizer is not None:
        lines.extend(_in_tokens(found, source, tokenizer))
    for pair in found.samples:
        query, passage = _prompts(pair, source)
        lines.append(f"  sample     {seen(pair.query, 'query', query)}")
        lines.append(f"             + {seen(pair.positives[0], 'passage', passage)}")
        lines.extend(f"             - {seen(text, 'passage', passage)}" for text in pair.negatives[:1])
    lines.extend(f"  remarks    {remark}" for remark in found.odd.remarks())
    if found.problems:
        lines.append(f"  problems   {found.unusable:,} rows cannot be used:")
        lines.extend(f"    {problem}" for problem in found.problems)
        if found.unusable > _SHOWN:
            lines.append(f"    … and {found.unusable - _SHOWN:,} more")
    else:
        lines.append("  problems   none")
    return "\n".join(lines)


def _prompts(pair: Pair, source: DataSource) -> tuple[str, str]:
    """Return the prompts of a row's query and passages: its own, else the source's."""
    query = source.query_prompt if pair.query_prompt is None else pair.query_prompt
    passage = source.passage_prompt if pair.passage_prompt is None else pair.passage_prompt
    return query or "", passage or ""


def _in_tokens(found: Findings, source: DataSource, tokenizer: TextTokenizer) -> list[str]:
    """Measure rows spread over the source in tokens, as the model gets them; return lines on lengths and truncation."""
    reader, lengths = found.reader, {"query": Counter[int](), "passage": Counter[int]()}
    wanted = set(np.linspace(0, found.count - 1, _TOKENIZED).astype(int).tolist())
    for number, (_, pair, _) in enumerate(checked(found.rows, reader)):
        if number in wanted and pair is not None:
            query, passage = _prompts(pair, source)
            passages = [*pair.positives, *pair.negatives]
            lengths["query"].update(map(len, tokenizer.tokenize([pair.query], "query", [query])))
            lengths["passage"].update(map(len, tokenizer.tokenize(passages, "passage", [passage] * len(passages))))
    lines = []
    for kind, counts in lengths.items():
        if counts:
            limit = tokenizer.max_lengths[kind]  # type: ignore[index]
            low, middle, high = _percentiles(counts, [5, 50, 95])
            full = counts[limit] / counts.total()
            lines.append(
                f"  {kind:10} tokens: 5 % {low:,}, median {middle:,}, 95 % {high:,}; "
                f"{full:.1%} reach the maximal length of {limit:,}"
            )
    return lines


def _percentiles(counts: Counter[int], wanted: Sequence[float]) -> list[int]:
    """Return, for each percentage in ``wanted``, the least value that so many percent of the values do not exceed."""
    values = np.array(sorted(counts))
    reached = np.cumsum([counts[value] for value in values.tolist()])
    return [int(values[np.searchsorted(reached, reached[-1] * share / 100)]) for share in wanted]


def _clip(text: str, length: int = 100) -> str:
    """Return at most ``length`` characters: the beginning, and the end, which shows EOS."""
    return repr(text if len(text) <= length else f"{text[: length - 21]}…{text[-20:]}")
