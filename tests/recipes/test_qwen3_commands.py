"""Qwen3 through the commands: import, plan, train from both forms, export, verify; the embedder loads elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from support.places import HF_CONFIGS
from support.runs import read_metrics, write_pairs
from support.tiny_families import save_qwen3
from transformers import AutoModel, AutoTokenizer, Qwen3Config, Qwen3Model

from megatron_embed import recipes
from megatron_embed.bridge.layout import Layout
from megatron_embed.conversion.convert_checkpoints import main as convert
from megatron_embed.recipes import RECIPES, Encoder, train
from megatron_embed.recipes.config.overrides import apply_overrides
from megatron_embed.recipes.planning.model_sizes import encoder_of
from megatron_embed.recipes.planning.state import chunk_parameters, chunks_of

pytestmark = pytest.mark.slow

#: recipe → its model's config; the head of the language model, tied or not, is no part of the encoder
SIZES = {"qwen3_0p6b_embed_config": "0.6b", "qwen3_4b_embed_config": "4b", "qwen3_8b_embed_config": "8b"}
OVERRIDES = [
    "model.precision=fp32",
    "device=cpu",
    "train.train_iters=6",
    "train.log_interval=1",
    "train.save_interval=1000",
    "train.global_batch_size=4",
    "train.micro_batch_tokens=128",
    "data.query_max_length=32",
    "data.passage_max_length=64",
    "optimizer.lr=1e-3",
    "optimizer.warmup_iters=0",
    "logger.tensorboard=false",
]


def test_imported_trained_exported_and_loaded_elsewhere(tmp_path: Path) -> None:
    model = save_qwen3(tmp_path / "model")
    data = write_pairs(tmp_path / "train.jsonl", 40)
    assert convert(["import", "--hf-model", str(model), "--megatron-path", str(tmp_path / "m"), "--no-progress"]) == 0
    assert convert(["verify", "--hf-model", str(model), "--megatron-path", str(tmp_path / "m"), "--no-progress"]) == 0
    losses = {}
    sources = {"direct": f"model.hf_model={model}", "imported": f"checkpoint.pretrained_checkpoint={tmp_path / 'm'}"}
    for name, source in sources.items():
        words = [source, f"data.train={data}", f"train.save_dir={tmp_path / name}", *OVERRIDES]
        if name == "imported":
            words.append("model.hf_model=null")
        train(apply_overrides(RECIPES["qwen3_0p6b_embed_config"](), words))
        losses[name] = [record["loss"] for record in read_metrics(tmp_path / name)]
    assert losses["direct"] == losses["imported"]
    assert losses["direct"][-1] < losses["direct"][0]
    out = tmp_path / "hf"
    assert convert(["export", "--megatron-path", str(tmp_path / "direct"), "--hf-path", str(out), "--no-progress"]) == 0
    raw = json.loads((out / "config.json").read_text())
    assert (raw["architectures"], raw["model_type"], raw["is_causal"]) == (["Qwen3Model"], "qwen3", False)
    texts = ["query: how do plants eat?", "passage: w1 w2 w3 w4 w5", "query: w7"]
    theirs = SentenceTransformer(str(out), device="cpu", local_files_only=True).encode(texts, convert_to_tensor=True)
    by_hand = AutoModel.from_pretrained(out).eval()
    assert isinstance(by_hand, Qwen3Model)
    inputs = AutoTokenizer.from_pretrained(out)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = by_hand(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    mean = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    torch.testing.assert_close(theirs, mean, rtol=0, atol=1e-6)
    with Encoder.from_pretrained(out, device="cpu", dtype=torch.float32) as ours:
        found = torch.from_numpy(ours.encode(texts, prompt=""))
    torch.testing.assert_close(found, mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_the_planner_counts_every_parameter_of_the_real_sizes(size: str, tp: int) -> None:
    raw = json.loads((HF_CONFIGS / f"qwen3-{SIZES[size]}.json").read_text())
    with torch.device("meta"):
        model = Qwen3Model(Qwen3Config(**raw))
    config, layout = encoder_of(RECIPES[size](), recipes.SIZES), Layout(tp=tp)
    assert model.layers[0].self_attn.q_norm.weight.shape == (128,)
    (chunk,) = chunks_of(config, layout, 0)
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name)
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert sum(chunk_parameters(config, layout, chunk)) == (whole - norms) // tp + norms
