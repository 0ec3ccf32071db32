"""Evaluate an exported model with `mteb <https://github.com/embeddings-benchmark/mteb>`_ on a BEIR folder, offline.

    pip install mteb
    python examples/mteb_local_task.py MODEL_FOLDER BEIR_FOLDER

The export is a plain sentence-transformers model, so mteb loads it unchanged and uses its prompts. The numbers are
those of ``python -m megatron_embed.recipes.evaluate --model MODEL_FOLDER --data BEIR_FOLDER``.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # must be set before the first import of a Hugging Face package

import argparse
from pathlib import Path
from typing import Any

import mteb
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from sentence_transformers import SentenceTransformer

from megatron_embed.recipes.datasets.beir import load_beir


def local_task(folder: Path, split: str = "test") -> AbsTaskRetrieval:
    """Return a BEIR folder as an mteb task, without queries that no document answers, as everywhere in this project."""
    collection = load_beir(folder, split)

    class LocalRetrieval(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name=collection.name,
            description=f"the folder {folder}",
            type="Retrieval",
            category="t2t",
            eval_splits=[split],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
            dataset={"path": str(folder), "revision": "local"},  # required, but unused by our load_data
        )

        def load_data(self, *_args: Any, **_kwargs: Any) -> None:
            corpus = {"id": list(collection.corpus), "text": list(collection.corpus.values())}
            queries = {"id": list(collection.queries), "text": list(collection.queries.values())}
            self.dataset = {
                "default": {
                    split: {
                        "corpus": Dataset.from_dict(corpus),
                        "queries": Dataset.from_dict(queries),
                        "relevant_docs": collection.qrels,
                        "top_ranked": None,
                    }
                }
            }
            self.data_loaded = True

    return LocalRetrieval()


def evaluate(model: Path, folder: Path, split: str = "test") -> dict[str, float]:
    """Return all of mteb's scores for a sentence-transformers folder."""
    result = mteb.evaluate(
        SentenceTransformer(str(model)),
        local_task(folder, split),
        cache=None,  # with a cache, a second model in a folder of the same name would get the first one's scores
        co2_tracker=False,
        show_progress_bar=False,
    )
    return result.task_results[0].scores[split][0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL_FOLDER", help="sentence-transformers folder")
    parser.add_argument("data", type=Path, metavar="BEIR_FOLDER")
    parser.add_argument("--split", default="test", help="qrels/SPLIT.tsv (default: test)")
    options = parser.parse_args()
    scores = evaluate(options.model, options.data, options.split)
    for name in ("ndcg_at_10", "recall_at_100", "mrr_at_10"):
        print(f"{name:14} {scores[name]:.5f}")


if __name__ == "__main__":
    main()
