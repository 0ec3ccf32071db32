"""The families beside Ministral 3, Llama and Qwen3: there and back, and as stock bidirectional models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from support.hf_files import Source, assert_same_bits, edit_json, edit_tensors, encoder_tensors_of, tensors_of
from test_round_trip import there_and_back
from transformers import AutoConfig, AutoModel, AutoTokenizer, LlamaForCausalLM, Qwen3ForCausalLM

from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.importing import import_hf
from megatron_embed.conversion.verify import verify
from megatron_embed.recipes.datasets.tokenization import TextTokenizer

FAMILIES = ("llama", "qwen3")
CAUSAL_LM: dict[str, Any] = {"llama": LlamaForCausalLM, "qwen3": Qwen3ForCausalLM}
MODEL = {"llama": "LlamaModel", "qwen3": "Qwen3Model"}
#: ids in front of every text
BOS: dict[str, list[int]] = {"llama": [1], "qwen3": []}
TEXTS = ["query: how do plants eat?", "passage: a  b <|end_of_text|> <|im_end|> c", "ünïcödé 漢字"]


def changed(folder: Path, tmp_path: Path, **config: Any) -> Path:
    """A copy of a model's folder with other values in its config."""
    shutil.copytree(folder, tmp_path / "source")
    edit_json(tmp_path / "source" / "config.json", lambda raw: raw.update(config))
    return tmp_path / "source"


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 2)])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("form", ["causal_lm", "model"])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(family: str, form: str, tied: bool, tp: int, pp: int, source: Source, tmp_path: Path) -> None:
    folder = source(f"{family}_{form}", tie_word_embeddings=tied, dtype="bfloat16")
    assert ("lm_head.weight" in tensors_of(folder)) == (form == "causal_lm" and not tied)
    found = tensors_of(there_and_back(folder, tmp_path, tp=tp, pp=pp))
    assert ("layers.0.self_attn.q_norm.weight" in found) == (family == "qwen3")
    assert_same_bits(found, encoder_tensors_of(folder))
    assert verify(folder, megatron_path=tmp_path / "megatron", progress=False)


