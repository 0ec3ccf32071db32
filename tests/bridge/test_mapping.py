"""The table against the real models: every tensor of every size has its row, and the other way round."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from support.places import HF_CONFIGS
from transformers import Ministral3Config, Ministral3Model, Mistral3Config, Mistral3ForConditionalGeneration

from megatron_embed.bridge import mapping
from megatron_embed.bridge.config import EncoderConfig

VLMS = {"ministral-3-3b": 458, "ministral-3-8b": 531, "ministral-3-14b": 585}


def raw_config(name: str) -> dict[str, Any]:
    return json.loads((HF_CONFIGS / f"{name}.json").read_text())


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Distinct parameters: a tied head counts once, as on disk."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def assert_covered(found: dict[str, tuple[int, ...]], config: EncoderConfig) -> None:
    prefix = mapping.hf_prefix(found)
    assert prefix is not None
    table = {prefix + n: s for w in mapping.weights(config) for n, s in zip(w.hf, w.hf_shapes, strict=True)}
    assert table.items() <= found.items()
    assert [name for name in found if name not in table and mapping.ignored_reason(name) is None] == []


@pytest.mark.parametrize("name", VLMS)
def test_every_tensor_of_the_vlm_has_a_row(name: str) -> None:
    with torch.device("meta"):
        model = Mistral3ForConditionalGeneration(Mistral3Config(**copy.deepcopy(raw_config(name))))
    found = shapes(model)
    assert len(found) == VLMS[name]
    assert_covered(found, EncoderConfig.from_hf(raw_config(name)))


def test_every_tensor_of_a_ready_embedder_has_a_row() -> None:
    raw = raw_config("nemotron-3-embed-1b-like")
    with torch.device("meta"):
        model = Ministral3Model(Ministral3Config(**copy.deepcopy(raw)))
    assert_covered(shapes(model), EncoderConfig.from_hf(raw))


def test_fp8_and_bf16_name_the_same_encoder() -> None:
    fp8 = EncoderConfig.from_hf(raw_config("ministral-3-3b-instruct-fp8"))
    assert fp8 == EncoderConfig.from_hf(raw_config("ministral-3-3b"))


def test_packed_shapes() -> None:
    config = EncoderConfig.from_hf(raw_config("ministral-3-3b"))
    by_name = {weight.megatron: weight.megatron_shape for weight in mapping.weights(config)}
    assert by_name["decoder.layers.25.self_attention.linear_qkv.weight"] == (4096 + 2 * 1024, 3072)
    assert by_name["decoder.layers.0.mlp.linear_fc1.weight"] == (2 * 9216, 3072)
    assert by_name["decoder.layers.0.self_attention.linear_proj.weight"] == (3072, 4096)
    assert by_name["embedding.word_embeddings.weight"] == (131072, 3072)
    assert len(by_name) == 2 + 26 * 6


def test_names_of_either_layer_spec() -> None:
    name = mapping.checkpoint_name
    assert name("decoder.layers.1.input_layernorm.weight", layer_offset=13) == (
        "decoder.layers.14.self_attention.linear_qkv.layer_norm_weight"
    )
    assert name("decoder.layers.0.pre_mlp_layernorm.weight") == "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"
    assert name("decoder.layers.0.mlp.linear_fc2.weight", layer_offset=2) == "decoder.layers.2.mlp.linear_fc2.weight"
    assert name("decoder.final_layernorm.weight", layer_offset=9) == "decoder.final_layernorm.weight"


def test_a_part_of_a_name_is_no_match() -> None:
    """A vision tower has q_proj too, and a longer name may end like a shorter one."""
    assert mapping.ignored_reason("vision_tower.transformer.layers.0.attention.q_proj.weight")
    assert mapping.ignored_reason("language_model.lm_head.weight")
    assert mapping.ignored_reason("language_model.model.layers.0.self_attn.q_proj.bias") is None
    assert mapping.ignored_reason("my_vision_tower.weight") is None
    assert mapping.ignored_reason("lm_head.weight.extra") is None
