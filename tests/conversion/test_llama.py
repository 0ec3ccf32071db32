"""The second family: Llama in every form, there and back, and as a stock bidirectional LlamaModel."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from support.hf_files import Source, assert_same_bits, edit_json, edit_tensors, encoder_tensors_of, tensors_of
from transformers import AutoConfig, AutoModel, AutoTokenizer, LlamaForCausalLM

from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.exporting import export_hf
from megatron_embed.conversion.importing import import_hf
from megatron_embed.conversion.verify import verify

TEXTS = ["query: how do plants eat?", "passage: a  b <|end_of_text|> c", "ünïcödé 漢字"]


def there_and_back(source: Path, tmp_path: Path, *, tp: int = 1, pp: int = 1) -> Path:
    import_hf(source, tmp_path / "m", tp=tp, pp=pp, progress=False)
    export_hf(tmp_path / "m", tmp_path / "hf", progress=False)
    return tmp_path / "hf"


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 2)])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["llama_causal_lm", "llama_model"])
def test_there_and_back(kind: str, tied: bool, tp: int, pp: int, source: Source, tmp_path: Path) -> None:
    folder = source(kind, tie_word_embeddings=tied, dtype="bfloat16")
    assert ("lm_head.weight" in tensors_of(folder)) == (kind == "llama_causal_lm" and not tied)
    out = there_and_back(folder, tmp_path, tp=tp, pp=pp)
    assert_same_bits(tensors_of(out), encoder_tensors_of(folder))
    assert verify(folder, megatron_path=tmp_path / "m", progress=False)


def test_config_of_the_export(source: Source, tmp_path: Path) -> None:
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


def test_vectors_are_the_source_models(source: Source, tmp_path: Path) -> None:
    """The source's own decoder made bidirectional and pooled by hand, against ``SentenceTransformer.encode``."""
    folder = source("llama_causal_lm")
    out = there_and_back(folder, tmp_path)
    assert type(AutoModel.from_pretrained(out)).__name__ == "LlamaModel"
    decoder = LlamaForCausalLM.from_pretrained(folder).model.eval()
    decoder.config.is_causal = False
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.split_special_tokens = True
    wanted = []
    for text in TEXTS:
        ids = [*tokenizer(text)["input_ids"], 2]
        with torch.no_grad():
            mean = decoder(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
        wanted.append(mean / mean.norm())
    found = SentenceTransformer(str(out), device="cpu", local_files_only=True).encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(found, torch.stack(wanted), rtol=0, atol=1e-6)


def test_tokens_are_the_training_ones(source: Source, tmp_path: Path) -> None:
    recipes = pytest.importorskip("megatron_embed.recipes.datasets.tokenization")
    folder = source("llama_model")
    out = there_and_back(folder, tmp_path)
    training = recipes.TextTokenizer.from_folder(
        folder, query_prompt="", passage_prompt="", query_max_length=512, passage_max_length=512
    )
    exported = AutoTokenizer.from_pretrained(out)
    for text in TEXTS:
        ids = exported(text)["input_ids"]
        assert ids == training.tokenize([text], "query")[0]
        assert (ids[0], ids[-1], ids.count(2)) == (1, 2, 1)
    assert exported.pad_token == "<|finetune_right_pad_id|>"


def test_a_tokenizer_without_any_padding_token_pads_with_eos(source: Source, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    shutil.copytree(source("llama_model"), folder)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<|finetune_right_pad_id|>", "<|reserved_special_token_0|>"))
    out = there_and_back(folder, tmp_path)
    assert AutoTokenizer.from_pretrained(out).pad_token == "<|end_of_text|>"
    model = SentenceTransformer(str(out), device="cpu", local_files_only=True)
    together, alone = (model.encode(texts, convert_to_tensor=True) for texts in (["a b c d e", "f"], ["f"]))
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("attention_bias", True, "False"),
        ("mlp_bias", True, "False"),
        ("pretraining_tp", 2, "1"),
        ("hidden_act", "gelu", "'silu'"),
        ("partial_rotary_factor", 0.5, "1.0"),
    ],
)
def test_what_the_encoder_does_not_compute(
    key: str, value: object, wanted: str, source: Source, tmp_path: Path
) -> None:
    folder = tmp_path / "source"
    shutil.copytree(source("llama_model"), folder)
    edit_json(folder / "config.json", lambda raw: raw.update({key: value}))
    with pytest.raises(UserError, match=f"config.json: {key} is {value!r}; the encoder computes {wanted} only"):
        import_hf(folder, tmp_path / "m", progress=False)


def test_a_config_that_transformers_refuses(source: Source, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    shutil.copytree(source("llama_model"), folder)
    edit_json(folder / "config.json", lambda raw: raw.update(hidden_size=65))
    with pytest.raises(UserError, match=r"config.json: not a valid LlamaConfig .*not a multiple of"):
        import_hf(folder, tmp_path / "m", progress=False)


def test_a_llama_has_no_vision_tower(source: Source, tmp_path: Path) -> None:
    """What Ministral 3 may leave out is an unknown tensor here."""
    folder = tmp_path / "source"
    shutil.copytree(source("llama_model"), folder)
    edit_tensors(folder, lambda tensors: tensors.update({"vision_tower.x": torch.zeros(3)}))
    with pytest.raises(UserError, match=r"vision_tower.x: not a tensor of this model"):
        import_hf(folder, tmp_path / "m", progress=False)
    with pytest.raises(UserError, match="has no vision tower"):
        import_hf(source("llama_causal_lm"), tmp_path / "m", with_vision=True, progress=False)