def test_config_of_the_export_of_a_llama(source: Source, tmp_path: Path) -> None:
    folder = source("llama_causal_lm", dtype="bfloat16")
    raw = json.loads((there_and_back(folder, tmp_path) / "config.json").read_text())
    wanted = {
        "architectures": ["LlamaModel"],
        "model_type": "llama",
        "is_causal": False,
        "head_dim": 8,
        "pooling": "avg",
        "normalize": True,
        "temperature": 0.02,
        "dtype": "bfloat16",
    }
    assert {key: raw.get(key) for key in wanted} == wanted
    assert raw["rope_parameters"] == AutoConfig.from_pretrained(folder).rope_parameters
    assert raw["rope_parameters"]["rope_type"] == "llama3"
    assert not {"llama_4_scaling", "auto_map"} & set(raw)
    assert "apply_yarn_scaling" not in raw["rope_parameters"]
    assert "a stock `LlamaModel`" in (tmp_path / "hf" / "README.md").read_text()


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_are_the_source_models(family: str, source: Source, tmp_path: Path) -> None:
    """The source's own decoder made bidirectional and pooled by hand, against ``SentenceTransformer.encode``."""
    folder = source(f"{family}_causal_lm")
    out = there_and_back(folder, tmp_path)
    raw = json.loads((out / "config.json").read_text())
    assert (raw["architectures"], raw["is_causal"]) == ([MODEL[family]], False)
    assert type(AutoModel.from_pretrained(out)).__name__ == MODEL[family]
    decoder = CAUSAL_LM[family].from_pretrained(folder).model.eval()
    decoder.config.is_causal = False
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.split_special_tokens = True
    wanted = []
    for text in TEXTS:
        ids = [*BOS[family], *tokenizer(text, add_special_tokens=False)["input_ids"], 2]
        assert ids.count(2) == 1
        with torch.no_grad():
            mean = decoder(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
        wanted.append(mean / mean.norm())
    found = SentenceTransformer(str(out), device="cpu", local_files_only=True).encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(found, torch.stack(wanted), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("family", "pad"), [("llama", "<|finetune_right_pad_id|>"), ("qwen3", "<|endoftext|>")])
def test_tokens_are_the_training_ones(family: str, pad: str, source: Source, tmp_path: Path) -> None:
    folder = source(f"{family}_model")
    out = there_and_back(folder, tmp_path)
    training = TextTokenizer.from_folder(
        folder, query_prompt="", passage_prompt="", query_max_length=512, passage_max_length=512
    )
    exported = AutoTokenizer.from_pretrained(out)
    found = [exported(text)["input_ids"] for text in TEXTS]
    assert found == training.tokenize(TEXTS, "query")
    assert all(ids[-1] == 2 and ids.count(2) == 1 for ids in found)  # EOS behind every text, and nowhere else
    assert all([token for token in ids if token == 1] == BOS[family] == ids[: len(BOS[family])] for ids in found)
    assert exported.pad_token == pad


def test_a_tokenizer_without_any_padding_token_pads_with_eos(source: Source, tmp_path: Path) -> None:
    folder = changed(source("llama_model"), tmp_path)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<|finetune_right_pad_id|>", "<|reserved_special_token_0|>"))
    out = there_and_back(folder, tmp_path)
    assert AutoTokenizer.from_pretrained(out).pad_token == "<|end_of_text|>"
    model = SentenceTransformer(str(out), device="cpu", local_files_only=True)
    together, alone = (model.encode(texts, convert_to_tensor=True) for texts in (["a b c d e", "f"], ["f"]))
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "key", "value", "message"),
    [
        ("llama", "attention_bias", True, "attention_bias is True; the encoder computes False only"),
        ("llama", "mlp_bias", True, "mlp_bias is True; the encoder computes False only"),
        ("llama", "pretraining_tp", 2, "pretraining_tp is 2; the encoder computes 1 only"),
        ("llama", "hidden_act", "gelu", "hidden_act is 'gelu'; the encoder computes 'silu' only"),
        ("llama", "partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5; the encoder computes 1.0 only"),
        ("llama", "hidden_size", 65, "not a valid LlamaConfig .*not a multiple of"),
        ("qwen3", "attention_bias", True, "attention_bias is True; the encoder computes False only"),
        ("qwen3", "use_sliding_window", True, "use_sliding_window is True; the encoder computes False only"),
        (
            *("qwen3", "layer_types", ["full_attention", "sliding_attention"]),
            "layer_types has 'sliding_attention'; the encoder computes",
        ),
    ],
)
def test_what_the_encoder_does_not_compute(
    family: str, key: str, value: object, message: str, source: Source, tmp_path: Path
) -> None:
    folder = changed(source(f"{family}_model"), tmp_path, **{key: value})
    with pytest.raises(UserError, match=f"config.json: {message}"):
        import_hf(folder, tmp_path / "megatron", progress=False)


def test_verify_passes_over_what_only_a_window_would_use(source: Source, tmp_path: Path) -> None:
    """``max_window_layers`` says nothing without a sliding window; the export need not repeat it."""
    folder = changed(source("qwen3_model"), tmp_path, max_window_layers=36)
    out = there_and_back(folder, tmp_path)
    assert verify(folder, hf_path=out, progress=False)
    assert verify(folder, megatron_path=tmp_path / "megatron", progress=False)


def test_a_llama_has_no_vision_tower(source: Source, tmp_path: Path) -> None:
    """What Ministral 3 may leave out is an unknown tensor here."""
    folder = changed(source("llama_model"), tmp_path)
    edit_tensors(folder, lambda tensors: tensors.update({"vision_tower.x": torch.zeros(3)}))
    with pytest.raises(UserError, match=r"vision_tower.x: not a tensor of this model"):
        import_hf(folder, tmp_path / "megatron", progress=False)
    with pytest.raises(UserError, match="has no vision tower"):
        import_hf(source("llama_causal_lm"), tmp_path / "megatron", with_vision=True, progress=False)
