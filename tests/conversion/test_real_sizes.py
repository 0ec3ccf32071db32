"""The real models' names and shapes: models on the meta device, folders whose files are headers and holes."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.places import HF_CONFIGS
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    Ministral3Config,
    Ministral3Model,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from megatron_embed.bridge import mapping
from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.families import FAMILIES
from megatron_embed.conversion.compare.configs import compare_encoders
from megatron_embed.conversion.files.json_files import write_json
from megatron_embed.conversion.hf.folder import HFFolder
from megatron_embed.conversion.hf.safetensors_writer import TensorSpec, _header, _plan
from megatron_embed.conversion.mcore.weights import chunks

#: (config, model, prefix of the encoder on disk, tensors on disk, of them the encoder's, the encoder's parameters)
SIZES: dict[str, tuple[type, type, str, int, int, float]] = {
    "ministral-3-3b": (Mistral3Config, Mistral3ForConditionalGeneration, "language_model.model.", 458, 236, 3.43e9),
    "ministral-3-8b": (Mistral3Config, Mistral3ForConditionalGeneration, "language_model.model.", 531, 308, 7.95e9),
    "ministral-3-14b": (Mistral3Config, Mistral3ForConditionalGeneration, "language_model.model.", 585, 362, 12.835e9),
    "ministral-3-3b-instruct-fp8": (
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        "language_model.model.",
        458 + 2 * 7 * 26,
        236,
        3.43e9,
    ),
    "nemotron-3-embed-1b-like": (Ministral3Config, Ministral3Model, "", 146, 146, 1.14e9),
    "llama-3.2-1b": (LlamaConfig, LlamaForCausalLM, "model.", 146, 146, 1.236e9),
    "llama-3.1-8b": (LlamaConfig, LlamaForCausalLM, "model.", 291, 290, 7.505e9),
    "qwen3-0.6b": (Qwen3Config, Qwen3ForCausalLM, "model.", 310, 310, 0.596e9),
    "qwen3-4b": (Qwen3Config, Qwen3ForCausalLM, "model.", 398, 398, 4.022e9),
    "qwen3-8b": (Qwen3Config, Qwen3ForCausalLM, "model.", 399, 398, 7.568e9),
}
#: transformers' names in memory → names on disk
ON_DISK = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)


def raw_config(name: str) -> dict[str, Any]:
    return json.loads((HF_CONFIGS / f"{name}.json").read_text())


def meta_model(model_class: type, config: Any) -> nn.Module:
    with torch.device("meta"):
        return model_class(config)


def on_disk(model: nn.Module, *, vlm: bool) -> dict[str, tuple[int, ...]]:
    """Name → shape of each distinct parameter: a tied head counts once, as on disk."""
    found = {}
    for name, parameter in model.named_parameters():
        if vlm:
            old, new = next(pair for pair in ON_DISK if name.startswith(pair[0]))
            name = new + name.removeprefix(old)
        found[name] = tuple(parameter.shape)
    return found


def hollow_folder(folder: Path, name: str) -> HFFolder:
    """The folder as it is on the hub, in 5 GB shards, but for the values: they are holes in the files."""
    config_class, model_class, prefix, *_ = SIZES[name]
    raw = raw_config(name)
    shapes = on_disk(meta_model(model_class, config_class(**copy.deepcopy(raw))), vlm=config_class is Mistral3Config)
    specs = []
    for tensor, shape in shapes.items():
        fp8 = name.endswith("fp8") and tensor.startswith(prefix + "layers.") and "norm" not in tensor
        specs.append(TensorSpec(tensor, shape, torch.float8_e4m3fn if fp8 else torch.bfloat16))
        if fp8:
            specs.append(TensorSpec(f"{tensor}_scale_inv", (), torch.bfloat16))
            specs.append(TensorSpec(tensor.removesuffix("weight") + "activation_scale", (), torch.bfloat16))
    folder.mkdir()
    write_json(folder / "config.json", raw)
    weight_map = {}
    for number, shard in enumerate(_plan(specs, 5 * 10**9)):
        header = _header(shard)
        file = f"model-{number}.safetensors"
        with (folder / file).open("wb") as stream:
            stream.write(header)
            stream.truncate(len(header) + sum(spec.nbytes for spec in shard))
        weight_map |= {spec.name: file for spec in shard}
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    return HFFolder(folder)


@pytest.mark.parametrize("name", SIZES)
def test_every_tensor_of_the_folder_has_a_row_or_a_reason(name: str, tmp_path: Path) -> None:
    *_, prefix, tensors, encoder, parameters = SIZES[name]
    folder = hollow_folder(tmp_path / "folder", name)
    config = folder.encoder_config()
    assert len(folder.names()) == tensors
    assert folder.prefix == prefix
    folder.check(config)  # every row of the table has its tensor, of its shape; every other tensor a reason
    ignored = folder.ignored(config)
    assert len(ignored) == tensors - encoder
    if name.endswith("fp8"):
        assert sum("activation" in reason for reason in ignored.values()) == 7 * 26
        assert sum(reason == "folded into its weight" for reason in ignored.values()) == 7 * 26
    rows = list(mapping.weights(config))
    assert sum(math.prod(row.megatron_shape) for row in rows) == pytest.approx(parameters, rel=1e-3)


@pytest.mark.parametrize("name", SIZES)
def test_the_exports_model_has_the_tables_names(name: str) -> None:
    """Back: what the table names is exactly what the stock model of the exported config holds."""
    config = EncoderConfig.from_hf(raw_config(name))
    exported = config.to_hf()
    model_class = {"ministral3": Ministral3Model, "llama": LlamaModel, "qwen3": Qwen3Model}[config.family]
    assert exported.architectures == [model_class.__name__] == [FAMILIES[config.family].model_class]
    wanted = {n: tuple(p.shape) for n, p in meta_model(model_class, exported).named_parameters()}
    table = {n: s for row in mapping.weights(config) for n, s in zip(row.hf, row.hf_shapes, strict=True)}
    assert table == wanted


@pytest.mark.parametrize("name", SIZES)
def test_verify_finds_no_difference_in_the_exports_config(name: str) -> None:
    raw = raw_config(name)
    config = EncoderConfig.from_hf(raw)
    assert not compare_encoders(config, raw, where="config.json").differences
    other = compare_encoders(config.replace(rms_norm_eps=1e-4), raw, where="config.json").differences
    assert len(other) == 1


@pytest.mark.parametrize("name", ["ministral-3-3b", "ministral-3-14b", "llama-3.1-8b", "qwen3-0.6b"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (8, 2)])
def test_chunks_hold_every_parameter_once(name: str, tp: int, pp: int, tmp_path: Path) -> None:
    folder = hollow_folder(tmp_path / "folder", name)
    config = folder.encoder_config()
    pieces = list(chunks(folder, config, dtype=torch.bfloat16, tp=tp, pp=pp))
    assert {piece.rank for piece in pieces} == set(range(tp * pp))
    held: dict[str, int] = {}
    for piece in pieces:
        held[piece.key] = held.get(piece.key, 0) + math.prod(piece.shape)
    assert held == {piece.key: math.prod(piece.global_shape) for piece in pieces}
    assert len({(piece.key, piece.offsets) for piece in pieces}) == len(pieces)
    # one chunk is the most that import holds in memory
    embedding = config.vocab_size * config.hidden_size * 2
    assert max(piece.nbytes for piece in pieces) <= -(-embedding // tp)


def test_llamas_real_frequencies() -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from megatron_embed.bridge.rope import inverse_frequencies

    for name in ("llama-3.2-1b", "llama-3.1-8b"):
        config = EncoderConfig.from_hf(raw_config(name))
        wanted = LlamaRotaryEmbedding(LlamaConfig(**raw_config(name)))
        frequencies, factor = inverse_frequencies(config)
        assert torch.equal(frequencies, wanted.inv_freq)
        assert factor == 1.0
        assert len(frequencies) == {"llama-3.2-1b": 32, "llama-3.1-8b": 64}[name]
