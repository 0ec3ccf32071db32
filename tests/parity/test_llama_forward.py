"""Token states of Llama against Hugging Face's ``LlamaModel`` with ``is_causal: false``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import oracle
from support.megatron import filled_stages
from support.tiny_llama import ROPE, tiny_llama_config
from test_forward import check_states, ids_and_mask, states

from megatron_embed.bridge import EncoderConfig
from megatron_embed.bridge.cpu import host
from megatron_embed.bridge.encoder import EncoderStage
from megatron_embed.bridge.parallel import Layout, parallel_world
from megatron_embed.bridge.rope import inverse_frequencies, query_scale, rope_tables
from megatron_embed.bridge.sequences import TokenBatch

CONFIGS: dict[str, dict[str, Any]] = {
    "3.2 1B in small": {"head_dim": 8, "rope_parameters": {**ROPE, "factor": 32.0}},
    "3.1 8B in small": {"tie_word_embeddings": False},
    "head_dim beside hidden / heads": {"head_dim": 16},
    "no rope scaling": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rms_norm_eps": 1e-6},
    "no grouping": {"num_key_value_heads": 8},
    # LlamaModel passes over this key of Ministral 3; so must the encoder
    "a scale that Llama has not": {"rope_parameters": {**ROPE, "llama_4_scaling_beta": 0.5}},
}


@pytest.fixture(scope="module", autouse=True)
def _world() -> Any:
    host.run_on_cpu()
    with parallel_world(Layout()):
        yield


def build(name: str) -> tuple[Any, EncoderStage]:
    config = tiny_llama_config(**CONFIGS[name])
    model = oracle.hf_model(config)
    assert type(model).__name__ == "LlamaModel"
    (encoder,) = filled_stages(EncoderConfig.from_hf(config), Layout(), model.state_dict())
    return model, encoder


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("name", CONFIGS)
def test_states_equal_hugging_face(name: str, side: str) -> None:
    check_states(*build(name), side)


def test_the_first_token_sees_the_last() -> None:
    model, encoder = build("3.2 1B in small")
    ids, mask = ids_and_mask("none")
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % 997
    ours = [states(encoder, TokenBatch.from_padded(x, mask))[:, 0] for x in (ids, other)]
    with torch.no_grad():
        theirs = [model(input_ids=x).last_hidden_state[:, 0] for x in (ids, other)]
    for before, after in (ours, theirs):
        assert (before - after).abs().max() > 1e-4


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_tables_equal_hugging_faces_at_the_last_position(factor: float) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {**ROPE, "factor": factor, "original_max_position_embeddings": 8192}
    config = tiny_llama_config(head_dim=128, max_position_embeddings=131072, rope_parameters=rope)
    at = torch.tensor([[0, 1, 8191, 8192, 131071]])
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), at)
    ours = EncoderConfig.from_hf(config)
    found_cos, found_sin = rope_tables(at, *inverse_frequencies(ours), dtype=torch.float32)
    assert torch.equal(found_cos, cos)
    assert torch.equal(found_sin, sin)
    assert query_scale(at, ours, dtype=torch.float32) is None
