"""Token states of Qwen3 against Hugging Face's ``Qwen3Model`` with ``is_causal: false``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import oracle
from support.megatron import filled_stages
from support.tiny_qwen3 import tiny_qwen3_config
from test_forward import check_states, ids_and_mask, states

from megatron_embed.bridge import EncoderConfig
from megatron_embed.bridge.cpu import host
from megatron_embed.bridge.encoder import EncoderStage
from megatron_embed.bridge.parallel import Layout, parallel_world
from megatron_embed.bridge.sequences import TokenBatch

CONFIGS: dict[str, dict[str, Any]] = {
    "0.6B in small": {},
    "8B in small": {"tie_word_embeddings": False, "hidden_size": 128},
    "no grouping": {"num_key_value_heads": 8},
    "one KV head": {"num_key_value_heads": 1},
}


@pytest.fixture(scope="module", autouse=True)
def _world() -> Any:
    host.run_on_cpu()
    with parallel_world(Layout()):
        yield


def build(name: str) -> tuple[Any, EncoderStage]:
    config = tiny_qwen3_config(**CONFIGS[name])
    model = oracle.hf_model(config)
    assert type(model).__name__ == "Qwen3Model"
    (encoder,) = filled_stages(EncoderConfig.from_hf(config), Layout(), model.state_dict())
    return model, encoder


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("name", CONFIGS)
def test_states_equal_hugging_face(name: str, side: str) -> None:
    check_states(*build(name), side)


def test_packed_vectors_equal_hugging_face() -> None:
    model, encoder = build("0.6B in small")
    texts = [list(range(12, 12 + n)) for n in (5, 9, 9, 31)]
    with torch.no_grad():
        found, wanted = encoder(TokenBatch.pack(texts, pad_id=11)), oracle.embed(model, texts)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_the_first_token_sees_the_last() -> None:
    _, encoder = build("0.6B in small")
    ids, mask = ids_and_mask("none")
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % 997
    before, after = (states(encoder, TokenBatch.from_padded(x, mask))[:, 0] for x in (ids, other))
    assert (before - after).abs().max() > 1e-4
