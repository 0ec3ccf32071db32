"""The rules that choose a query's hard negatives among the documents that a model finds for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_embed.bridge.errors import UsageError
from megatron_embed.recipes.datasets.odd_rows import OddRows
from megatron_embed.recipes.datasets.pair import Pair, Teacher
from megatron_embed.recipes.datasets.pairs import PairSource
from megatron_embed.recipes.datasets.text_ids import text_id

#: reasons to drop a candidate, in the order in which they are checked
REASONS = (
    "known positive",
    "same text as the query",
    "no text",
    "same text as a better candidate",
    "above max-score-ratio",
    "above margin",
)
_BY_SCORE = REASONS[4:]

BINS = 100
_COUNTS = ("queries", "short", "without", "candidates", "kept", "spare", "scores_dropped", "vectors_dropped")


@dataclass(frozen=True)
class MiningRules:
    """The rules for hard negatives.

    Attributes:
        negatives: most negatives of a query: the best ranked of those that the rules leave.
        ranks: first and last + 1 of the considered ranks, from 0, over the whole corpus, positives included.
        max_score_ratio: highest score of a negative as a share of the lowest-scoring positive's score p. For p below 0
            the limit is as far below p as for a positive p: ``p − (1 − ratio)·|p|``. Infinite: no limit.
        margin: a negative scores at most the lowest-scoring positive's score minus this margin. None: no limit.
    """

    negatives: int = 4
    ranks: tuple[int, int] = (0, 100)
    max_score_ratio: float = 0.95
    margin: float | None = None

    def __post_init__(self) -> None:
        first, last = self.ranks
        if not 0 <= first < last:
            raise UsageError(f"--rank-range: found {first}:{last}; wanted A:B with 0 <= A < B")
        if self.negatives < 1 or not self.max_score_ratio > 0:
            raise UsageError(
                f"--negatives {self.negatives} --max-score-ratio {self.max_score_ratio:g}: wanted numbers above 0"
            )

    def ratio_limit(self, positive: float) -> float:
        """Return the highest score that ``max_score_ratio`` allows a negative, given the positive's score."""
        return positive - (1 - self.max_score_ratio) * abs(positive) if positive else 0.0

    def margin_limit(self, positive: float) -> float:
        """Return the highest score that ``margin`` allows a negative, given the positive's score."""
        return np.inf if self.margin is None else positive - self.margin


class KnownPositives:
    """All positives of each query text, over all rows of the data; takes 16 bytes for each example."""

    def __init__(self, source: PairSource) -> None:
        pairs = np.empty((len(source), 2), dtype=np.uint64)
        for row in range(source.rows):
            pair, examples = source.pair(row), source.examples(row)
            pairs[examples.start : examples.stop, 0] = text_id(pair.query)
            pairs[examples.start : examples.stop, 1] = [text_id(text) for text in pair.positives]
        order = np.argsort(pairs[:, 0], kind="stable")
        self._queries, self._positives = pairs[order].T.copy()

    def of(self, query: str) -> np.ndarray:
        """Return the identities of the query's positives."""
        wanted = np.uint64(text_id(query))  # NumPy would compare a Python int in floating point
        first = np.searchsorted(self._queries, wanted)
        last = np.searchsorted(self._queries, wanted, side="right")
        return self._positives[first:last]


