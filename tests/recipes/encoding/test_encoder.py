"""The library call: one text or many, long or short."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_models import save_vlm

from megatron_embed.bridge.cpu import host
from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.exporting import export_hf
from megatron_embed.conversion.importing import import_hf
from megatron_embed.recipes import Encoder
from megatron_embed.recipes.encoding import encoder as module

TEXTS = ["w1 w2", "w3 " * 300, "w4", "w5 " * 200, "w6 w7 w8"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported embedder."""
    host.run_on_cpu()
    root = tmp_path_factory.mktemp("encoder")
    save_vlm(root / "vlm")
    import_hf(root / "vlm", root / "megatron", progress=False)
    export_hf(root / "megatron", root / "export", progress=False)
    return root / "export"


def test_vectors_that_are_not_finite_are_an_error(model: Path) -> None:
    with Encoder.from_pretrained(model, device="cpu") as encoder:
        with torch.no_grad():
            encoder.stages[-1].decoder.final_layernorm.weight[0] = float("inf")
        with pytest.raises(UserError, match=r"2 of 2 vectors hold numbers that are not finite, computed in \w+: take"):
            encoder.encode(TEXTS[:2])


def test_a_model_that_cannot_be_loaded_leaves_no_process_group(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: object) -> None:
        assert torch.distributed.is_initialized()
        raise UserError("unreadable")

    monkeypatch.setattr(module, "pack_weights", fails)
    with pytest.raises(UserError, match="unreadable"):
        Encoder.from_pretrained(model, device="cpu")
    assert not torch.distributed.is_initialized()


def test_texts_longer_than_a_micro_batch_are_encoded_alone(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Encoder.from_pretrained(model, device="cpu") as encoder:
        wanted = encoder.encode(TEXTS, kind="passage")
    batches = []

    def watched(stages: object, window: list[module.MicroBatch]) -> object:
        batches.extend([batch.tokens.lengths for batch in window])
        return encode_micro_batches(stages, window)

    encode_micro_batches = module.encode_micro_batches
    monkeypatch.setattr(module, "encode_micro_batches", watched)
    with Encoder.from_pretrained(model, device="cpu", max_tokens=64) as encoder:
        found = encoder.encode(TEXTS, kind="passage")
    assert sorted(map(len, batches)) == [1, 1, 3]
    assert sorted(max(lengths) > 64 for lengths in batches) == [False, True, True]
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_a_single_text_gives_a_single_vector(model: Path) -> None:
    with Encoder.from_pretrained(model, device="cpu") as encoder:
        found = encoder.encode(TEXTS[0], kind="query", prompt="ask: ")
        assert found.shape == (encoder.config.hidden_size,)
        np.testing.assert_array_equal(found, encoder.encode([TEXTS[0]], kind="query", prompt="ask: ")[0])
