"""The third family: Qwen3 there and back, and as a stock bidirectional Qwen3Model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from support.hf_files import Source, assert_same_bits, edit_json, encoder_tensors_of, tensors_of
from transformers import AutoModel, AutoTokenizer, Qwen3ForCausalLM

from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.exporting import export_hf
from megatron_embed.conversion.importing import import_hf
from megatron_embed.conversion.verify import verify
from megatron_embed.recipes.datasets.tokenization import TextTokenizer

TEXTS = ["query: how do plants eat?", "passage: a  b <|im_end|> c", "ünïcödé 漢字"]


def there_and_back(source: Path, tmp_path: Path, *, tp: int = 1, pp: int = 1) -> Path:
    import_hf(source, tmp_path / "m", tp=tp, pp=pp, progress=False)
    export_hf(tmp_path / "m", tmp_path / "hf", progress=False)
    return tmp_path / "hf"


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (4, 2)])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["qwen3_causal_lm", "qwen3_model"])
def test_there_and_back(kind: str, tied: bool, tp: int, pp: int, source: Source, tmp_path: Path) -> None:
    folder = source(kind, tie_word_embeddings=tied, dtype="bfloat16")
    out = there_and_back(folder, tmp_path, tp=tp, pp=pp)
    found = tensors_of(out)
    assert "layers.0.self_attn.q_norm.weight" in found
    assert_same_bits(found, encoder_tensors_of(folder))
    assert verify(folder, megatron_path=tmp_path / "m", progress=False)


def test_vectors_are_the_source_models(source: Source, tmp_path: Path) -> None:
    """The source's own decoder made bidirectional and pooled by hand, against ``SentenceTransformer.encode``."""
    folder = source("qwen3_causal_lm")
    out = there_and_back(folder, tmp_path)
    raw = json.loads((out / "config.json").read_text())
    assert (raw["architectures"], raw["is_causal"]) == (["Qwen3Model"], False)
    assert type(AutoModel.from_pretrained(out)).__name__ == "Qwen3Model"
    decoder = Qwen3ForCausalLM.from_pretrained(folder).model.eval()
    decoder.config.is_causal = False
    tokenizer = AutoTokenizer.from_pretrained(out)
    wanted = []
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert (ids[-1], ids.count(2), 1 in ids) == (2, 1, False)  # EOS behind, and no BOS
        with torch.no_grad():
            mean = decoder(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
        wanted.append(mean / mean.norm())
    found = SentenceTransformer(str(out), device="cpu", local_files_only=True).encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(found, torch.stack(wanted), rtol=0, atol=1e-6)


def test_tokens_are_the_training_ones(source: Source, tmp_path: Path) -> None:
    folder = source("qwen3_model")
    out = there_and_back(folder, tmp_path)
    training = TextTokenizer.from_folder(
        folder, query_prompt="", passage_prompt="", query_max_length=512, passage_max_length=512
    )
    exported = AutoTokenizer.from_pretrained(out)
    assert [exported(text)["input_ids"] for text in TEXTS] == training.tokenize(TEXTS, "query")
    assert exported.pad_token == "<|endoftext|>"


@pytest.mark.parametrize(
    ("key", "value", "wanted"), [("attention_bias", True, "False"), ("use_sliding_window", True, "False")]
)
def test_what_the_encoder_does_not_compute(
    key: str, value: object, wanted: str, source: Source, tmp_path: Path
) -> None:
    folder = tmp_path / "source"
    shutil.copytree(source("qwen3_model"), folder)
    edit_json(folder / "config.json", lambda raw: raw.update({key: value}))
    with pytest.raises(UserError, match=f"config.json: {key} is {value!r}; the encoder computes {wanted} only"):
        import_hf(folder, tmp_path / "m", progress=False)


def test_a_layer_with_a_sliding_window_is_refused(source: Source, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    shutil.copytree(source("qwen3_model"), folder)
    edit_json(folder / "config.json", lambda raw: raw.update(layer_types=["full_attention", "sliding_attention"]))
    with pytest.raises(UserError, match=r"config.json: layer_types has 'sliding_attention'; the encoder computes"):
        import_hf(folder, tmp_path / "m", progress=False)


def test_verify_passes_over_what_only_a_window_would_use(source: Source, tmp_path: Path) -> None:
    """``max_window_layers`` says nothing without a sliding window; the export need not repeat it."""
    folder = tmp_path / "source"
    shutil.copytree(source("qwen3_model"), folder)
    edit_json(folder / "config.json", lambda raw: raw.update(max_window_layers=36))
    out = there_and_back(folder, tmp_path)
    assert verify(folder, hf_path=out, progress=False)
    assert verify(folder, megatron_path=tmp_path / "m", progress=False)
