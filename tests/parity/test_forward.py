"""Token states against Hugging Face, for every form of the architecture, padding side and precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import oracle
from support.megatron import filled_stages
from support.tiny_models import tiny_config
from torch import Tensor

from megatron_embed.bridge import EncoderConfig
from megatron_embed.bridge.attention import SequenceInfo
from megatron_embed.bridge.cpu import attention, host
from megatron_embed.bridge.cpu.attention import attention_by_products
from megatron_embed.bridge.encoder import EncoderStage
from megatron_embed.bridge.layout import Layout
from megatron_embed.bridge.parallel import parallel_world
from megatron_embed.bridge.sequences import TokenBatch

LENGTH = 70  # beyond the tiny config's original 64 positions: the Llama-4 scale acts

CONFIGS: dict[str, dict[str, Any]] = {
    # 32 heads of 128 on a hidden size that is not their product, as on the 3B
    "3B shape in small": {"hidden_size": 48, "num_attention_heads": 8, "head_dim": 8, "num_key_value_heads": 2},
    "heads × head_dim above hidden": {"hidden_size": 40, "num_attention_heads": 8, "head_dim": 16},
    "heads × head_dim below hidden": {"hidden_size": 96, "num_attention_heads": 4, "head_dim": 8},
    "untied": {"tie_word_embeddings": False},
    "14B's theta": {"rope_parameters": {"rope_theta": 1e9}},
    "factor 48, original 8192, theta 1e8": {
        "max_position_embeddings": 393216,
        "rope_parameters": {"factor": 48.0, "original_max_position_embeddings": 8192, "rope_theta": 1e8},
    },
    "scale acts from position 8": {
        "rope_parameters": {"original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.5}
    },
    "one KV head": {"num_key_value_heads": 1},
    "no grouping": {"num_key_value_heads": 8},
    "no rope scaling": {"rope_parameters": {"rope_type": "default", "type": "default"}},
}


@pytest.fixture(scope="module", autouse=True)
def _world() -> Any:
    host.run_on_cpu()
    with parallel_world(Layout()):
        yield


def ids_and_mask(side: str, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(12, 997, (4, length), generator=generator)
    mask = torch.ones(4, length, dtype=torch.long)
    for row, missing in enumerate((0, 7, 33, length - 1)):
        if side == "right":
            mask[row, length - missing :] = 0
        elif side == "left":
            mask[row, :missing] = 0
    return ids, mask


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def states(encoder: EncoderStage, batch: TokenBatch) -> Tensor:
    """Final token states ``[b, s, hidden]``."""
    info = SequenceInfo.of(
        batch, encoder.encoder_config, encoder._frequencies, encoder.rope_factor, encoder.config.params_dtype
    )
    with torch.no_grad():
        hidden = encoder.embedding(batch.input_ids)
        return encoder.decoder(hidden_states=hidden, attention_mask=None, packed_seq_params=info).transpose(0, 1)


def build(overrides: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[Any, EncoderStage]:
    config = tiny_config(**overrides)
    model = oracle.hf_model(config)
    (encoder,) = filled_stages(EncoderConfig.from_hf(config), Layout(), model.state_dict(), dtype)
    return model, encoder


def check_states(model: Any, encoder: EncoderStage, side: str) -> None:
    """Check the states of every real token against Hugging Face's, with padding on a side or none."""
    ids, mask = ids_and_mask(side)
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).last_hidden_state
    found = states(encoder, TokenBatch.from_padded(ids, mask))
    real = mask.bool()
    error = (found - wanted)[real].abs().max() / wanted[real].abs().max()
    assert error <= 1e-6, f"off by {error:.1e} of the largest value"


@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("name", CONFIGS)
def test_states_equal_hugging_face(name: str, side: str) -> None:
    check_states(*build(CONFIGS[name]), side)


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_states_equal_hugging_face_text_by_text(name: str) -> None:
    model, encoder = build(CONFIGS[name])
    ids, mask = ids_and_mask("right")
    texts = [row[keep.bool()] for row, keep in zip(ids, mask, strict=True)]
    batch = TokenBatch.pack([text.tolist() for text in texts], pad_id=11, multiple_of=64)
    found = states(encoder, batch)[0]
    start = 0
    for text in texts:
        with torch.no_grad():
            wanted = model(input_ids=text[None]).last_hidden_state[0]
        error = (found[start : start + len(text)] - wanted).abs().max() / wanted.abs().max()
        assert error <= 2e-6, f"text at {start} is off by {error:.1e} of the largest value"
        start += len(text)