@dataclass
class Audit:
    """Counts of the candidates' fates, and histograms of the scores (``BINS`` equal parts of ±``bound``).

    Attributes:
        odd: odd rows of the corpus and of the training data.
        scores_dropped, vectors_dropped: number of rows whose teacher's scores or vectors are missing in the output, see
            :func:`teacher_answers_for`.
    """

    bound: float = 1.0
    odd: list[OddRows] = field(default_factory=list)
    queries: int = 0
    short: int = 0
    without: int = 0
    candidates: int = 0
    kept: int = 0
    spare: int = 0
    scores_dropped: int = 0
    vectors_dropped: int = 0
    dropped: np.ndarray = field(default_factory=lambda: np.zeros(len(REASONS), dtype=np.int64))
    histograms: np.ndarray = field(default_factory=lambda: np.zeros((3, BINS), dtype=np.int64))

    def numbers(self) -> np.ndarray:
        """Return all counts in one array, to sum over ranks; :meth:`take` is the inverse."""
        single = np.array([getattr(self, name) for name in _COUNTS], dtype=np.int64)
        return np.concatenate([single, self.dropped, self.histograms.ravel()])

    def take(self, numbers: np.ndarray) -> None:
        """Replace all counts by those of an array from :meth:`numbers`."""
        single, self.dropped, histograms = np.split(numbers, np.cumsum([len(_COUNTS), len(REASONS)]))
        for name, number in zip(_COUNTS, single.tolist(), strict=True):
            setattr(self, name, number)
        self.histograms = histograms.reshape(3, BINS)

    def count(self, group: int, scores: np.ndarray) -> None:
        """Add scores to a histogram: group 0 for positives, 1 for negatives, 2 for texts dropped for their score."""
        edges = np.linspace(-self.bound, self.bound, BINS + 1)
        self.histograms[group] += np.histogram(np.clip(scores, -self.bound, self.bound), edges)[0]


def choose_negatives(
    rules: MiningRules,
    scores: np.ndarray,
    rows: np.ndarray,
    *,
    query: str,
    positives: np.ndarray,
    known: np.ndarray,
    text_ids: np.ndarray,
    audit: Audit,
) -> np.ndarray:
    """Return the places of a query's hard negatives in its ranking, and count its candidates in ``audit``.

    Args:
        scores, rows: ``[k]`` the ranking from rank 0 on, best first; row −1 means no document.
        positives: scores of the query's positives.
        known: identities of its known positives.
        text_ids: ``[corpus, 2]`` identities of each document with and without its title.
    """
    first, last = rules.ranks
    places = np.arange(first, min(last, len(rows)))
    places = places[rows[places] >= 0]
    ids, found = text_ids[rows[places]], scores[places]
    earlier = np.ones(len(places), dtype=bool)
    earlier[np.unique(ids[:, 0], return_index=True)[1]] = False
    lowest = float(positives.min())
    reasons: tuple[Any, ...] = (
        np.isin(ids, known).any(axis=1),
        (ids == text_id(query)).any(axis=1),
        ids[:, 0] == text_id(""),
        earlier,
        found > rules.ratio_limit(lowest),
        found > rules.margin_limit(lowest),
    )
    left = np.ones(len(places), dtype=bool)
    for number, (name, reason) in enumerate(zip(REASONS, reasons, strict=True)):
        audit.dropped[number] += int((left & reason).sum())
        if name in _BY_SCORE:
            audit.count(2, found[left & reason])
        left &= ~reason
    chosen = places[left][: rules.negatives]
    audit.queries += 1
    audit.short += len(chosen) < rules.negatives
    audit.without += len(chosen) == 0
    audit.candidates += len(places)
    audit.kept += len(chosen)
    audit.spare += int(left.sum()) - len(chosen)
    audit.count(0, positives)
    audit.count(1, scores[chosen])
    return chosen


def teacher_answers_for(pair: Pair, negatives: list[str]) -> Teacher:
    """Return the teacher's answers for a row's positives and the given negatives, if the row has all of them.

    If one negative is new to the teacher, return no answers at all, because training takes answers for all texts of a
    row or for none.
    """
    place = {text: number for number, text in enumerate(pair.negatives)}
    if not all(text in place for text in negatives):
        return Teacher()
    kept = [*range(len(pair.positives)), *(len(pair.positives) + place[text] for text in negatives)]
    scores, query, passages = pair.teacher
    return Teacher(scores and [scores[i] for i in kept], query, passages and [passages[i] for i in kept])
