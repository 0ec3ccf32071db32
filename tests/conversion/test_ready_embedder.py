"""A ready embedder, such as Nemotron-3-Embed, as a source: its sentence-transformers files decide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Normalize, Pooling, Transformer
from support.hf_files import Source, assert_same_bits, edit_json, encoder_tensors_of, tensors_of
from support.places import HF_CONFIGS
from transformers import AutoTokenizer

from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.exporting import export_hf
from megatron_embed.conversion.importing import import_hf
from megatron_embed.conversion.verify import verify

PROMPTS = {"query": "Instruct: find it\nQuery: ", "document": " "}
TEXTS = ["how do plants eat?", "a  b [INST]</s> c", "one two three " * 40]


def ready(source: Path, folder: Path, *, pooling: str = "mean", normalize: bool = True, **tokenizer: Any) -> Path:
    """A bare bidirectional model saved by sentence-transformers itself."""
    edit = source.parent / f"{folder.parent.name}-plain"
    edit.mkdir()
    for path in source.iterdir():
        (edit / path.name).write_bytes(path.read_bytes())
    edit_json(edit / "config.json", lambda raw: raw.update(is_causal=False, pooling="avg"))
    edit_json(edit / "tokenizer_config.json", lambda raw: raw.update(split_special_tokens=True))
    edit_json(edit / "tokenizer.json", lambda raw: raw.update(tokenizer))
    transformer = Transformer(str(edit), max_seq_length=48)
    modules: list[Any] = [transformer, Pooling(48, pooling_mode=pooling)]
    modules += [Normalize()] if normalize else []
    model = SentenceTransformer(modules=modules, prompts=PROMPTS, device="cpu", similarity_fn_name="cosine")
    model.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize(
    ("pooling", "normalize"),
    [("mean", True), ("mean", False), ("cls", True), ("lasttoken", True), ("weightedmean", False)],
)
def test_it_comes_back_as_it_was(pooling: str, normalize: bool, source: Source, tmp_path: Path) -> None:
    folder = ready(source("model"), tmp_path / "ready", pooling=pooling, normalize=normalize)
    import_hf(folder, tmp_path / "m", tp=2, progress=False)
    settings = yaml.safe_load((tmp_path / "m" / "iter_0000000" / "run_config.yaml").read_text())
    assert settings["data"] == {
        "query_prompt": PROMPTS["query"],
        "passage_prompt": PROMPTS["document"],
        "query_max_length": 48,
        "passage_max_length": 48,
    }
    export_hf(tmp_path / "m", tmp_path / "hf", progress=False)
    assert_same_bits(tensors_of(tmp_path / "hf"), encoder_tensors_of(folder))
    before, after = (
        SentenceTransformer(str(p), device="cpu", local_files_only=True) for p in (folder, tmp_path / "hf")
    )
    assert after.prompts == before.prompts == PROMPTS
    assert after.max_seq_length == before.max_seq_length == 48
    for name in ("query", "document"):
        a, b = (model.encode(TEXTS, prompt_name=name, convert_to_tensor=True) for model in (before, after))
        assert torch.equal(a, b)
        assert (a.norm(dim=1) - 1).abs().max() < 1e-5 or not normalize


def test_its_tokenizer_stays_as_it_was_trained(source: Source, tmp_path: Path) -> None:
    """One that adds no EOS gets none: neither in training nor in the export."""
    recipes = pytest.importorskip("megatron_embed.recipes.datasets.tokenization")
    folder = ready(source("model"), tmp_path / "ready", post_processor=None)
    import_hf(folder, tmp_path / "m", progress=False)
    export_hf(tmp_path / "m", tmp_path / "hf", progress=False)
    wanted = AutoTokenizer.from_pretrained(folder)("hello")["input_ids"]
    assert 2 not in wanted
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")("hello")["input_ids"] == wanted
    for path in (folder, tmp_path / "m" / "iter_0000000" / "hf"):
        training = recipes.TextTokenizer.from_folder(
            path, query_prompt="", passage_prompt="", query_max_length=9, passage_max_length=9
        )
        assert training.tokenize(["hello"], "query") == [wanted]


def test_a_tokenizer_without_attention_mask(source: Source, tmp_path: Path) -> None:
    """Its own vectors depend on padding: refused. A base model has none yet: its export masks padding."""
    folder = ready(source("model"), tmp_path / "ready")
    path = folder / "tokenizer_config.json"
    edit_json(path, lambda raw: raw.update(model_input_names=["input_ids"]))
    with pytest.raises(UserError, match=rf'{path}: model_input_names is \["input_ids"\]; wanted .*attention_mask'):
        import_hf(folder, tmp_path / "m", progress=False)
    (folder / "modules.json").unlink()
    import_hf(folder, tmp_path / "m", progress=False)
    export_hf(tmp_path / "m", tmp_path / "hf", progress=False)
    assert "attention_mask" in AutoTokenizer.from_pretrained(tmp_path / "hf")("hello")
    assert verify(folder, hf_path=tmp_path / "hf", progress=False)


def test_modules_that_would_change_the_vectors(source: Source, tmp_path: Path) -> None:
    folder = ready(source("model"), tmp_path / "ready")

    def add_dense(modules: list[dict[str, Any]]) -> None:
        modules.append({"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"})

    edit_json(folder / "modules.json", add_dense)
    with pytest.raises(UserError, match="modules Transformer, Pooling, Normalize, Dense; wanted"):
        import_hf(folder, tmp_path / "m", progress=False)


def test_the_shipped_shape_is_understood() -> None:
    from megatron_embed.bridge.config import EncoderConfig

    path = HF_CONFIGS / "nemotron-3-embed-1b-like.json"
    config = EncoderConfig.from_hf(json.loads(path.read_text()))
    assert (config.hidden_size, config.num_attention_heads, config.head_dim) == (2048, 24, 128)
    assert (config.pooling, config.normalize, config.dtype) == ("avg", True, "bfloat16")
