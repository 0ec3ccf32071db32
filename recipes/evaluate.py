"""Retrieval quality on BEIR folders, with BM25 beside it.

``python -m megatron_embed.recipes.evaluate --model HF_FOLDER_OR_MEGATRON_CHECKPOINT --data BEIR_FOLDER …``
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from megatron_embed.bridge.errors import named
from megatron_embed.conversion.declared_attention import HELP
from megatron_embed.recipes.beir import Collection, load_beir, load_collections
from megatron_embed.recipes.bm25 import bm25_run
from megatron_embed.recipes.cli import FirstRankParser, run_program
from megatron_embed.recipes.inputs import check_writable
from megatron_embed.recipes.odd_rows import report
from megatron_embed.recipes.vectors import write_file

__all__ = ["METRICS", "Collection", "evaluate", "load_beir", "main", "markdown_table", "metrics", "rank", "score"]

METRICS = ("ndcg@10", "recall@100", "mrr@10")
Metrics = dict[str, float]
Run = Mapping[str, Mapping[str, float]]
#: texts, "query" or "passage" → [n, d]
Encode = Callable[[Sequence[str], Any], np.ndarray]

_DEPTH = 100  # the deepest metric


def rank(
    queries: np.ndarray, passages: np.ndarray, k: int, *, chunk: int = 65536, query_chunk: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
    """Exact top ``k`` by dot product (the cosine of normalised vectors), in fp32, chunk by chunk.

    Args:
        queries: ``[q, d]``.
        passages: ``[n, d]``.

    Returns:
        scores and passage indices, both ``[q, min(k, n)]``, best first.
    """
    import torch

    k = min(k, len(passages))
    scores = np.empty((len(queries), k), dtype=np.float32)
    indices = np.empty((len(queries), k), dtype=np.int64)
    for first in range(0, len(queries), query_chunk):
        rows = slice(first, min(first + query_chunk, len(queries)))
        block = torch.as_tensor(queries[rows], dtype=torch.float32)
        best, where = torch.empty(len(block), 0), torch.empty(len(block), 0, dtype=torch.long)
        for start in range(0, len(passages), chunk):
            part = torch.as_tensor(passages[start : start + chunk], dtype=torch.float32)
            new, position = (block @ part.T).topk(min(k, len(part)), dim=1)
            best, where = torch.cat([best, new], dim=1), torch.cat([where, position + start], dim=1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            where = where.gather(1, order)
        scores[rows], indices[rows] = best.numpy(), where.numpy()
    return scores, indices


def metrics(qrels: Mapping[str, Mapping[str, int]], run: Run) -> Metrics:
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
    scores, indices = rank(queries, passages, _DEPTH)
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


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The command line; exit status 0, 1 (failed, one message) or 2 (bad arguments)."""
    parser = FirstRankParser(prog="megatron_embed.recipes.evaluate", description="Evaluate on BEIR folders.")
    parser.add_argument("--model", required=True, help="Hugging Face folder or Megatron checkpoint")
    parser.add_argument("--data", required=True, nargs="+", metavar="BEIR_FOLDER", help="collections")
    parser.add_argument("--split", default="test", help="qrels/SPLIT.tsv (default: test)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the numbers there too")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--bidirectional", action="store_true", help=HELP)
    parser.add_argument("--no-bm25", action="store_true", help="leave BM25 out")
    parser.add_argument("--strict", action="store_true", help="rows and judgements that look odd are an error")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    run_program(lambda: _run(args), debug=args.debug)


def _run(args: argparse.Namespace) -> None:
    if args.output:
        with named("--output"):
            check_writable(args.output.parent)
    first_rank = os.environ.get("RANK", "0") == "0"
    collections = load_collections(args.data, args.split)
    if first_rank or args.strict:  # an error ends all ranks
        report([odd for collection in collections for odd in collection.odd], strict=args.strict)
    from megatron_embed.recipes.encode import Encoder

    with Encoder.from_pretrained(
        args.model, device=args.device, bidirectional=args.bidirectional, scores=True
    ) as encoder:

        def encode(texts: Sequence[str], kind: Any) -> np.ndarray:
            return encoder.encode(texts, kind=kind, show_progress=sys.stderr.isatty())

        results = evaluate(encode, collections, bm25=not args.no_bm25)
    if not first_rank:
        return
    print(markdown_table(results))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(results, indent=2) + "\n"
        write_file(args.output, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()
