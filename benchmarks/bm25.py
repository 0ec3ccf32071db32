"""BM25 as ``evaluate`` reports it, on real BEIR folders, beside bm25s and pytrec_eval called without the project.

    python benchmarks/bm25.py --data scifact [FOLDER …]

The expected nDCG@10 is known for some folders (``KNOWN``); the script fails if a result differs by more than 0.01.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import bm25s
import pytrec_eval
import Stemmer
from common import write_result

from megatron_embed.recipes.datasets.beir import load_beir
from megatron_embed.recipes.retrieval.bm25 import bm25_run
from megatron_embed.recipes.retrieval.evaluation import METRICS, metrics

#: nDCG@10 of bm25s with method lucene, k1 0.9, b 0.4, English stop words and Snowball, over title and text
KNOWN = {"scifact": 0.676, "nfcorpus_proc": 0.328, "liveqa_medquad": 0.552}
ALLOWED = 0.01


def ndcg_without_us(folder: Path) -> float:
    """Return the mean nDCG@10 of the test split, by json, bm25s and pytrec_eval alone.

    The mean is over queries with a relevant document; ``liveqa_medquad`` also judges queries without one.
    """
    judged: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for line in (folder / "qrels" / "test.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        query, document, grade = line.split("\t")
        judged[query][document] = int(grade)
    corpus, queries = (
        [json.loads(line) for line in (folder / name).open(encoding="utf-8")]
        for name in ("corpus.jsonl", "queries.jsonl")
    )
    qrels = {query: grades for query, grades in judged.items() if max(grades.values()) > 0}
    queries = [row for row in queries if row["_id"] in qrels]
    stemmer = Stemmer.Stemmer("english")
    texts = [f"{row.get('title', '')} {row['text']}" for row in corpus]
    index = bm25s.BM25(method="lucene", k1=0.9, b=0.4)
    index.index(bm25s.tokenize(texts, stopwords="en", stemmer=stemmer, show_progress=False), show_progress=False)
    words = bm25s.tokenize([row["text"] for row in queries], stopwords="en", stemmer=stemmer, show_progress=False)
    found, scores = index.retrieve(words, corpus=[row["_id"] for row in corpus], k=100, show_progress=False)
    run = {
        row["_id"]: dict(zip(documents, map(float, values), strict=True))
        for row, documents, values in zip(queries, found.tolist(), scores.tolist(), strict=True)
    }
    each = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10"}).evaluate(run)
    return sum(each[query]["ndcg_cut_10"] for query in qrels) / len(qrels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="BEIR folders with a test split")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    table = [
        f"| collection | documents | queries | {' | '.join(METRICS)} | bm25s and pytrec_eval alone: ndcg@10 | known |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for folder in options.data:
        collection = load_beir(folder)
        ours = metrics(collection.qrels, bm25_run(collection))
        alone, known = ndcg_without_us(folder), KNOWN.get(folder.name)
        cells = [folder.name, f"{len(collection.corpus):,}", f"{len(collection.queries):,}"]
        cells += [f"{ours[name]:.4f}" for name in METRICS] + [f"{alone:.4f}", "–" if known is None else str(known)]
        table.append(f"| {' | '.join(cells)} |")
        print(table[-1], flush=True)
        assert known is None or abs(ours["ndcg@10"] - known) <= ALLOWED, f"{folder}: wanted {known} ± {ALLOWED}"
    settings = {"data": [folder.name for folder in options.data], "bm25s": "lucene, k1 0.9, b 0.4, English, Snowball"}
    if not options.no_write:
        write_result("bm25", "BM25 on real collections", "\n".join(table), settings)


if __name__ == "__main__":
    main()
