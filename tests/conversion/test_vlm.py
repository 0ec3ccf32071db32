"""The whole VLM again, from its source or from the checkpoint alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.fp8 import fp8_source
from support.hf_files import Source, assert_same_bits, edit_json, edit_tensors, encoder_tensors_of, tensors_of
from transformers import Mistral3ForConditionalGeneration

from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.exporting import export_hf
from megatron_embed.conversion.hf.folder import HFFolder
from megatron_embed.conversion.importing import import_hf
from megatron_embed.conversion.verify import verify


@pytest.fixture
def vlm(source: Source, tmp_path: Path) -> Path:
    """An untied VLM with files of all sorts beside the weights."""
    folder = tmp_path / "source"
    shutil.copytree(source("vlm", tie_word_embeddings=False, dtype="bfloat16"), folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}\r\n")
    (folder / "processor_config.json").write_text('{"image_token":"[IMG]"  }')
    (folder / "assets").mkdir()
    (folder / "assets" / "picture.bin.png").write_bytes(bytes(range(256)))
    (folder / "consolidated.safetensors").write_bytes(b"x")
    return folder


def assert_same_files(out: Path, source: Path) -> None:
    """Every file but weights and config.json, byte for byte."""
    files = [p.relative_to(source) for p in source.rglob("*") if p.is_file() and ".safetensors" not in p.name]
    assert len(files) > 3
    for file in files:
        if str(file) != "config.json":
            assert (out / file).read_bytes() == (source / file).read_bytes(), file


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_untouched_it_comes_back_bit_by_bit(tied: bool, tp: int, pp: int, source: Source, tmp_path: Path) -> None:
    folder = source("vlm", tie_word_embeddings=tied, dtype="bfloat16", max_shard_size="60KB")
    import_hf(folder, tmp_path / "m", tp=tp, pp=pp, progress=False)
    export_hf(tmp_path / "m", tmp_path / "hf", target="vlm", progress=False)
    assert_same_bits(tensors_of(tmp_path / "hf"), tensors_of(folder))
    assert any("lm_head" in name for name in tensors_of(tmp_path / "hf")) is not tied
    raw, before = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "hf", folder))
    assert raw["text_config"].pop("is_causal") is False
    assert raw == before
    assert_same_files(tmp_path / "hf", folder)
    tensors = verify(folder, hf_path=tmp_path / "hf", progress=False).section("tensors")
    assert tensors is not None
    assert tensors.compared == len(tensors_of(folder))


def test_it_states_the_widest_dtype_of_its_tensors(vlm: Path, tmp_path: Path) -> None:
    """transformers casts to the stated dtype at loading; the source's would round the tower."""
    import_hf(vlm, tmp_path / "m", torch_dtype="float32", progress=False)
    export_hf(tmp_path / "m", tmp_path / "hf", target="vlm", progress=False)
    dtypes = {name: tensor.dtype for name, tensor in tensors_of(tmp_path / "hf").items()}
    assert dtypes["language_model.model.norm.weight"] == torch.float32
    assert {dtype for name, dtype in dtypes.items() if "vision_tower" in name} == {torch.bfloat16}
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert {values.get("dtype", "float32") for values in (raw, raw["text_config"])} == {"float32"}
    loaded = Mistral3ForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype="auto")
    assert loaded.model.language_model.norm.weight.dtype == torch.float32


