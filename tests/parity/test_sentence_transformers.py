"""Step by step the losses of sentence-transformers' own trainer losses, and the same vectors after export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss
from support.runs import read_metrics, recipe, write_pairs
from support.tiny_models import save_vlm

from megatron_embed.bridge.cpu import host
from megatron_embed.conversion.exporting import export_hf
from megatron_embed.conversion.importing import import_hf
from megatron_embed.recipes import Encoder, train
from megatron_embed.recipes.config.schema import RecipeConfig
from megatron_embed.recipes.datasets.pairs import PairDataset
from megatron_embed.recipes.datasets.sampler import GlobalBatchSampler

pytestmark = pytest.mark.slow

TEXTS = ["a short one", "", "with </s> and [INST] inside", "long " * 200, "schön – 深い"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    host.run_on_cpu()
    path = tmp_path_factory.mktemp("st")
    save_vlm(path / "model", num_hidden_layers=3)
    write_pairs(path / "train.jsonl", 200, negatives=2)
    import_hf(path / "model", path / "imported", progress=False)
    export_hf(path / "imported", path / "embedder", progress=False)
    return path


def reference_losses(cfg: RecipeConfig, folder: Path, make_loss: Any) -> list[float]:
    """The textbook loop around a sentence-transformers loss, on the recipe's data order and schedule."""
    model = SentenceTransformer(str(folder / "embedder"), device="cpu")
    loss_function = make_loss(model)
    dataset = PairDataset(cfg.data.sources())
    sampler = GlobalBatchSampler(dataset, cfg.train.global_batch_size, cfg.train.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.optimizer.lr, weight_decay=0.0)
    steps, warmup = cfg.train.train_iters, cfg.optimizer.warmup_iters or 0
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: k / warmup if k < warmup else (steps - k) / (steps - warmup)
    )
    losses = []
    for step in range(steps):
        examples = [dataset[i] for i in sampler.batch(step)]
        columns = [[e.positive for e in examples], *([e.negatives[k] for e in examples] for k in range(2))]
        texts = [["query: " + e.query for e in examples], *(["passage: " + t for t in column] for column in columns)]
        model.train()
        loss = loss_function([model.preprocess(column) for column in texts], None)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.optimizer.clip_grad)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


LOSSES: dict[str, tuple[list[str], Any]] = {
    "direct": (
        ["loss.mode=direct", "train.micro_batch_tokens=16384"],
        lambda model: MultipleNegativesRankingLoss(model, scale=50.0),
    ),
    "cached": (
        ["loss.mode=cached", "train.micro_batch_size=5"],
        lambda model: CachedMultipleNegativesRankingLoss(model, scale=50.0, mini_batch_size=3),
    ),
}


@pytest.mark.parametrize("mode", LOSSES)
def test_losses_equal_sentence_transformers_step_by_step(folder: Path, mode: str) -> None:
    overrides, make_loss = LOSSES[mode]
    # one maximal length for both kinds, as the reference has, and nothing is that long
    lengths = ["data.query_max_length=512", "data.passage_max_length=512"]
    cfg = recipe(folder, mode, "optimizer.weight_decay=0", *lengths, *overrides)
    wanted = reference_losses(cfg.resolved(), folder, make_loss)
    train(cfg)
    found = [record["loss"] for record in read_metrics(folder / mode)]
    assert wanted[-1] < wanted[0]
    assert found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("kind", ["query", "passage"])
def test_exported_vectors_equal_the_megatron_encoders(folder: Path, kind: str) -> None:
    cfg = recipe(folder, f"export_{kind}", "model.pooling=last", "data.query_prompt=Represent: ")
    train(cfg)
    out = folder / f"out_{kind}"
    export_hf(folder / f"export_{kind}", out, progress=False)
    reference = SentenceTransformer(str(out), device="cpu")
    encode = reference.encode_query if kind == "query" else reference.encode_document
    # sentence-transformers has one maximal length, the larger; texts here stay below the smaller
    texts = [text[:60] for text in TEXTS]
    wanted = encode(texts, normalize_embeddings=False)
    for model in (folder / f"export_{kind}", out):
        with Encoder.from_pretrained(model, device="cpu") as encoder:
            found = encoder.encode(texts, kind=kind)  # type: ignore[arg-type]
        cosine = (found * wanted).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(wanted, axis=1)
        assert cosine.min() >= 0.999999
        assert np.abs(found - wanted).max() < 1e-5
