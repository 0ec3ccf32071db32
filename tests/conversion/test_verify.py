"""``verify``: equal tensors, and vectors that the two sides' own programs make of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.hf_files import Source, edit_json

from megatron_embed.conversion import verify as verify_module
from megatron_embed.conversion.checkpoint_folder import RUN_CONFIG
from megatron_embed.conversion.exporting import export_hf
from megatron_embed.conversion.importing import import_hf
from megatron_embed.conversion.verify import verify


def edit_encoder(megatron: Path, **changes: Any) -> None:
    path = megatron / "iter_0000000" / RUN_CONFIG
    values = yaml.safe_load(path.read_text())
    values["encoder"].update(changes)
    path.write_text(yaml.safe_dump(values))


@pytest.mark.parametrize("kind", ["vlm", "causal_lm", "model", "llama_causal_lm"])
def test_hugging_face_and_megatron_embed_alike(kind: str, source: Source, tmp_path: Path) -> None:
    folder = source(kind, vocab_size=1003, dtype="bfloat16")
    import_hf(folder, tmp_path / "m", tp=2, progress=False)
    outcome = verify(folder, megatron_path=tmp_path / "m", progress=False)
    assert outcome
    assert outcome.embeddings is not None
    assert outcome.embeddings <= 1e-6
    assert outcome.notes == []


@pytest.mark.parametrize("pooling", ["cls", "last", "weighted_avg"])
@pytest.mark.parametrize("normalize", [True, False])
def test_pooled_as_the_checkpoint_says(pooling: str, normalize: bool, source: Source, tmp_path: Path) -> None:
    """A VLM states no pooling; what was made of it does, and the VLM is pooled alike."""
    import_hf(source("vlm"), tmp_path / "m", progress=False)
    edit_encoder(tmp_path / "m", pooling=pooling, normalize=normalize)
    export_hf(tmp_path / "m", tmp_path / "hf", progress=False)
    for first, other in (("vlm", {"megatron_path": "m"}), ("vlm", {"hf_path": "hf"}), ("hf", {"megatron_path": "m"})):
        left = tmp_path / first if first == "hf" else source(first)
        assert verify(left, **{k: tmp_path / v for k, v in other.items()}, progress=False), (first, other)  # type: ignore[arg-type]


def test_equal_tensors_under_another_config(source: Source, tmp_path: Path) -> None:
    """The same weights with other rotary frequencies are another model; only vectors show it."""
    folder = source("model")
    import_hf(folder, tmp_path / "m", progress=False)
    export_hf(tmp_path / "m", tmp_path / "hf", progress=False)
    rope = yaml.safe_load((tmp_path / "m" / "iter_0000000" / RUN_CONFIG).read_text())["encoder"]["rope_parameters"]
    edit_encoder(tmp_path / "m", rope_parameters={**rope, "rope_theta": 1e4})
    outcome = verify(folder, megatron_path=tmp_path / "m", progress=False)
    assert [difference.name for difference in outcome.differences] == ["embeddings"]
    assert outcome.equal == outcome.compared
    edit_json(tmp_path / "hf" / "config.json", lambda raw: raw["rope_parameters"].update(rope_theta=1e4))
    assert [d.name for d in verify(folder, hf_path=tmp_path / "hf", progress=False).differences] == ["embeddings"]


def test_a_converted_dtype_is_no_difference(source: Source, tmp_path: Path) -> None:
    folder = source("model", dtype="float32")
    import_hf(folder, tmp_path / "m", torch_dtype="bfloat16", progress=False)
    assert verify(folder, megatron_path=tmp_path / "m", progress=False)
    export_hf(tmp_path / "m", tmp_path / "hf", progress=False)
    assert verify(folder, hf_path=tmp_path / "hf", progress=False)
    assert verify(tmp_path / "hf", megatron_path=tmp_path / "m", progress=False).embeddings is not None


def test_fp8_against_megatron(tmp_path: Path) -> None:
    from test_round_trip import fp8_source

    folder, _ = fp8_source(tmp_path / "fp8")
    import_hf(folder, tmp_path / "m", progress=False)
    outcome = verify(folder, megatron_path=tmp_path / "m", progress=False)
    assert outcome
    assert outcome.embeddings is not None


def test_when_vectors_cannot_be_compared_it_says_why(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "source"
    shutil.copytree(source("model"), folder)
    import_hf(folder, tmp_path / "m", progress=False)
    monkeypatch.setattr(verify_module, "EMBEDDING_LIMIT", 1000)
    outcome = verify(folder, megatron_path=tmp_path / "m", progress=False)
    assert outcome
    assert outcome.embeddings is None
    assert outcome.notes[-1].startswith("embeddings not compared: more than")
    (folder / "tokenizer.json").unlink()
    outcome = verify(folder, megatron_path=tmp_path / "m", progress=False)
    assert outcome.notes[-1].endswith("has no tokenizer.json")
    assert not torch.distributed.is_initialized()
