"""BM25 against Lucene's formula, written out, and Snowball's stems."""

from __future__ import annotations

import math
import random
import re
from collections import Counter

import pytest
import Stemmer

from megatron_embed.recipes.datasets.beir import Collection
from megatron_embed.recipes.retrieval.bm25 import bm25_run

WORDS = ["running", "runs", "runner", "the", "of", "connection", "connected", "ships", "shipping", "harbour", "a", "x"]
#: those of the words above that are no words to BM25: English stop words, and what has one letter
LEFT_OUT = {"the", "of", "a", "x"}


def collection(corpus: dict[str, str], queries: dict[str, str]) -> Collection:
    return Collection("words", corpus, queries, {query: {} for query in queries})


def stems(text: str) -> list[str]:
    stemmer = Stemmer.Stemmer("english")
    return [stemmer.stemWord(word) for word in re.findall(r"\w+", text.lower()) if word not in LEFT_OUT]


def by_formula(corpus: dict[str, str], query: str, k1: float = 0.9, b: float = 0.4) -> dict[str, float]:
    """Robertson and Zaragoza 2009 with Lucene's idf, ln(1 + (N - n + 0.5) / (n + 0.5)), over the query's stems."""
    documents = {id_: Counter(stems(text)) for id_, text in corpus.items()}
    mean = sum(sum(counts.values()) for counts in documents.values()) / len(documents)
    found = {}
    for id_, counts in documents.items():
        norm = k1 * (1 - b + b * sum(counts.values()) / mean)
        score = 0.0
        for stem in stems(query):  # a word said twice counts twice, as in Lucene
            holding = sum(stem in other for other in documents.values())
            idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
            score += idf * counts[stem] / (counts[stem] + norm)
        if score:
            found[id_] = score
    return found


def test_scores_are_lucenes() -> None:
    generator = random.Random(0)
    corpus = {f"d{i}": " ".join(generator.choices(WORDS, k=generator.randint(1, 30))).title() for i in range(40)}
    queries = {f"q{i}": " ".join(generator.sample(WORDS, 4)) for i in range(20)}
    found = bm25_run(collection(corpus, queries))
    for id_, query in queries.items():
        assert found[id_] == pytest.approx(by_formula(corpus, query), rel=1e-5)
    few = bm25_run(collection(corpus, queries), k=3)
    for id_, scores in few.items():
        assert sorted(scores.values()) == sorted(sorted(found[id_].values())[-3:])


def test_texts_without_any_word() -> None:
    queries = {"q0": "the", "q1": "zebra", "q2": "Ships"}
    assert bm25_run(collection({"d0": "a", "d1": "the"}, queries)) == {"q0": {}, "q1": {}, "q2": {}}
    found = bm25_run(collection({"d0": "", "d1": "ship"}, queries))
    assert {query: list(scores) for query, scores in found.items()} == {"q0": [], "q1": [], "q2": ["d1"]}
