"""NeMo AutoModel's own form of an embedder, ``ministral3_bidirec`` and ``llama_bidirec``: as sources, and loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.hf_files import Source, assert_same_bits, edit_json, encoder_tensors_of, tensors_of
from transformers import AutoConfig, AutoModel

from megatron_embed import bridge
from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.exporting import export_hf
from megatron_embed.conversion.hf.folder import HFFolder
from megatron_embed.conversion.importing import import_hf
from megatron_embed.conversion.verify import verify

FAMILIES = {"model": "ministral3", "llama_model": "llama"}


def consolidated(source: Path, folder: Path, *, prefix: str = "", shards: int = 2, **config: Any) -> Path:
    """A stock model rewritten as AutoModel's ``model/consolidated`` folder: sharded, with its own classes' names."""
    folder.mkdir(parents=True)
    raw = json.loads((source / "config.json").read_text())
    family = {"ministral3": "Ministral3", "llama": "Llama"}[raw["model_type"]]
    raw |= {
        "model_type": f"{raw['model_type']}_bidirec",
        "architectures": [f"{family}BidirectionalModel"],
        "auto_map": {"AutoModel": f"model.{family}BidirectionalModel"},
        "pooling": "avg",
        "temperature": 0.05,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "model.py").write_text("raise RuntimeError('remote code was run')")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    tensors = [(prefix + name, tensor) for name, tensor in sorted(tensors_of(source).items())]
    weight_map = {}
    for number in range(shards):
        file, part = f"model-{number + 1:05}-of-{shards:05}.safetensors", dict(tensors[number::shards])
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("prefix", ["", "model."], ids=["bare", "model."])
@pytest.mark.parametrize("kind", FAMILIES)
def test_there_and_back_as_a_stock_model(kind: str, prefix: str, source: Source, tmp_path: Path) -> None:
    stock = source(kind, dtype="bfloat16")
    folder = consolidated(stock, tmp_path / "consolidated", prefix=prefix, pooling="last")
    import_hf(folder, tmp_path / "m", tp=2, progress=False)
    export_hf(tmp_path / "m", tmp_path / "hf", progress=False)
    assert_same_bits(tensors_of(tmp_path / "hf"), encoder_tensors_of(stock))
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    found = {key: raw.get(key) for key in ("model_type", "is_causal", "pooling", "temperature", "auto_map")}
    wanted = {"is_causal": False, "pooling": "last", "temperature": 0.05, "auto_map": None}
    assert found == {"model_type": FAMILIES[kind], **wanted}
    assert verify(folder, megatron_path=tmp_path / "m", progress=False)
    assert verify(folder, hf_path=tmp_path / "hf", progress=False).embeddings == 0.0


@pytest.mark.parametrize(
    ("theirs", "ours"), [("avg", "avg"), ("cls", "cls"), ("last", "last"), ("weighted_avg", "avg"), ("cls_last", "cls")]
)
def test_poolings(theirs: str, ours: str, source: Source, tmp_path: Path) -> None:
    """Its ``weighted_avg`` is a plain sum, which has the mean's direction; ``weighted_avg`` here weighs by position."""
    folder = consolidated(source("llama_model"), tmp_path / "consolidated", pooling=theirs)
    assert HFFolder(folder).encoder_config().pooling == ours


def test_a_pooling_without_one_vector(source: Source, tmp_path: Path) -> None:
    folder = consolidated(source("llama_model"), tmp_path / "consolidated", pooling="colbert")
    with pytest.raises(UserError, match="pooling: 'colbert' is not one of"):
        import_hf(folder, tmp_path / "m", progress=False)


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_classes_load_it_bidirectional(kind: str, source: Source, tmp_path: Path) -> None:
    """With ``AutoModel``, no remote code, even where the config says otherwise; as the stock model computes."""
    family = {"model": "Ministral3", "llama_model": "Llama"}[kind]
    model_class = getattr(bridge, f"{family}BidirectionalModel")
    folder = consolidated(source(kind), tmp_path / "consolidated", is_causal=True)
    edit_json(folder / "config.json", lambda raw: raw.pop("auto_map"))
    model = AutoModel.from_pretrained(folder).eval()
    assert type(model) is model_class
    assert type(AutoConfig.from_pretrained(folder)) is getattr(bridge, f"{family}BidirectionalConfig")
    assert (model.config.is_causal, model.config.pooling, model.config.temperature) == (False, "avg", 0.05)
    stock = AutoModel.from_pretrained(source(kind)).eval()
    stock.config.is_causal = False
    ids, mask = torch.arange(20, 44).reshape(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    with torch.no_grad():
        found, wanted = (m(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()] for m in (model, stock))
    assert torch.equal(found, wanted)


def test_trusting_code_that_is_never_run_is_refused(source: Source, tmp_path: Path) -> None:
    folder = consolidated(source("model"), tmp_path / "consolidated")
    with pytest.raises(UserError, match=r"config.json: --trust-remote-code asks for the model's own code \(auto_map\)"):
        import_hf(folder, tmp_path / "m", trust_remote_code=True, progress=False)
    assert not (tmp_path / "m").exists()
    edit_json(folder / "config.json", lambda raw: raw.pop("auto_map"))
    import_hf(folder, tmp_path / "m", trust_remote_code=True, progress=False)


@pytest.mark.parametrize("kind", FAMILIES)
def test_what_the_classes_save_is_a_source(kind: str, source: Source, tmp_path: Path) -> None:
    family = {"model": "Ministral3", "llama_model": "Llama"}[kind]
    folder = consolidated(source(kind), tmp_path / "consolidated", temperature=0.07, pooling="cls")
    getattr(bridge, f"{family}BidirectionalModel").from_pretrained(folder).save_pretrained(tmp_path / "saved")
    raw = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert raw["model_type"] == f"{FAMILIES[kind]}_bidirec"
    config = HFFolder(tmp_path / "saved").encoder_config()
    assert (config.family, config.pooling, config.temperature) == (FAMILIES[kind], "cls", 0.07)
    assert_same_bits(encoder_tensors_of(tmp_path / "saved"), encoder_tensors_of(source(kind)))


@pytest.mark.slow
def test_the_bridge_imports_them_only_when_asked() -> None:
    code = """
import sys
import megatron_embed.bridge as bridge
assert not {"torch", "transformers"} & set(sys.modules)
assert set(bridge.__all__) >= {"LlamaBidirectionalModel", "Ministral3BidirectionalConfig"}
assert bridge.LlamaBidirectionalConfig.model_type == "llama_bidirec"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = bridge.Nothing  # type: ignore[attr-defined]
