"""``verify``: equal tensors, and vectors that the two sides' own programs make of them."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fp8 import fp8_source
from support.hf_files import Source, edit_json, edit_tensors
from support.run_files import edit_encoder

from megatron_embed.conversion.compare import embeddings as embedding
from megatron_embed.conversion.exporting import export_hf
from megatron_embed.conversion.hf.folder import HFFolder
from megatron_embed.conversion.importing import import_hf
from megatron_embed.conversion.mcore.tensors import CheckpointReader
from megatron_embed.conversion.mcore.weights import CheckpointWeights
from megatron_embed.conversion.verify import verify

pytestmark = pytest.mark.slow


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


def test_a_converted_dtype_is_no_difference(source: Source, tmp_path: Path) -> None:
    folder = source("model", dtype="float32")
    import_hf(folder, tmp_path / "m", torch_dtype="bfloat16", progress=False)
    assert verify(folder, megatron_path=tmp_path / "m", progress=False)
    export_hf(tmp_path / "m", tmp_path / "hf", progress=False)
    assert verify(folder, hf_path=tmp_path / "hf", progress=False)
    assert verify(tmp_path / "hf", megatron_path=tmp_path / "m", progress=False).embeddings is not None


def test_fp8_against_megatron(tmp_path: Path) -> None:
    folder, _ = fp8_source(tmp_path / "fp8")
    import_hf(folder, tmp_path / "m", progress=False)
    outcome = verify(folder, megatron_path=tmp_path / "m", progress=False)
    assert outcome
    assert outcome.embeddings is not None


def test_without_a_tokenizer_fixed_ids_are_embedded(source: Source, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    shutil.copytree(source("model"), folder)
    (folder / "tokenizer.json").unlink()
    import_hf(folder, tmp_path / "m", progress=False)
    outcome = verify(folder, megatron_path=tmp_path / "m", progress=False)
    assert outcome
    assert outcome.embeddings is not None
    assert outcome.notes == [f"tokenizer not compared: {folder} has no tokenizer.json"]
    assert not torch.distributed.is_initialized()


# ---- what is as it should be


#: dtypes asked for at import and at export
CASTS = (("float16", None), (None, "float16"))
KINDS = ["vlm", "untied vlm", "fp8", "causal_lm", "model", "llama_causal_lm", "llama_model"]


@pytest.mark.parametrize(
    ("kind", "imported", "exported"),
    [*((kind, None, None) for kind in KINDS), *((k, *casts) for k in ("vlm", "fp8") for casts in CASTS)],
)
def test_every_conversion_verifies(
    kind: str, imported: str | None, exported: str | None, source: Source, tmp_path: Path
) -> None:
    """Source against checkpoint, embedder, VLM, with casts that were asked for; each export against the checkpoint."""
    if kind == "fp8":
        folder, _ = fp8_source(tmp_path / "fp8")
    else:
        folder = source(kind.removeprefix("untied "), tie_word_embeddings="untied" not in kind, dtype="float32")
    import_hf(folder, tmp_path / "m", torch_dtype=imported, tp=2, progress=False)
    pairs: list[tuple[Path, dict[str, Path]]] = [(folder, {"megatron_path": tmp_path / "m"})]
    for target in ("embedder", "vlm") if "vlm" in kind or kind == "fp8" else ("embedder",):
        out = tmp_path / target
        export_hf(tmp_path / "m", out, target=target, torch_dtype=exported, progress=False)  # type: ignore[arg-type]
        pairs += [(folder, {"hf_path": out})]
        pairs += [] if imported or exported else [(out, {"megatron_path": tmp_path / "m"})]
    for number, (first, other) in enumerate(pairs):
        outcome = verify(first, **other, progress=False)  # type: ignore[arg-type]
        assert outcome.differences == [], (first, other)
        assert outcome.embeddings is not None
        rounded = imported or (exported and number)
        assert bool([note for note in outcome.notes if "compared as" in note]) == bool(rounded)


def test_a_ready_embedder_verifies(source: Source, tmp_path: Path) -> None:
    """Saved by sentence-transformers itself, with prompts and a length of its own."""
    from test_ready_embedder import ready

    folder = ready(source("model"), tmp_path / "ready", pooling="lasttoken", normalize=False)
    edit_json(folder / "config.json", lambda raw: raw.update(pooling="last"))
    import_hf(folder, tmp_path / "m", progress=False)
    export_hf(tmp_path / "m", tmp_path / "hf", progress=False)
    for other in ({"megatron_path": tmp_path / "m"}, {"hf_path": tmp_path / "hf"}):
        outcome = verify(folder, **other, progress=False)  # type: ignore[arg-type]
        assert outcome.differences == []
        assert outcome.notes == []
    edit_json(tmp_path / "hf" / "sentence_bert_config.json", lambda raw: raw.update(max_seq_length=47))
    edit_json(tmp_path / "hf" / "config_sentence_transformers.json", lambda raw: raw.update(similarity_fn_name="dot"))
    outcome = verify(folder, hf_path=tmp_path / "hf", progress=False)
    assert {(difference.found, difference.wanted) for difference in outcome.differences} == {
        ("47", "48"),
        ("'dot'", "'cosine'"),
    }


# ---- embeddings, one layer at a time


@pytest.mark.parametrize("kind", ["vlm", "llama_model"])
def test_layer_by_layer_gives_sentence_transformers_vectors(kind: str, source: Source, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    import_hf(source(kind, num_hidden_layers=3), tmp_path / "m", tp=2, progress=False)
    export_hf(tmp_path / "m", tmp_path / "hf", progress=False)
    wanted = SentenceTransformer(str(tmp_path / "hf"), device="cpu", local_files_only=True).encode(
        list(embedding.SENTENCES), convert_to_tensor=True
    )
    folder = HFFolder(tmp_path / "hf")
    config = folder.encoder_config()
    ids = embedding.token_ids(folder.path, embedding.SENTENCES, config)
    weights = CheckpointWeights(CheckpointReader(tmp_path / "m" / "iter_0000000"), config)
    with torch.no_grad():
        for layers in (
            embedding.hf_layers(folder, config, ids, causal=False),
            embedding.checkpoint_layers(weights, ids),
        ):
            *states, vectors = layers
            assert [[len(text) for text in texts] for texts in states] == [[len(text) for text in ids]] * 2
            torch.testing.assert_close(torch.stack(vectors), wanted, rtol=0, atol=1e-6)
    assert not torch.distributed.is_initialized()


def test_embeddings_name_the_layer_where_they_part(source: Source, tmp_path: Path) -> None:
    folder = source("model", num_hidden_layers=4)
    import_hf(folder, tmp_path / "m", progress=False)
    export_hf(tmp_path / "m", tmp_path / "hf", progress=False)
    edit_tensors(tmp_path / "hf", lambda tensors: tensors["layers.2.mlp.up_proj.weight"].mul_(2))
    outcome = verify(folder, hf_path=tmp_path / "hf", progress=False)
    assert [difference.name for difference in outcome.differences] == ["layers.2.mlp.up_proj.weight", "embeddings"]
    assert outcome.differences[1].found.endswith("the two sides part at layer 3 of 4")


def test_one_layer_at_a_time_is_held(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever either side reads a weight, what is in memory is at most that layer's own tensors, and the states."""
    folder, layers = source("model", num_hidden_layers=12, dtype="bfloat16"), 12
    import_hf(folder, tmp_path / "m", progress=False)
    files = HFFolder(folder)
    config = files.encoder_config()
    layer = 4 * sum(files.shape(name)[0] * (files.shape(name)[1:] or (1,))[0] for name in files.names()) // layers
    ids = embedding.token_ids(folder, embedding.SENTENCES, config)
    weights = CheckpointWeights(CheckpointReader(tmp_path / "m" / "iter_0000000"), config)
    held: list[int] = []

    def watched(read: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def wrapped(*args: Any) -> torch.Tensor:
            kinds = (torch.Tensor, torch.nn.Parameter)
            tensors = [thing for thing in gc.get_objects() if type(thing) in kinds and thing.device.type == "cpu"]
            held.append(sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()))
            return read(*args)

        return wrapped

    monkeypatch.setattr(HFFolder, "read", watched(HFFolder.read))
    monkeypatch.setattr(CheckpointWeights, "read", watched(CheckpointWeights.read))
    gc.collect()
    gc.disable()  # what waits for the collector is held too
    try:
        embedding.compare_layers(
            embedding.checkpoint_layers(weights, ids),
            embedding.hf_layers(files, config, ids, causal=False),
            tolerance=1e-5,
            on_layer=lambda: None,
        )
    finally:
        gc.enable()
    assert len(held) > 2 * layers
    assert max(held) - held[0] < 1.5 * layer