@pytest.mark.parametrize("side", ["none", "right", "left"])
def test_bf16_error_is_no_larger_than_hugging_faces_own(side: str) -> None:
    _, encoder = build({"num_hidden_layers": 4, "hidden_size": 128}, torch.bfloat16)
    half = oracle.hf_model(tiny_config(num_hidden_layers=4, hidden_size=128), dtype=torch.bfloat16)
    exact = oracle.hf_model(tiny_config(num_hidden_layers=4, hidden_size=128), dtype=torch.bfloat16).float()
    ids, mask = ids_and_mask(side)
    with torch.no_grad():
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}
        wanted, theirs = exact(**inputs).last_hidden_state, half(**inputs).last_hidden_state
    ours = states(encoder, TokenBatch.from_padded(ids, mask))
    real = mask.bool()
    our_error = (ours.float() - wanted)[real].norm()
    their_error = (theirs.float() - wanted)[real].norm()
    assert our_error <= 1.2 * their_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoding_long_texts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention by whole products where nothing is trained; in bf16, too, its error is no larger than HF's own."""
    calls = []

    def counted(*args: Any) -> Tensor:
        calls.append(args)
        return attention_by_products(*args)

    monkeypatch.setattr(attention, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(attention, "attention_by_products", counted)
    _, encoder = build({"num_hidden_layers": 4, "hidden_size": 128}, dtype)
    theirs = oracle.hf_model(tiny_config(num_hidden_layers=4, hidden_size=128), dtype=dtype)
    exact = oracle.hf_model(tiny_config(num_hidden_layers=4, hidden_size=128), dtype=dtype).double()
    texts = [torch.randint(12, 997, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (90, 200, 200)]
    batch = TokenBatch.pack(texts, pad_id=11)
    encoder(batch).sum().backward()
    encoder.eval()(batch).sum().backward()
    assert not calls  # it has no gradient
    states(encoder, TokenBatch.pack(texts[:1], pad_id=11))
    assert not calls  # too short to gain by it
    found = states(encoder, batch)[0].split([len(text) for text in texts])
    assert len(calls) == 4  # layers
    for ours, text in zip(found, texts, strict=True):
        with torch.no_grad():
            wanted, rounded = (model(input_ids=torch.tensor([text])).last_hidden_state[0] for model in (exact, theirs))
        assert (ours.double() - wanted).norm() <= 1.2 * (rounded.double() - wanted).norm()


def test_the_first_token_sees_the_last() -> None:
    _, encoder = build({})
    ids, mask = ids_and_mask("none")
    before = states(encoder, TokenBatch.from_padded(ids, mask))[:, 0]
    ids[:, -1] = (ids[:, -1] + 1) % 997
    after = states(encoder, TokenBatch.from_padded(ids, mask))[:, 0]
    assert (before - after).abs().max() > 1e-4


def test_padding_is_seen_by_nobody() -> None:
    _, encoder = build({})
    ids, mask = ids_and_mask("right")
    before = states(encoder, TokenBatch.from_padded(ids, mask))
    other = torch.where(mask.bool(), ids, (ids + 5) % 997)
    after = states(encoder, TokenBatch.from_padded(other, mask))
    assert torch.equal(before[mask.bool()], after[mask.bool()])


@pytest.mark.parametrize("theta", [1e6, 1e9])
def test_tables_equal_hugging_faces_at_the_last_position(theta: float) -> None:
    from transformers.models.ministral3.modeling_ministral3 import Ministral3RotaryEmbedding, get_llama_4_attn_scale

    from megatron_embed.bridge.rope import inverse_frequencies, query_scale, rope_tables

    config = tiny_config(
        head_dim=128,
        max_position_embeddings=262144,
        rope_parameters={"rope_theta": theta, "original_max_position_embeddings": 16384},
    )
    at = torch.tensor([[0, 1, 16383, 16384, 100_000, 262_143]])
    cos, sin = Ministral3RotaryEmbedding(config)(torch.zeros(1), at)
    ours = EncoderConfig.from_hf(config)
    found_cos, found_sin = rope_tables(at, *inverse_frequencies(ours), dtype=torch.float32)
    assert torch.equal(found_cos, cos)
    assert torch.equal(found_sin, sin)
    scale = query_scale(at, ours, dtype=torch.float32)
    assert scale is not None
    assert torch.equal(scale, get_llama_4_attn_scale(at, 0.1, 16384)[:, 0, :, 0])
    assert scale[0, -1] > 1.2
