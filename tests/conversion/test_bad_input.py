"""Bad input at the command line: the message, the exit status, and nothing left behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.hf_files import Source, edit_json, edit_tensors, without_checksums
from support.places import ROOT
from torch import Tensor

from megatron_embed.conversion.convert_checkpoints import main

Capture = pytest.CaptureFixture[str]
LAYER = "language_model.model.layers.1."


@pytest.fixture
def vlm(source: Source, tmp_path: Path) -> Path:
    shutil.copytree(source("vlm", dtype="bfloat16"), tmp_path / "vlm")
    return tmp_path / "vlm"


@pytest.fixture
def sharded(source: Source, tmp_path: Path) -> Path:
    shutil.copytree(source("vlm", dtype="bfloat16", max_shard_size="40KB"), tmp_path / "sharded")
    return tmp_path / "sharded"


@pytest.fixture
def checkpoint(source: Source, tmp_path: Path) -> Path:
    assert run("import", "--hf-model", source("vlm", dtype="bfloat16"), "--megatron-path", tmp_path / "checkpoint") == 0
    return tmp_path / "checkpoint"


def run(*args: object) -> int:
    return main([*map(str, args), "--no-progress"])


def refused(capsys: Capture, tmp_path: Path, *args: object) -> str:
    """Run; exit 1, one message, no traceback, no new file. Returns the message."""
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert run(*args) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert "Traceback" not in out + err
    assert sorted(tmp_path.rglob("*")) == before
    return err


def import_refused(capsys: Capture, tmp_path: Path, folder: object, *options: object) -> str:
    return refused(capsys, tmp_path, "import", "--hf-model", folder, "--megatron-path", tmp_path / "out", *options)


def export_refused(capsys: Capture, tmp_path: Path, folder: object, *options: object) -> str:
    return refused(capsys, tmp_path, "export", "--megatron-path", folder, "--hf-path", tmp_path / "out", *options)


# ---- weights


def _drop(tensors: dict[str, Tensor]) -> None:
    del tensors[LAYER + "mlp.up_proj.weight"]


def _add(tensors: dict[str, Tensor]) -> None:
    tensors[LAYER + "self_attn.q_proj.bias"] = torch.zeros(64)


def _misshape(tensors: dict[str, Tensor]) -> None:
    tensors[LAYER + "mlp.down_proj.weight"] = torch.zeros(48, 95)


def _integers(tensors: dict[str, Tensor]) -> None:
    tensors["language_model.model.norm.weight"] = torch.ones(48, dtype=torch.int8)


def _no_scale(tensors: dict[str, Tensor]) -> None:
    name = LAYER + "mlp.down_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


def _no_embedding(tensors: dict[str, Tensor]) -> None:
    del tensors["language_model.model.embed_tokens.weight"]


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (_drop, [LAYER + "mlp.up_proj.weight: missing", "[96, 48]"]),
        (_add, [LAYER + "self_attn.q_proj.bias: not a tensor of this model"]),
        (_misshape, [LAYER + "mlp.down_proj.weight", "found shape [48, 95], wanted [48, 96]"]),
        (_integers, ["norm.weight", "int8"]),
        (_no_scale, ["mlp.down_proj.weight_scale_inv: missing"]),
        (_no_embedding, ["embed_tokens.weight", "prefixes"]),
    ],
)
def test_tensors_that_do_not_fit(
    damage: Callable[[dict[str, Tensor]], None], parts: list[str], vlm: Path, tmp_path: Path, capsys: Capture
) -> None:
    edit_tensors(vlm, damage)
    message = import_refused(capsys, tmp_path, vlm)
    assert str(vlm) in message
    for part in parts:
        assert part in message


def test_truncated_file(vlm: Path, tmp_path: Path, capsys: Capture) -> None:
    path = vlm / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path}: not a sound safetensors file" in import_refused(capsys, tmp_path, vlm)


def test_empty_file_and_lfs_pointer(vlm: Path, tmp_path: Path, capsys: Capture) -> None:
    (vlm / "model.safetensors").write_bytes(b"")
    assert "not a sound safetensors file" in import_refused(capsys, tmp_path, vlm)
    (vlm / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in import_refused(capsys, tmp_path, vlm)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_hub_cache_whose_blob_is_gone(file: str, vlm: Path, tmp_path: Path, capsys: Capture) -> None:
    (vlm / file).unlink()
    (vlm / file).symlink_to("../../blobs/0123")
    message = f"{vlm / file}: a link to ../../blobs/0123, which is not there; fetch it again"
    assert message in import_refused(capsys, tmp_path, vlm)


def test_index_naming_an_absent_file(sharded: Path, tmp_path: Path, capsys: Capture) -> None:
    victim = sorted(sharded.glob("model-*"))[1]
    victim.unlink()
    message = import_refused(capsys, tmp_path, sharded)
    assert f"names {victim.name}, which does not exist" in message


def test_index_and_files_disagree(sharded: Path, tmp_path: Path, capsys: Capture) -> None:
    def forget(index: dict[str, dict[str, str]]) -> None:
        del index["weight_map"]["vision_tower.ln_pre.weight"]

    edit_json(sharded / "model.safetensors.index.json", forget)
    assert "unlisted: vision_tower.ln_pre.weight" in import_refused(capsys, tmp_path, sharded)


def test_a_single_file_beside_an_index_of_other_files(
    vlm: Path, sharded: Path, tmp_path: Path, capsys: Capture
) -> None:
    """transformers would read the single file, vLLM those of the index."""
    shutil.copy(vlm / "model.safetensors", sharded)
    message = import_refused(capsys, tmp_path, sharded)
    assert "holds model.safetensors and also model.safetensors.index.json, which names model-00001" in message
    verified = refused(capsys, tmp_path, "verify", "--hf-model", vlm, "--hf-path", sharded)
    assert verified == message


def test_a_config_that_names_other_weights(vlm: Path, tmp_path: Path, capsys: Capture) -> None:
    edit_json(vlm / "config.json", lambda raw: raw.update(transformers_weights="other.safetensors"))
    assert "config.json: transformers_weights is 'other.safetensors'" in import_refused(capsys, tmp_path, vlm)


def test_a_peft_adapter_beside_the_weights(vlm: Path, source: Source, tmp_path: Path, capsys: Capture) -> None:
    """transformers and sentence-transformers would load it on top of them."""
    (vlm / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    message = import_refused(capsys, tmp_path, vlm)
    assert f"{vlm / 'adapter_config.json'}: a PEFT adapter" in message
    assert "merge it into the model first" in message
    sound = source("vlm", dtype="bfloat16")
    assert refused(capsys, tmp_path, "verify", "--hf-model", sound, "--hf-path", vlm) == message


def test_an_index_of_the_single_file(vlm: Path, tmp_path: Path) -> None:
    names = load_file(vlm / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (vlm / "model.safetensors.index.json").write_text(json.dumps(index))
    assert run("import", "--hf-model", vlm, "--megatron-path", tmp_path / "out") == 0


# ---- configs


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"model_type": "llava"}, "model_type 'llava' is not supported"),
        ({"text_config": {"model_type": "mistral"}}, "mistral3/mistral"),
        ({"rope_type": "spiral"}, "rope_type 'spiral' is not supported; known: "),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ],
)
def test_configs_of_something_else(
    change: dict[str, object], part: str, vlm: Path, tmp_path: Path, capsys: Capture
) -> None:
    def edit(raw: dict[str, dict[str, object]]) -> None:
        if "rope_type" in change:
            raw["text_config"]["rope_parameters"] = {"rope_type": change["rope_type"], "rope_theta": 1.0}
        elif "hidden_act" in change:
            raw["text_config"].update(change)
        else:
            raw.update(change)  # type: ignore[arg-type]

    edit_json(vlm / "config.json", edit)
    message = import_refused(capsys, tmp_path, vlm)
    assert part in message
    assert str(vlm / "config.json") in message


@pytest.mark.parametrize(
    ("where", "settings", "found"),
    [
        ("", {"quant_method": "gptq", "bits": 4}, 'quantization_config.quant_method is "gptq"'),
        ("text_config", {"load_in_8bit": True}, "text_config.quantization_config.quant_method is null"),
        ("", {"quant_method": "fp8"}, 'quantization_config.quant_method is "fp8", but no tensor is FP8'),
    ],
    ids=["gptq", "nested", "fp8 of plain tensors"],
)
def test_a_quantisation_that_is_not_read(
    where: str, settings: dict[str, object], found: str, vlm: Path, source: Source, tmp_path: Path, capsys: Capture
) -> None:
    """transformers would quantise the plain weights at loading."""
    edit_json(vlm / "config.json", lambda raw: (raw[where] if where else raw).update(quantization_config=settings))
    message = import_refused(capsys, tmp_path, vlm)
    assert f"{vlm / 'config.json'}: {found}; wanted no " in message
    sound = source("vlm", dtype="bfloat16")
    assert refused(capsys, tmp_path, "verify", "--hf-model", sound, "--hf-path", vlm) == message


def test_no_config_or_no_json(vlm: Path, tmp_path: Path, capsys: Capture) -> None:
    (vlm / "config.json").write_text("{")
    assert "config.json: not valid JSON" in import_refused(capsys, tmp_path, vlm)
    (vlm / "config.json").unlink()
    assert "config.json: no such file" in import_refused(capsys, tmp_path, vlm)


def test_no_such_source(tmp_path: Path, capsys: Capture) -> None:
    assert "no such folder" in import_refused(capsys, tmp_path, tmp_path / "nowhere")
    (tmp_path / "file").touch()
    assert "is a file" in import_refused(capsys, tmp_path, tmp_path / "file")


def test_a_hub_id_offline(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = import_refused(capsys, tmp_path, "no-such-org/no-such-model")
    assert "no-such-org/no-such-model: no such folder, and not to be had from the hub" in message
    assert "HF_HUB_OFFLINE='1'" in message


def test_a_source_without_a_tokenizer_is_imported_and_the_lack_of_it_told(
    vlm: Path, tmp_path: Path, capsys: Capture
) -> None:
    (vlm / "tokenizer.json").unlink()
    assert run("import", "--hf-model", vlm, "--megatron-path", tmp_path / "out") == 0
    assert f"no tokenizer.json in {vlm}: " in capsys.readouterr().out
    assert "--hf-model a folder with a tokenizer.json" in refused(
        capsys, tmp_path, "export", "--megatron-path", tmp_path / "out", "--hf-path", tmp_path / "hf"
    )


# ---- layouts and outputs


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--tp", 3], "tensor_model_parallel_size: 3 does not divide num_attention_heads 8"),
        (["--tp", 8], "does not divide num_key_value_heads 4"),
        (["--pp", 3], "pipeline_model_parallel_size: 3 is more than the model's 2 layers"),
    ],
)
def test_layouts_that_do_not_fit(options: list[object], part: str, vlm: Path, tmp_path: Path, capsys: Capture) -> None:
    assert part in import_refused(capsys, tmp_path, vlm, *options)


def test_an_output_that_exists(vlm: Path, checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years")
    assert f"{tmp_path / 'out'}: exists already" in import_refused(capsys, tmp_path, vlm)
    assert "is no model or checkpoint folder" in export_refused(capsys, tmp_path, checkpoint, "--overwrite")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years"


def test_an_output_around_its_source(vlm: Path, checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    for target in (vlm, tmp_path):
        args = ("import", "--hf-model", vlm, "--megatron-path", target, "--overwrite")
        assert "holds the source" in refused(capsys, tmp_path, *args)
    args = ("export", "--megatron-path", checkpoint, "--hf-path", checkpoint, "--overwrite")
    assert "holds the source" in refused(capsys, tmp_path, *args)


def test_overwrite_replaces_a_model(source: Source, checkpoint: Path, tmp_path: Path) -> None:
    args = ("export", "--megatron-path", checkpoint, "--hf-path", tmp_path / "out")
    assert run(*args) == 0
    (tmp_path / "out" / "vocab.txt").touch()
    assert run(*args, "--overwrite") == 0
    assert not (tmp_path / "out" / "vocab.txt").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "out"}


# ---- checkpoints


def test_a_folder_without_tracker(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    tracker = checkpoint / "latest_checkpointed_iteration.txt"
    tracker.write_text("7\n")
    message = export_refused(capsys, tmp_path, checkpoint)
    assert "names iteration 7, but" in message
    assert "iter_0000007" in message
    tracker.write_text("soon")
    assert "holds 'soon', wanted an iteration number" in export_refused(capsys, tmp_path, checkpoint)
    tracker.unlink()
    shutil.copytree(checkpoint / "iter_0000000", checkpoint / "iter_0000005")
    message = export_refused(capsys, tmp_path, checkpoint)
    assert "no latest_checkpointed_iteration.txt in it (found iter_0000000, iter_0000005)" in message
    shutil.rmtree(checkpoint / "iter_0000005")  # one alone is the newest
    assert run("export", "--megatron-path", checkpoint, "--hf-path", tmp_path / "newest") == 0
    assert "no such folder" in export_refused(capsys, tmp_path, tmp_path / "nowhere")
    assert run("export", "--megatron-path", checkpoint / "iter_0000000", "--hf-path", tmp_path / "out") == 0


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata"])
def test_truncated_checkpoint(file: str, checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    path = checkpoint / "iter_0000000" / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert str(path) in export_refused(capsys, tmp_path, checkpoint)


def test_missing_checkpoint_file(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    (checkpoint / "iter_0000000" / "__0_0.distcp").unlink()
    assert "__0_0.distcp: no such file" in export_refused(capsys, tmp_path, checkpoint)


def test_a_checkpoint_of_another_shape(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    path = without_checksums(checkpoint / "iter_0000000") / "run_config.yaml"
    good = path.read_text()
    path.write_text(good.replace("intermediate_size: 96", "intermediate_size: 64"))
    assert "found shape [192, 48], wanted [128, 48]" in export_refused(capsys, tmp_path, checkpoint)
    path.write_text(good.replace("num_hidden_layers: 2", "num_hidden_layers: 3"))
    assert "found 2 layers, wanted 3" in export_refused(capsys, tmp_path, checkpoint)
    path.write_text(good.replace("pooling: avg", "pooling: sum"))
    assert "pooling: 'sum' is not one of" in export_refused(capsys, tmp_path, checkpoint)


# ---- the command line itself


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["convert"],
        ["import", "--hf-model", "x"],
        ["import", "--hf-model", "x", "--megatron-path", "y", "--tp", "0"],
        ["import", "--hf-model", "x", "--megatron-path", "y", "--torch-dtype", "int8"],
        ["export", "--megatron-path", "x", "--hf-path", "y", "--target", "onnx"],
        ["export", "--megatron-path", "x", "--hf-path", "y", "--max-shard-size", "big"],
        ["verify", "--hf-model", "x"],
        ["verify", "--hf-model", "x", "--hf-path", "y", "--megatron-path", "z"],
    ],
)
def test_bad_arguments_exit_2(args: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_verify_exits_1_on_a_difference(source: Source, checkpoint: Path, capsys: Capture) -> None:
    same, other = source("vlm", dtype="bfloat16"), source("vlm", dtype="bfloat16", seed=5)
    capsys.readouterr()
    assert run("verify", "--hf-model", same, "--megatron-path", checkpoint) == 0
    out, err = capsys.readouterr()
    assert "tensors" in out
    assert err == ""
    assert run("verify", "--hf-model", other, "--megatron-path", checkpoint) == 1
    out, err = capsys.readouterr()
    assert "language_model.model." in out
    assert err.startswith("error: tensors (20 of 20), embeddings (3 of 3) differ; first language_model.model.")
    assert err.count("\n") == 1


@pytest.mark.slow
def test_as_a_script_it_is_quiet(source: Source, tmp_path: Path) -> None:
    """``python conversion/convert_checkpoints.py``: the commands in fresh processes, nothing on stderr."""
    script = ROOT / "conversion" / "convert_checkpoints.py"
    folder, megatron, out = source("vlm", dtype="bfloat16"), tmp_path / "m", tmp_path / "hf"
    for args in (
        ["import", "--hf-model", folder, "--megatron-path", megatron],
        ["export", "--megatron-path", megatron, "--hf-path", out],
        ["verify", "--hf-model", folder, "--hf-path", out],
        ["verify", "--hf-model", folder, "--megatron-path", megatron],
    ):
        done = subprocess.run(
            [sys.executable, script, *map(str, args), "--no-progress"], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), args
        assert done.stdout
    assert json.loads((out / "config.json").read_text())["is_causal"] is False


def test_debug_shows_the_traceback(tmp_path: Path, capsys: Capture) -> None:
    assert run("verify", "--hf-model", tmp_path / "nowhere", "--hf-path", tmp_path, "--debug") == 1
    assert "Traceback" in capsys.readouterr().err