def test_from_the_checkpoint_alone(vlm: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    shutil.copytree(vlm, kept)
    import_hf(vlm, tmp_path / "m", tp=2, with_vision=True, progress=False)
    shutil.rmtree(vlm)
    export_hf(tmp_path / "m", tmp_path / "hf", target="vlm", progress=False)
    (kept / "consolidated.safetensors").unlink()
    assert_same_bits(tensors_of(tmp_path / "hf"), tensors_of(kept))
    assert_same_files(tmp_path / "hf", kept)
    export_hf(tmp_path / "m", tmp_path / "e", progress=False)
    assert_same_bits(tensors_of(tmp_path / "e"), encoder_tensors_of(kept))


def test_without_its_source_it_says_so(vlm: Path, tmp_path: Path) -> None:
    import_hf(vlm, tmp_path / "m", progress=False)
    shutil.rmtree(vlm)
    with pytest.raises(UserError, match=r"vision tower.*--hf-model"):
        export_hf(tmp_path / "m", tmp_path / "hf", target="vlm", progress=False)
    assert not (tmp_path / "hf").exists()


def test_changed_weights_reach_tower_and_tied_head(source: Source, tmp_path: Path) -> None:
    """The checkpoint of one seed put into the VLM of another; a head that is tied, but stored, follows."""
    new, old = source("vlm", seed=1), tmp_path / "old"
    shutil.copytree(source("vlm", seed=2), old)
    head, embedding = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    edit_tensors(old, lambda tensors: tensors.update({head: tensors[embedding].clone()}))
    import_hf(new, tmp_path / "m", progress=False)
    export_hf(tmp_path / "m", tmp_path / "hf", hf_model=old, target="vlm", progress=False)
    found = tensors_of(tmp_path / "hf")
    assert_same_bits(encoder_tensors_of(tmp_path / "hf"), encoder_tensors_of(new))
    assert torch.equal(found[head], tensors_of(new)[embedding])
    vision = {name: tensor for name, tensor in tensors_of(old).items() if name.startswith(("vision", "multi"))}
    assert_same_bits({name: found[name] for name in vision}, vision)
    assert not verify(old, hf_path=tmp_path / "hf", progress=False)
    model = Mistral3ForConditionalGeneration.from_pretrained(tmp_path / "hf")
    assert torch.equal(model.lm_head.weight, model.model.language_model.embed_tokens.weight)
    assert model.config.text_config.is_causal is False


def test_from_fp8_without_scales(tmp_path: Path) -> None:
    folder, wanted = fp8_source(tmp_path / "fp8")
    for with_vision in (False, True):
        megatron, out = tmp_path / f"m{with_vision}", tmp_path / f"hf{with_vision}"
        import_hf(folder, megatron, with_vision=with_vision, progress=False)
        export_hf(megatron, out, target="vlm", progress=False)
        raw = json.loads((out / "config.json").read_text())
        assert "quantization_config" not in raw
        assert not [name for name in tensors_of(out) if "scale" in name]
        assert_same_bits(encoder_tensors_of(out), wanted)
        assert HFFolder(out).dtype == "bfloat16"
        assert not any("scale" in name for name in HFFolder(out).names())


def test_dtype_of_the_whole(vlm: Path, tmp_path: Path) -> None:
    import_hf(vlm, tmp_path / "m", progress=False)
    export_hf(tmp_path / "m", tmp_path / "hf", target="vlm", torch_dtype="float32", progress=False)
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "hf").values()} == {torch.float32}
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "float32"


def test_verify_misses_a_lost_tensor(vlm: Path, source: Source, tmp_path: Path) -> None:
    lost = tmp_path / "lost"
    shutil.copytree(source("vlm", tie_word_embeddings=False, dtype="bfloat16"), lost)
    edit_tensors(lost, lambda tensors: tensors.pop("vision_tower.ln_pre.weight"))
    edit_json(lost / "config.json", lambda raw: raw["text_config"].update(is_causal=False))
    (lost / "processor_config.json").write_bytes((vlm / "processor_config.json").read_bytes())
    outcome = verify(vlm, hf_path=lost, progress=False)
    assert [(d.name, d.found) for d in outcome.differences] == [("vision_tower.ln_pre.weight", f"missing in {lost}")]


def test_a_text_model_has_no_vision_tower(source: Source, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Ministral3ForCausalLM, which has no vision tower"):
        import_hf(source("causal_lm"), tmp_path / "m", with_vision=True, progress=False)
    import_hf(source("causal_lm"), tmp_path / "m", progress=False)
    with pytest.raises(UserError, match=r"no vision tower.*--target embedder"):
        export_hf(tmp_path / "m", tmp_path / "hf", target="vlm", progress=False)


def test_another_model_as_source_is_refused(source: Source, tmp_path: Path) -> None:
    import_hf(source("vlm"), tmp_path / "m", progress=False)
    other = tmp_path / "other"
    shutil.copytree(source("vlm", intermediate_size=64), other)
    with pytest.raises(UserError, match="intermediate_size is 64, but the checkpoint's model has 96"):
        export_hf(tmp_path / "m", tmp_path / "hf", hf_model=other, target="vlm", progress=False)
    shutil.copytree(source("vlm"), tmp_path / "theta")
    rope = {"rope_theta": 5.0}
    edit_json(tmp_path / "theta" / "config.json", lambda raw: raw["text_config"]["rope_parameters"].update(rope))
    with pytest.raises(UserError, match="rope_parameters"):
        export_hf(tmp_path / "m", tmp_path / "hf", hf_model=tmp_path / "theta", progress=False)
