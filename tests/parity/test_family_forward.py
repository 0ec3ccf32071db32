"""Token states of Llama and Qwen3 against Hugging Face's stock models with ``is_causal: false``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import oracle
from support.megatron import filled_stages
from support.tiny_families import ROPE, tiny_llama_config, tiny_qwen3_config
from test_forward import check_states, ids_and_mask, states

from megatron_embed.bridge import EncoderConfig
from megatron_embed.bridge.cpu import host
from megatron_embed.bridge.encoder import EncoderStage
from megatron_embed.bridge.parallel import Layout, parallel_world
from megatron_embed.bridge.rope import inverse_frequencies, query_scale, rope_tables
from megatron_embed.bridge.sequences import TokenBatch

CONFIGS: dict[str, Any] = {
    "Llama 3.2 1B in small": tiny_llama_config(head_dim=8, rope_parameters={**ROPE, "factor": 32.0}),
    "Llama 3.1 8B in small": tiny_llama_config(tie_word_embeddings=False),
    "Llama, head_dim beside hidden / heads": tiny_llama_config(head_dim=16),
    "Llama, no rope scaling": tiny_llama_config(
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}, rms_norm_eps=1e-6
    ),
    "Llama, no grouping": tiny_llama_config(num_key_value_heads=8),
    # LlamaModel passes over this key of Ministral 3; so must the encoder
    "a scale that Llama has not": tiny_llama_config(rope_parameters={**ROPE, "llama_4_scaling_beta": 0.5}),
    "Qwen3 0.6B in small": tiny_qwen3_config(),
    "Qwen3 8B in small": tiny_qwen3_config(tie_word_embeddings=False, hidden_size=128),
    "Qwen3, no grouping": tiny_qwen3_config(num_key_value_heads=8),
    "Qwen3, one KV head": tiny_qwen3_config(num_key_value_heads=1),
}
SMALLEST = ("Llama 3.2 1B in small", "Qwen3 0.6B in small")


@pytest.fixture(scope="module", autouse=True)
def _world() -> Any:
    host.run_on_cpu()
    with parallel_world(Layout()):
        yield


def build(name: str) -> tuple[Any, EncoderStage]:
    config = CONFIGS[name]
    model = oracle.hf_model(config)
    assert type(model).__name__ == {"llama": "LlamaModel", "qwen3": "Qwen3Model"}[config.model_type]
    (encoder,) = filled_stages(EncoderConfig.from_hf(config), Layout(), model.state_dict())
    return model, encoder


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("name", CONFIGS)
def test_states_equal_hugging_face(name: str, side: str) -> None:
    check_states(*build(name), side)


@pytest.mark.parametrize("name", SMALLEST)
def test_packed_vectors_equal_hugging_face(name: str) -> None:
    model, encoder = build(name)
    texts = [list(range(12, 12 + n)) for n in (5, 9, 9, 31)]
    with torch.no_grad():
        found, wanted = encoder(TokenBatch.pack(texts, pad_id=11)), oracle.embed(model, texts)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SMALLEST)
def test_the_first_token_sees_the_last(name: str) -> None:
    model, encoder = build(name)
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
