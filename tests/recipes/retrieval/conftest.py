"""A small corpus with training data, and a tiny model that encodes it, made once a module."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.mining import make_data, make_parts_small, save_cross_encoder
from support.tiny_models import save_model

from megatron_embed.recipes import Encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``corpus.jsonl``, ``train.jsonl``, the embedder ``model`` and the cross-encoder ``cross``."""
    folder = tmp_path_factory.mktemp("mining")
    make_data(folder)
    save_model(folder / "model")
    save_cross_encoder(folder / "cross")
    return folder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Iterator[Encoder]:
    """The embedder of ``folder``."""
    # as in the processes of run_world: a sum over a row is rounded otherwise where threads share it
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with Encoder.from_pretrained(folder / "model", device="cpu") as encoder:
        yield encoder
    torch.set_num_threads(threads)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards, blocks and batches of a few rows."""
    make_parts_small(monkeypatch.setattr)
