"""Shared parts of the quality benchmarks: our recipe for the small model, sentence-transformers' training, scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_embed.recipes.config.overrides import apply_overrides
from megatron_embed.recipes.config.schema import RecipeConfig
from megatron_embed.recipes.datasets.pairs import PairDataset
from megatron_embed.recipes.datasets.sampler import GlobalBatchSampler
from megatron_embed.recipes.ministral3 import ministral3_tiny_embed_config
from megatron_embed.recipes.retrieval.evaluation import evaluate

#: the optimizer of both sides, as described in the result files
OPTIMIZER = "AdamW 0.9/0.999, no weight decay, clipping at 1.0, 10 % warm-up, linear decay to 0"


def recipe(run: Path, model: Path, data: Sequence[Path], settings: Any, *, seed: int, steps: int) -> RecipeConfig:
    """Return the config of our training of the small model, in fp32.

    Args:
        run: the run's folder.
        settings: an object with ``length``, ``batch``, ``lr`` and ``temperature``.
    """
    cfg = apply_overrides(
        ministral3_tiny_embed_config(),
        [
            f"model.hf_model={model}",
            f"data.query_max_length={settings.length}",
            f"data.passage_max_length={settings.length}",
            f"train.global_batch_size={settings.batch}",
            "train.micro_batch_tokens=16384",
            f"train.train_iters={steps}",
            "train.save_interval=100000",
            f"train.save_dir={run}",
            f"train.seed={seed}",
            f"optimizer.lr={settings.lr}",
            f"loss.temperature={settings.temperature}",
            "optimizer.weight_decay=0",
            "logger.tensorboard=false",
            "device=cpu",
        ],
    )
    cfg.data.train = [str(path) for path in data]  # type: ignore[assignment]
    return cfg


def load_theirs(folder: Path, length: int) -> Any:
    """Load a folder as a sentence-transformers model on the CPU that truncates texts to ``length`` tokens."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    model.max_seq_length = length
    return model


def train_theirs(
    cfg: RecipeConfig,
    folder: Path,
    *,
    begin: Callable[[], None] = lambda: None,
    enough: Callable[[], bool] = lambda: False,
) -> Any:
    """Train with MultipleNegativesRankingLoss in the textbook loop, with our order, schedule, clipping and optimizer.

    Args:
        begin: called before the first step.
        enough: called after each step; True ends the training.
    """
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    model = load_theirs(folder, cfg.data.passage_max_length)
    loss_function = MultipleNegativesRankingLoss(model, scale=1 / cfg.loss.temperature)
    dataset = PairDataset(cfg.data.sources())
    sampler = GlobalBatchSampler(dataset, cfg.train.global_batch_size, cfg.train.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.optimizer.lr, weight_decay=0.0, fused=True)
    steps, warmup = cfg.train.train_iters, cfg.train.train_iters // 10
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: k / warmup if k < warmup else (steps - k) / (steps - warmup)
    )
    model.train()
    begin()
    for step in range(steps):
        examples = [dataset[i] for i in sampler.batch(step)]
        columns = [["query: " + e.query for e in examples], ["passage: " + e.positive for e in examples]]
        loss = loss_function([model.preprocess(column) for column in columns], None)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.optimizer.clip_grad)
        optimizer.step()
        schedule.step()
        if enough():
            break
    return model


def scores(model: Any, collection: Any) -> dict[str, float]:
    """Return nDCG@10, recall@100 and MRR@10 of a sentence-transformers model."""

    def encode(texts: list[str], kind: str) -> Any:
        return (model.encode_query if kind == "query" else model.encode_document)(texts, batch_size=64)

    return evaluate(encode, [collection], bm25=False)[collection.name]
