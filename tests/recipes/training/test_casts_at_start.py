"""A model that starts in another dtype than its source's: ``model.precision`` asks for rounding, never for overflow."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from support.hf_files import edit_json, edit_tensors, encoder_tensors_of, tensors_of
from support.runs import make_inputs, recipe
from support.tiny_models import save_model
from support.worlds import run_world

from megatron_embed.bridge.cpu import host
from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.importing import import_hf

pytestmark = pytest.mark.slow

LAST = "language_model.model.layers.2.mlp.down_proj.weight"
BF16, FP16 = "model.precision=bf16", "model.precision=fp16"
TP2, PP2 = "model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2"


def count(folder: Path) -> str:
    """What a start in bfloat16 rounds."""
    counts = [int((tensor.bfloat16().float() != tensor).sum()) for tensor in encoder_tensors_of(folder).values()]
    return f"{sum(counts):,} values in {sum(found > 0 for found in counts)} tensors rounded, the largest change 0.39%"


def overflow(folder: Path) -> None:
    """A value that only the last rank's slice holds."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[LAST][-1, -1] = 1e5

    edit_tensors(folder / "model", change)


def one_step(folder: Path, name: str, *overrides: str) -> Path:
    from megatron_embed.recipes.training.loop import train

    return train(recipe(folder, name, "train.train_iters=1", *overrides))


def test_training_tells_what_its_precision_rounded_and_refuses_overflow(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    host.run_on_cpu()
    caplog.set_level("INFO", "megatron_embed")
    make_inputs(tmp_path)
    one_step(tmp_path, "fp32")
    assert "rounded" not in caplog.text
    one_step(tmp_path, "bf16", BF16)
    assert f"{tmp_path / 'model'}: {count(tmp_path / 'model')}" in caplog.text
    overflow(tmp_path)
    wanted = rf"{LAST}: the value 100000 is beyond float16, whose largest is 65504; model\.precision=fp32 keeps every"
    with pytest.raises(UserError, match=wanted):
        one_step(tmp_path, "fp16", FP16)
    import_hf(tmp_path / "model", tmp_path / "megatron", progress=False)
    wanted = wanted.replace("language_model.model.", "")
    with pytest.raises(UserError, match=wanted):
        one_step(tmp_path, "fp16", FP16, f"checkpoint.pretrained_checkpoint={tmp_path / 'megatron'}")
    assert not (tmp_path / "fp16").exists()


def test_a_runs_checkpoint_remembers_an_absolute_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export starts elsewhere, and must not take a relative path for a hub id."""
    from megatron_embed.conversion.exporting import export_hf

    host.run_on_cpu()
    make_inputs(tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    run = one_step(tmp_path / "models", "run", "model.hf_model=models/model")
    monkeypatch.chdir("/")
    with pytest.raises(UserError, match="holds the source"):
        export_hf(run, tmp_path / "models" / "model", overwrite=True, progress=False)
    export_hf(run, tmp_path / "vlm", target="vlm", progress=False)
    export_hf(run, tmp_path / "embedder", progress=False)
    assert tensors_of(tmp_path / "vlm").keys() == tensors_of(tmp_path / "models" / "model").keys()
    assert str(tmp_path) not in (tmp_path / "embedder" / "README.md").read_text()


def test_an_encoder_does_not_round_a_model_unasked(tmp_path: Path) -> None:
    from megatron_embed.recipes import Encoder

    save_model(tmp_path / "model")
    with Encoder.from_pretrained(tmp_path / "model", device="cpu") as encoder:
        wanted = encoder.encode("a text")
    edit_json(tmp_path / "model" / "config.json", lambda raw: raw.update(dtype="bfloat16"))
    with pytest.raises(UserError, match=r'"dtype": "float32" in its config\.json, keeps every value'):
        Encoder.from_pretrained(tmp_path / "model", device="cpu")
    for dtype, near in ((torch.float32, 1e-6), (torch.bfloat16, 0.05)):
        with Encoder.from_pretrained(tmp_path / "model", device="cpu", dtype=dtype) as encoder:
            assert abs(encoder.encode("a text") - wanted).max() < near


def start_all(folder: str) -> list[str]:
    """What each layout says; the message of an overflow that one rank alone can see."""
    import sys
    from contextlib import redirect_stderr
    from io import StringIO

    said = []
    for name, overrides in {"tp2": [TP2], "pp2": [PP2], "dp2": [], "tp2_cast": [TP2, FP16]}.items():
        if name == "tp2_cast":
            torch.distributed.barrier()
            if torch.distributed.get_rank() == 0:
                overflow(Path(folder))
            torch.distributed.barrier()
        with redirect_stderr(StringIO()) as stream:
            try:
                one_step(Path(folder), name, BF16, *overrides)
            except UserError as error:
                print(error, file=sys.stderr)
        said.append(stream.getvalue())
    return said


def test_ranks_add_up_what_they_rounded_and_refuse_together(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    wanted = count(tmp_path / "model")
    first, second = run_world(start_all, 2, str(tmp_path))
    for told in first[:3]:
        assert wanted in told
        assert len(re.findall("tensors rounded", told)) == 1
    assert not any("tensors rounded" in told for told in second)
    for told in (first[3], second[3]):
        assert f"{LAST}: the value 100000 is beyond float16" in told
    assert not (tmp_path / "tp2_cast").exists()
    assert json.loads((tmp_path / "dp2" / "metrics.jsonl").read_text())["step"] == 1
