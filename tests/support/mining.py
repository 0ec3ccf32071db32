"""A small corpus with training data, mined with a tiny model; and tiny cross-encoders."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from megatron_embed.recipes import Encoder
from megatron_embed.recipes.datasets.corpus import Corpus
from megatron_embed.recipes.retrieval import cross_encoder, encode_corpus, miner
from megatron_embed.recipes.retrieval.mining import Audit, MiningRules
from megatron_embed.recipes.retrieval.vectors import plan_shards
from support.tiny_models import make_tiny_tokenizer, randomize


def make_data(folder: Path) -> None:
    """120 documents, some twice, some the same as a query; 30 rows, a query on two of them, several positives."""
    generator = random.Random(0)
    texts = [" ".join(f"w{generator.randint(0, 60)}" for _ in range(generator.randint(3, 12))) for _ in range(110)]
    texts += [*texts[:5], "query 3", "query 4", "", "", " "]
    corpus = [
        {"_id": f"d{i}", "title": "t" if i % 7 == 0 and text else "", "text": text} for i, text in enumerate(texts)
    ]
    rows: list[Any] = [{"query": f"query {i}", "positive": texts[3 * i]} for i in range(28)]
    rows.append({"query": "query 0", "positive": texts[50]})
    rows.append({"query": "query 28", "positive": [texts[60], texts[61], "not in the corpus"], "negatives": ["old"]})
    write(folder / "corpus.jsonl", corpus)
    write(folder / "train.jsonl", rows)


def make_parts_small(replace: Any, shard_rows: int = 16) -> None:
    replace(encode_corpus, "plan_shards", lambda rows, _: plan_shards(rows, shard_rows))
    replace(miner, "_BLOCK", 7)
    replace(cross_encoder, "_BATCH", 4)


def run(encoder: Encoder, folder: Path, output: Path, rules: MiningRules | None = None, **options: Any) -> Audit:
    """Mine ``train.jsonl`` of the folder with its ``corpus.jsonl``, or with ``corpus``."""
    options = {"cache": folder / "vectors", **options}
    corpus = Corpus(options.pop("corpus", folder / "corpus.jsonl"))
    return miner.mine(encoder, str(folder / "train.jsonl"), corpus, output, rules=rules or MiningRules(), **options)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts_of(row: dict[str, Any]) -> list[str]:
    """Positives, then negatives, in the order of a teacher's scores."""
    positives = row["positive"] if isinstance(row["positive"], list) else [row["positive"]]
    return [*positives, *row["negatives"]]


def save_cross_encoder(
    path: Path, *, labels: int = 1, model_class: type[PreTrainedModel] = BertForSequenceClassification
) -> Path:
    """Save a random BERT with a classifier, or without one, and a tokenizer."""
    config = BertConfig(
        vocab_size=997,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=11,
        num_labels=labels,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config)
        randomize(model, scale=0.5)
    model.save_pretrained(path)
    make_tiny_tokenizer(path)
    return path
