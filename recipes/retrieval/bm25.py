"""BM25, the baseline of every evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_embed.recipes.datasets.beir import Collection


def bm25_run(collection: Collection, k: int = 100) -> dict[str, dict[str, float]]:
    """Return the ``k`` best documents of every query: query id → {document id: score}.

    The scores are those of bm25s with Lucene's formula, k1 0.9, b 0.4, English stop words and the Snowball stemmer,
    over title and text. A word has at least two letters. No query finds a document without words.
    """
    import bm25s
    import Stemmer

    documents = list(collection.corpus)
    stemmer = Stemmer.Stemmer("english")
    index = bm25s.BM25(method="lucene", k1=0.9, b=0.4)
    quiet: dict[str, Any] = {"show_progress": False}
    words = bm25s.tokenize(list(collection.corpus.values()), stopwords="en", stemmer=stemmer, **quiet)
    if not any(map(len, words.ids)):  # bm25s raises an error on a corpus without words
        return {query: {} for query in collection.queries}
    index.index(words, **quiet)
    queries = bm25s.tokenize(list(collection.queries.values()), stopwords="en", stemmer=stemmer, **quiet)
    found, scores = index.retrieve(queries, k=min(k, len(documents)), **quiet)
    return {
        query: {documents[i]: float(score) for i, score in zip(row, values, strict=True) if score > 0}
        for query, row, values in zip(collection.queries, np.asarray(found), np.asarray(scores), strict=True)
    }
