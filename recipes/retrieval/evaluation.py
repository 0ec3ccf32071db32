"""Retrieval quality on BEIR folders, with BM25 beside it."""

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

_DEPTH = 100  # the deepest metric


def rank_passages(
    queries: np.ndarray, passages: np.ndarray, k: int, *, chunk: int = 65536, query_chunk: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
    """Exact top ``k`` by dot product (the cosine of normalised vectors), in fp32, chunk by chunk.

    Args:
        queries: ``[q, d]``.
        passages: ``[n, d]``.

    Returns:
        scores and passage indices, both ``[q, min(k, n)]``, best first, equal scores by passage.
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
    """nDCG@10, Recall@100 and MRR@10 by pytrec_eval, the mean over the queries of ``qrels``.

    A query without any ranked document counts 0.
    """
    import pytrec_eval

    judged = {query: dict(grades) for query, grades in qrels.items()}
    ranked = {query: dict(run.get(query, {})) for query in judged}
    # recip_rank knows no depth, so it is given ten documents; trec_eval breaks ties by the greater document id
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
    """Metrics of the vectors of a collection's queries ``[q, d]`` and documents ``[n, d]``, in its order."""
    documents = list(collection.corpus)
    scores, indices = rank_passages(queries, passages, _DEPTH)
    run = {
        query: {documents[i]: float(value) for i, value in zip(row, values, strict=True)}
        for query, row, values in zip(collection.queries, indices, scores, strict=True)
    }
    return metrics(collection.qrels, run)


def evaluate(encode: Encode, collections: Sequence[Collection], *, bm25: bool = False) -> dict[str, dict[str, Any]]:
    """Measure a model.

    Args:
        encode: (texts, ``"query"`` or ``"passage"``) → ``[n, d]``, whose scalar products rank, as
            ``Encoder.from_pretrained(…, scores=True).encode`` gives them. Under torchrun every rank must call this, if
            every rank takes part in the encoding.
        bm25: measure BM25 too.

    Returns:
        collection name → ``{"ndcg@10": …, "recall@100": …, "mrr@10": …}``, and ``"bm25": {the same}`` if wanted.
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
    """What :func:`evaluate` returns, one row a collection and system."""
    lines = [f"| collection | system | {' | '.join(METRICS)} |", f"|---|---|{'---:|' * len(METRICS)}"]
    for collection, found in results.items():
        systems = {"model": found} | ({"BM25": found["bm25"]} if "bm25" in found else {})
        for system, values in systems.items():
            lines.append(f"| {collection} | {system} | {' | '.join(f'{values[name]:.4f}' for name in METRICS)} |")
    return "\n".join(lines)
