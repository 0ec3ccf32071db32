"""Retrieval quality of a model and of BM25 on BEIR folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from megatron_embed.recipes.datasets.beir import Collection
from megatron_embed.recipes.retrieval.bm25 import bm25_run

METRICS = ("ndcg@10", "recall@100", "mrr@10")
Metrics = dict[str, float]
Rankings = Mapping[str, Mapping[str, float]]
#: texts, "query" or "passage" → [n, d]
Encode = Callable[[Sequence[str], Any], np.ndarray]

_DEPTH = 100  # documents that the deepest metric, Recall@100, needs


def rank_passages(
    queries: np.ndarray, passages: np.ndarray, k: int, *, chunk: int = 65536, query_chunk: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
    """Find the exact top ``k`` by dot product (the cosine of normalised vectors) in fp32, chunk by chunk.

    Args:
        queries: ``[q, d]``.
        passages: ``[n, d]``.

    Returns:
        Scores and passage indices, both ``[q, min(k, n)]``, best first, equal scores by passage.
    """
    import torch

    from megatron_embed.recipes.retrieval.top_k import top_k

    k = min(k, len(passages))
    scores = np.empty((len(queries), k), dtype=np.float32)
    rows = np.empty((len(queries), k), dtype=np.int64)
    for first in range(0, len(queries), query_chunk):
        block = slice(first, min(first + query_chunk, len(queries)))
        parts = (
            (start, torch.as_tensor(passages[start : start + chunk], dtype=torch.float32))
            for start in range(0, len(passages), chunk)
        )
        best, where = top_k(torch.as_tensor(queries[block], dtype=torch.float32), parts, k)
        scores[block], rows[block] = best.numpy(), where.numpy()
    return scores, rows


def metrics(qrels: Mapping[str, Mapping[str, int]], run: Rankings) -> Metrics:
    """Return nDCG@10, Recall@100 and MRR@10 by pytrec_eval, each the mean over the queries of ``qrels``.

    A query without ranked documents counts 0.
    """
    import pytrec_eval

    judged = {query: dict(grades) for query, grades in qrels.items()}
    ranked = {query: dict(run.get(query, {})) for query in judged}
    # recip_rank has no depth, so it gets only ten documents. trec_eval puts the greater document id first in ties.
    top = {
        query: dict(sorted(documents.items(), key=lambda item: (item[1], item[0]), reverse=True)[:10])
        for query, documents in ranked.items()
    }
    deep = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.10", "recall.100"}).evaluate(ranked)
    first = pytrec_eval.RelevanceEvaluator(judged, {"recip_rank"}).evaluate(top)

    def mean(results: Mapping[str, Mapping[str, float]], name: str) -> float:
        return sum(results.get(query, {}).get(name, 0.0) for query in judged) / len(judged)

    return {
        "ndcg@10": mean(deep, "ndcg_cut_10"),
        "recall@100": mean(deep, "recall_100"),
        "mrr@10": mean(first, "recip_rank"),
    }


def score(collection: Collection, queries: np.ndarray, passages: np.ndarray) -> Metrics:
    """Return the metrics of vectors of a collection's queries ``[q, d]`` and documents ``[n, d]``, in its order."""
    documents = list(collection.corpus)
    scores, indices = rank_passages(queries, passages, _DEPTH)
    run = {
        query: {documents[i]: float(value) for i, value in zip(row, values, strict=True)}
        for query, row, values in zip(collection.queries, indices, scores, strict=True)
    }
    return metrics(collection.qrels, run)


def evaluate(encode: Encode, collections: Sequence[Collection], *, bm25: bool = False) -> dict[str, dict[str, Any]]:
    """Measure a model on collections.

    Args:
        encode: (texts, ``"query"`` or ``"passage"``) → vectors ``[n, d]`` whose scalar products rank, such as
            ``Encoder.from_pretrained(…, scores=True).encode``. If every rank takes part in the encoding, every rank
            must call :func:`evaluate`.
        bm25: measure BM25 too.

    Returns:
        Collection name → ``{"ndcg@10": …, "recall@100": …, "mrr@10": …}``, with ``"bm25": {the same}`` if asked for.
    """
    results: dict[str, dict[str, Any]] = {}
    for collection in collections:
        vectors = [
            encode(list(texts.values()), kind)
            for texts, kind in ((collection.queries, "query"), (collection.corpus, "passage"))
        ]
        results[collection.name] = dict(score(collection, *vectors))
        if bm25:
            results[collection.name]["bm25"] = metrics(collection.qrels, bm25_run(collection))
    return results


def markdown_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the results of :func:`evaluate` as a table, one row for each collection and system."""
    lines = [f"| collection | system | {' | '.join(METRICS)} |", f"|---|---|{'---:|' * len(METRICS)}"]
    for collection, found in results.items():
        systems = {"model": found} | ({"BM25": found["bm25"]} if "bm25" in found else {})
        for system, values in systems.items():
            lines.append(f"| {collection} | {system} | {' | '.join(f'{values[name]:.4f}' for name in METRICS)} |")
    return "\n".join(lines)
