"""A family is one file: Qwen2, which has biases on queries, keys and values, stands here in full, and is registered.

Nothing outside this file knows of it; import, export, vectors, gradients and the planner follow from it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import oracle, tiny_models
from support.hf_files import assert_same_bits, encoder_tensors_of, tensors_of
from support.megatron import collect, filled_stages, merge_world
from transformers import AutoModel, Qwen2Config, Qwen2Model

from megatron_embed.bridge import EncoderConfig
from megatron_embed.bridge.cpu import host
from megatron_embed.bridge.families import FAMILIES
from megatron_embed.bridge.families.base import COMMON_FIXED, Family, Row
from megatron_embed.bridge.layout import Layout
from megatron_embed.bridge.mapping import checkpoint_name
from megatron_embed.bridge.parallel import parallel_world
from megatron_embed.bridge.sequences import TokenBatch
from megatron_embed.conversion.exporting import export_hf
from megatron_embed.conversion.importing import import_hf
from megatron_embed.conversion.verify import verify
from megatron_embed.recipes.planning.state import chunk_parameters, chunks_of

QWEN2 = Family(
    name="qwen2",
    title="Qwen2",
    config_class="Qwen2Config",
    model_class="Qwen2Model",
    fixed={**COMMON_FIXED, "use_sliding_window": False},
    layer_options={"add_qkv_bias": True},
    layer_rows=(
        Row(
            "decoder.layers.{layer}.self_attention.linear_qkv.bias",
            tuple("layers.{layer}.self_attn." + f"{part}_proj.bias" for part in "qkv"),
            "qkv",
            0,
            (("q",), ("kv",), ("kv",)),
        ),
    ),
)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "qwen2", QWEN2)


def tiny_config(**overrides: Any) -> Qwen2Config:
    values: dict[str, Any] = {
        "vocab_size": 997,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return Qwen2Config(**{**values, **overrides})


def model_with_biases(dtype: torch.dtype) -> Any:
    model = oracle.hf_model(tiny_config(), dtype=dtype, exact_norms=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def test_vectors_and_every_gradient_equal_hugging_face() -> None:
    host.run_on_cpu()
    model, config = model_with_biases(torch.float64), EncoderConfig.from_hf(tiny_config())
    texts = [list(range(12, 12 + n)) for n in (5, 9, 9, 31)]
    weights = torch.randn(len(texts), config.hidden_size, generator=torch.Generator().manual_seed(0)).double()
    with parallel_world(Layout()):
        (encoder,) = filled_stages(config, Layout(), model.state_dict(), torch.float64)
        found = encoder(TokenBatch.pack(texts, pad_id=11))
        (found * weights).sum().backward()
        gradients = {checkpoint_name(name): p.grad for name, p in encoder.named_parameters() if p.grad is not None}
        merged = merge_world(config, [collect(gradients)])
    wanted = oracle.embed(model, texts)
    (wanted * weights).sum().backward()
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    for name, parameter in model.named_parameters():
        assert oracle.relative_error(merged[name], parameter.grad) < 1e-10, name


def test_there_and_back(tmp_path: Path) -> None:
    source = tmp_path / "source"
    model_with_biases(torch.float32).save_pretrained(source)
    tiny_models.make_tiny_tokenizer(source)
    import_hf(source, tmp_path / "m", tp=2, pp=2, progress=False)
    export_hf(tmp_path / "m", tmp_path / "hf", progress=False)
    assert "layers.1.self_attn.k_proj.bias" in tensors_of(tmp_path / "hf")
    assert_same_bits(tensors_of(tmp_path / "hf"), encoder_tensors_of(source))
    assert verify(source, megatron_path=tmp_path / "m", progress=False)
    assert verify(source, hf_path=tmp_path / "hf", progress=False)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["is_causal"] is False
    assert isinstance(AutoModel.from_pretrained(tmp_path / "hf"), Qwen2Model)


def test_the_planner_counts_its_parameters() -> None:
    model, config = model_with_biases(torch.float32), EncoderConfig.from_hf(tiny_config())
    (chunk,) = chunks_of(config, Layout(), 0)
    planned = chunk_parameters(config, Layout(), chunk)
    assert sum(planned) == sum(parameter.numel() for parameter in model.parameters())
    weight, bias = (8 + 2 * 4) * 8 * 64, (8 + 2 * 4) * 8
    assert planned[planned.index(weight) + 1] == bias  # behind its weight, as the modules register them
