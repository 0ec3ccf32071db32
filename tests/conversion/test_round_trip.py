"""Import, then export: the same tensors, bit by bit, for every source and layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.fp8 import fp8_source
from support.hf_files import (
    Source,
    assert_same_bits,
    edit_json,
    edit_tensors,
    encoder_tensors_of,
    tensors_of,
    without_checksums,
)

from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.exporting import export_hf
from megatron_embed.conversion.importing import import_hf
from megatron_embed.conversion.verify import verify

LAYOUTS = [(tp, pp) for tp in (1, 2, 4) for pp in (1, 2)]


def there_and_back(source: Path, tmp_path: Path, *, tp: int = 1, pp: int = 1, **export: str) -> Path:
    import_hf(source, tmp_path / "megatron", tp=tp, pp=pp, progress=False)
    export_hf(tmp_path / "megatron", tmp_path / "hf", progress=False, **export)  # type: ignore[arg-type]
    return tmp_path / "hf"


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["vlm", "causal_lm", "model"])
def test_every_source_and_layout(kind: str, tied: bool, tp: int, pp: int, source: Source, tmp_path: Path) -> None:
    folder = source(kind, tie_word_embeddings=tied, dtype="bfloat16")
    out = there_and_back(folder, tmp_path, tp=tp, pp=pp)
    assert_same_bits(tensors_of(out), encoder_tensors_of(folder))
    files = list((tmp_path / "megatron" / "iter_0000000").glob("*.distcp"))
    assert len(files) == tp * pp
    chunks = 20 * tp
    stored = sum(tensor.nbytes for tensor in tensors_of(out).values())
    assert sum(file.stat().st_size for file in files) < stored + 3000 * chunks  # no chunk brings along its whole tensor


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shards", ["5GB", "40KB"], ids=["single", "sharded"])
def test_every_dtype_single_or_sharded(dtype: str, shards: str, source: Source, tmp_path: Path) -> None:
    folder = source("vlm", dtype=dtype, max_shard_size=shards)
    assert (folder / "model.safetensors.index.json").exists() == (shards != "5GB")
    out = there_and_back(folder, tmp_path, tp=2, max_shard_size=shards)
    found = tensors_of(out)
    assert_same_bits(found, encoder_tensors_of(folder))
    assert {tensor.dtype for tensor in found.values()} == {getattr(torch, dtype)}
    if shards != "5GB":
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
        assert {out / file for file in index["weight_map"].values()} == set(out.glob("model-*.safetensors"))
        assert sorted(index["weight_map"]) == sorted(found)
        largest = max(t.nbytes for t in found.values())
        assert all(file.stat().st_size <= max(40_000, largest) + 8_000 for file in out.glob("model-*.safetensors"))


def test_dtype_conversion_rounds_once(source: Source, tmp_path: Path) -> None:
    folder = source("model", dtype="float32")
    import_hf(folder, tmp_path / "m", torch_dtype="bfloat16", progress=False)
    export_hf(tmp_path / "m", tmp_path / "hf", progress=False)
    assert_same_bits(tensors_of(tmp_path / "hf"), {n: t.bfloat16() for n, t in encoder_tensors_of(folder).items()})
    export_hf(tmp_path / "m", tmp_path / "hf16", torch_dtype="float16", progress=False)
    assert json.loads((tmp_path / "hf16" / "config.json").read_text())["dtype"] == "float16"
    assert {t.dtype for t in tensors_of(tmp_path / "hf16").values()} == {torch.float16}


def test_export_needs_nothing_that_moved(source: Source, tmp_path: Path) -> None:
    moved = tmp_path / "source"
    shutil.copytree(source("vlm"), moved)
    import_hf(moved, tmp_path / "m", progress=False)
    shutil.rmtree(moved)
    export_hf(tmp_path / "m", tmp_path / "hf", progress=False)
    assert_same_bits(tensors_of(tmp_path / "hf"), encoder_tensors_of(source("vlm")))


def test_an_export_can_be_imported_again(source: Source, tmp_path: Path) -> None:
    """A ready embedder says itself how it pools and which prompts it wants."""
    import_hf(source("model", dtype="bfloat16"), tmp_path / "m", progress=False)
    run = without_checksums(tmp_path / "m" / "iter_0000000") / "run_config.yaml"
    text = run.read_text().replace("'query: '", "' q:  '").replace("pooling: avg", "pooling: weighted_avg")
    run.write_text(text.replace("normalize: true", "normalize: false").replace("512", "100"))
    export_hf(tmp_path / "m", tmp_path / "hf", progress=False)
    import_hf(tmp_path / "hf", tmp_path / "m2", progress=False)
    export_hf(tmp_path / "m2", tmp_path / "hf2", progress=False)
    files = [p.relative_to(tmp_path / "hf") for p in (tmp_path / "hf").rglob("*") if p.is_file()]
    for file in files:
        if str(file) != "README.md":
            assert (tmp_path / "hf" / file).read_bytes() == (tmp_path / "hf2" / file).read_bytes(), file
    assert len(files) == 9  # no 2_Normalize, one weights file, six of configuration, README
    settings = json.loads((tmp_path / "hf2" / "config_sentence_transformers.json").read_text())
    assert settings["prompts"] == {"query": " q:  ", "document": "passage: "}


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_fp8_source(tp: int, pp: int, tmp_path: Path) -> None:
    folder, wanted = fp8_source(tmp_path / "fp8")
    out = there_and_back(folder, tmp_path, tp=tp, pp=pp)
    assert_same_bits(tensors_of(out), wanted)
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config


def test_fp8_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    from transformers import Mistral3ForConditionalGeneration

    folder, wanted = fp8_source(tmp_path / "fp8")
    left = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    edit_json(
        folder / "config.json",
        lambda raw: raw["quantization_config"].update(dequantize=True, modules_to_not_convert=left),
    )
    model = Mistral3ForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    state = model.model.language_model.state_dict()
    assert_same_bits({name: state[name] for name in wanted}, wanted)


def test_consolidated_weights_are_ignored_and_said_so(source: Source, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    shutil.copytree(source("vlm", dtype="bfloat16"), folder)
    (folder / "consolidated.safetensors").write_bytes(b"other names")
    done = import_hf(folder, tmp_path / "m", progress=False)
    assert any("consolidated" in note for note in done.notes)
    export_hf(tmp_path / "m", tmp_path / "hf", progress=False)
    assert_same_bits(tensors_of(tmp_path / "hf"), encoder_tensors_of(folder))


def test_verify_finds_one_changed_value(source: Source, tmp_path: Path) -> None:
    folder = source("vlm", dtype="bfloat16")
    out = there_and_back(folder, tmp_path)
    same = verify(folder, megatron_path=tmp_path / "megatron", progress=False)
    assert same
    tensors = same.section("tensors")
    assert tensors is not None
    assert tensors.compared == tensors.equal == 20
    both = verify(folder, hf_path=out, progress=False)
    assert both
    assert both.embeddings is not None

    def nudge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.1.mlp.up_proj.weight"][3, 2] += 0.5

    edit_tensors(out, nudge)
    other = verify(folder, hf_path=out, progress=False)
    assert not other
    assert [d.name for d in other.differences] == ["layers.1.mlp.up_proj.weight", "embeddings"]
    assert other.differences[0].largest == pytest.approx(0.5, abs=0.01)
    tensors = other.section("tensors")
    assert tensors is not None
    assert tensors.equal == tensors.compared - 1


def test_a_tokenizer_is_part_of_an_embedder(source: Source, tmp_path: Path) -> None:
    import_hf(source("model", tokenizer=False), tmp_path / "m", progress=False)
    with pytest.raises(UserError, match=r"holds no tokenizer.*--hf-model"):
        export_hf(tmp_path / "m", tmp_path / "hf", progress=False)
    assert not (tmp_path / "hf").exists()
    export_hf(tmp_path / "m", tmp_path / "hf", hf_model=source("model"), progress=False)
    assert (tmp_path / "hf" / "tokenizer.json").exists()
