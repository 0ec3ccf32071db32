"""Vectors are found again by all that they depend on, and by nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hf_files import edit_json, edit_tensors
from support.mining import write
from support.tiny_models import save_model

from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.conversion.hf.sentence_files import SentenceSettings, write_sentence_files
from megatron_embed.recipes import Encoder
from megatron_embed.recipes.datasets.corpus import Corpus
from megatron_embed.recipes.encoding.source import ModelSource
from megatron_embed.recipes.retrieval.fingerprints import fingerprint, model_fingerprint
from megatron_embed.recipes.retrieval.miner import key
from megatron_embed.recipes.retrieval.vectors import DTYPES

ROWS = [{"_id": str(i), "title": "t", "text": f"text {i}"} for i in range(3)]
#: no prompts: nothing but their kind tells queries from passages
SETTINGS = SentenceSettings(query_prompt="", passage_prompt="", query_max_length=64, passage_max_length=64)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ready embedder, with a corpus beside."""
    folder = tmp_path_factory.mktemp("original")
    model = save_model(folder / "model")
    edit_json(model / "config.json", lambda raw: raw.update(is_causal=False))
    write_sentence_files(model, EncoderConfig.from_hf(model), SETTINGS)
    write(folder / "corpus.jsonl", ROWS)
    return folder


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    """The same at another place, to be changed."""
    return Path(shutil.copytree(original, tmp_path / "elsewhere"))


def stamp_of(folder: Path, change: Callable[[Encoder], object] | None = None, **options: Any) -> dict[str, Any]:
    asked: dict[str, Any] = {"kind": "passage", **options}
    with Encoder.from_pretrained(folder / "model", device="cpu", dtype=asked.pop("dtype", None)) as encoder:
        if change is not None:
            change(encoder)
        return fingerprint(encoder, Corpus(folder / "corpus.jsonl"), **asked)


def touched(folder: Path, stamp: dict[str, Any], **options: Any) -> set[str]:
    """Entries in which the folder's fingerprint differs from one; the cache's key differs if and only if any does."""
    found = stamp_of(folder, **options)
    names = {name for name in {**found, **stamp} if found.get(name, "none") != stamp.get(name, "none")}
    assert (key(found) != key(stamp)) == bool(names)
    return names


def test_where_the_folder_lies_does_not_matter(original: Path, copy: Path) -> None:
    assert not touched(copy, stamp_of(original))


def prompt(encoder: Encoder, kind: Any) -> None:
    encoder.tokenizer.prompts[kind] = "as: "


def length(encoder: Encoder, kind: Any) -> None:
    encoder.tokenizer.max_lengths[kind] = 63


@pytest.mark.parametrize("kind", ["query", "passage"])
@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"dim": 12}, "dim"),
        *(({"precision": precision}, "precision") for precision in DTYPES if precision != "float32"),
        ({"dtype": torch.bfloat16}, "compute_dtype"),
    ],
    ids=str,
)
def test_settings(options: dict[str, Any], wanted: str, kind: str, original: Path) -> None:
    assert touched(original, stamp_of(original, kind=kind), kind=kind, **options) == {wanted}


def test_kinds_and_their_prompts_and_lengths(original: Path) -> None:
    kinds = {kind: stamp_of(original, kind=kind) for kind in ("query", "passage")}
    assert touched(original, kinds["query"], kind="passage") == {"kind"}
    for kind, stamp in kinds.items():
        other = "passage" if kind == "query" else "query"
        for change, name in ((prompt, "prompt"), (length, "max_length")):
            assert touched(original, stamp, kind=kind, change=lambda e, c=change, k=kind: c(e, k)) == {name}
            assert not touched(original, stamp, kind=kind, change=lambda e, c=change, k=other: c(e, k))


def one_weight(tensors: dict[str, torch.Tensor]) -> None:
    tensors["layers.1.mlp.down_proj.weight"][3, 5] += 1e-3


def blank_line(path: Path) -> None:
    """Changes a file's bytes, and nothing of what it says."""
    path.write_bytes(path.read_bytes() + b"\n")


CHANGES: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "weights": (lambda f: edit_tensors(f / "model", one_weight), {"weights_sha256"}),
    "config": (lambda f: edit_json(f / "model/config.json", lambda c: c.update(rms_norm_eps=1e-4)), {"encoder"}),
    "tokenizer.json": (lambda f: blank_line(f / "model/tokenizer.json"), {"tokenizer_sha256"}),
    "tokenizer_config.json": (lambda f: blank_line(f / "model/tokenizer_config.json"), {"tokenizer_sha256"}),
    "modules.json": (lambda f: blank_line(f / "model/modules.json"), {"tokenizer_sha256"}),
    "the whole model's own file": (lambda f: (f / "model/consolidated.safetensors").write_bytes(b"?"), set()),
    "a note": (lambda f: (f / "model/README.md").write_text("?"), set()),
    "text": (lambda f: write(f / "corpus.jsonl", [*ROWS[:2], {**ROWS[2], "text": "?"}]), {"input_sha256"}),
    "id": (lambda f: write(f / "corpus.jsonl", [*ROWS[:2], {**ROWS[2], "_id": "?"}]), {"input_sha256"}),
    "order": (lambda f: write(f / "corpus.jsonl", ROWS[::-1]), {"input_sha256"}),
    "rows": (lambda f: write(f / "corpus.jsonl", ROWS[:2]), {"input_sha256", "rows"}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_files(name: str, original: Path, copy: Path) -> None:
    change, wanted = CHANGES[name]
    change(copy)
    assert touched(copy, stamp_of(original)) == wanted


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", ".metadata"])
def test_weights_of_a_megatron_checkpoint(name: str, original: Path, tmp_path: Path) -> None:
    for file in ("__0_0.distcp", "__1_0.distcp", ".metadata"):
        (tmp_path / file).write_bytes(file.encode())
    source = replace(ModelSource.open(original / "model"), hf=None, iter_dir=tmp_path)
    before = model_fingerprint(source)
    assert model_fingerprint(source) == before
    (tmp_path / name).write_bytes(b"other")
    found = model_fingerprint(source)
    assert {entry for entry in found if found[entry] != before[entry]} == {"weights_sha256"}
