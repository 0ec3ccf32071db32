"""A tiny checkpoint with training data, and recipes that train on them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from megatron_embed.recipes.config.overrides import apply_overrides
from megatron_embed.recipes.config.schema import RecipeConfig
from megatron_embed.recipes.ministral3 import ministral3_tiny_embed_config
from support.tiny_models import save_vlm


def write_pairs(path: Path, count: int, *, negatives: int | None = 2, seed: int = 0) -> Path:
    """JSONL pairs of ragged random words, no text twice. ``negatives=None``: 0, 1 or 2 in turn."""
    generator = random.Random(seed)
    used: set[str] = set()

    def text(shortest: int, longest: int) -> str:
        while True:
            length = generator.randint(shortest, longest)
            words = " ".join(f"w{generator.randint(0, 400)}" for _ in range(length))
            if words not in used:
                used.add(words)
                return words

    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            hard = number % 3 if negatives is None else negatives
            row = {"query": text(2, 6), "positive": text(3, 25), "negatives": [text(3, 25) for _ in range(hard)]}
            file.write(json.dumps(row) + "\n")
    return path


def make_inputs(folder: Path, **config: Any) -> None:
    """``folder/model``, a VLM, and ``folder/train.jsonl``."""
    save_vlm(folder / "model", **{"num_hidden_layers": 3, **config})
    write_pairs(folder / "train.jsonl", 200, negatives=None)


def recipe(folder: Path, name: str, *overrides: str) -> RecipeConfig:
    """20 fp32 steps of 8 queries at lr 1e-4, every step logged, into ``folder/name``."""
    return apply_overrides(
        ministral3_tiny_embed_config(),
        [
            f"model.hf_model={folder / 'model'}",
            f"data.train={folder / 'train.jsonl'}",
            f"train.save_dir={folder / name}",
            "train.train_iters=20",
            "train.log_interval=1",
            "train.save_interval=1000",
            "train.global_batch_size=8",
            "train.micro_batch_tokens=128",
            "data.query_max_length=32",
            "data.passage_max_length=64",
            "optimizer.lr=1e-4",
            "logger.tensorboard=false",
            *overrides,
        ],
    )


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
