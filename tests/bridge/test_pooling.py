"""Every pooling on both padding sides and packed, against sentence-transformers and the definitions."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers.models import Pooling as ReferencePooling
from torch import Tensor

from megatron_embed.bridge.config import POOLINGS
from megatron_embed.bridge.pooling import pool
from megatron_embed.bridge.sequences import TokenBatch

LENGTHS, LONGEST, HIDDEN = (5, 1, 9, 3), 9, 6
REFERENCE = {"avg": "mean", "cls": "cls", "last": "lasttoken", "weighted_avg": "weightedmean"}


def ragged() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(length, HIDDEN) for length in LENGTHS]


def batch_of(form: str, texts: list[Tensor]) -> tuple[TokenBatch, Tensor]:
    """(a batch of that form, its states [s, b, hidden] with large rubbish on the padding)"""
    sequences = [[7] * len(text) for text in texts]
    if form == "packed":
        batch = TokenBatch.pack(sequences, pad_id=0, multiple_of=8)
        tail = torch.full((batch.padding, HIDDEN), 1e6)
        return batch, torch.cat([*texts, tail])[:, None]
    mask, states = torch.zeros(len(texts), LONGEST, dtype=torch.long), torch.full((len(texts), LONGEST, HIDDEN), 1e6)
    for row, text in enumerate(texts):
        where = slice(0, len(text)) if form == "right" else slice(LONGEST - len(text), LONGEST)
        mask[row, where], states[row, where] = 1, text
    return TokenBatch.from_padded(torch.full_like(mask, 7), mask), states.transpose(0, 1)


@pytest.mark.parametrize("form", ["right", "left", "packed"])
@pytest.mark.parametrize("mode", POOLINGS)
def test_pooling_equals_sentence_transformers(mode: str, form: str) -> None:
    texts = ragged()
    batch, states = batch_of(form, texts)
    reference = ReferencePooling(HIDDEN, pooling_mode=REFERENCE[mode])
    wanted = torch.cat(
        [
            reference({"token_embeddings": text[None], "attention_mask": torch.ones(1, len(text))})[
                "sentence_embedding"
            ]
            for text in texts
        ]
    )
    torch.testing.assert_close(pool(states, batch, mode), wanted, rtol=1e-5, atol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", POOLINGS)
def test_pooling_computes_in_fp32_or_wider(mode: str) -> None:
    texts = ragged()
    batch, states = batch_of("right", texts)
    assert pool(states.bfloat16(), batch, mode).dtype == torch.float32  # type: ignore[arg-type]
    assert pool(states.double(), batch, mode).dtype == torch.float64  # type: ignore[arg-type]
