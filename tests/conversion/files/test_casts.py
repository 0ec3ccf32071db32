"""No value changes unsaid: what overflows is refused, what is rounded is refused or counted."""

from __future__ import annotations

import json
import math
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
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
from torch import Tensor

from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.convert_checkpoints import main
from megatron_embed.conversion.exporting import export_hf
from megatron_embed.conversion.files.casts import Casts
from megatron_embed.conversion.importing import import_hf

Capture = pytest.CaptureFixture[str]
UP, NORM, EMBED = "model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"
TOWER = "language_model."
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def run(*args: object) -> int:
    return main([*map(str, args), "--no-progress"])


def copy(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    return folder


# ---- the function itself


def patterns(dtype: torch.dtype) -> Tensor:
    """Every value of a 16-bit dtype; of wider ones values at every exponent, at and next to ties, and random ones."""
    if dtype.itemsize == 2:
        return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    generator = torch.Generator().manual_seed(3)
    exponents = torch.arange(-160, 160, dtype=torch.float64).exp2()
    mantissas = torch.tensor([1.0, 1 + 2**-8, 1 + 2**-9, 1 + 2**-11, 1 + 2**-12 + 2**-20, 2 - 2**-23, 2 - 2**-8])
    values = torch.cat([(exponents[:, None] * mantissas).reshape(-1), torch.tensor([0.0, math.inf, math.nan])])
    noise = torch.randn(1 << 16, generator=generator, dtype=torch.float64) * 0.02
    return torch.cat([values, -values, noise, noise.bfloat16().double()]).to(dtype)


@pytest.mark.parametrize("old", DTYPES, ids=str)
@pytest.mark.parametrize("new", DTYPES, ids=str)
def test_every_change_is_counted_and_every_overflow_refused(old: torch.dtype, new: torch.dtype) -> None:
    """Against exact fractions, value by value."""
    values = patterns(old)
    wanted = values.to(new)
    overflows = wanted.isinf() & values.isfinite()
    changes = [
        abs(Fraction(b) - Fraction(a)) / abs(Fraction(a))
        for a, b in zip(values[~overflows].tolist(), wanted[~overflows].tolist(), strict=True)
        if math.isfinite(a) and a != b
    ]
    casts = Casts("here", rounding=True)
    found = casts("name", values[~overflows], new)
    assert_same_bits({"name": found}, {"name": wanted[~overflows]})
    if not changes:
        assert casts.rounded == {}
        Casts("here")("name", values[~overflows], new)
    else:
        count, largest = casts.rounded["name"]
        assert count == len(changes)
        assert largest == pytest.approx(float(max(changes)), rel=1e-6)
        with pytest.raises(UserError, match=r"here: name: the value .* would be rounded to"):
            Casts("here")("name", values[~overflows], new)
    for value in values[overflows][:: max(1, int(overflows.sum()) // 50)]:
        for rounding in (True, False):
            with pytest.raises(UserError, match=r"here: name: the value .* is beyond"):
                Casts("here", rounding=rounding)("name", value.reshape(1, 1), new)


def test_a_single_value_among_many_is_named() -> None:
    values = torch.ones(300, 1000)
    values[250, 3] = 0.1
    values[299, 999] = -1e5
    with pytest.raises(UserError) as error:
        Casts("here")("deep", values, torch.bfloat16)
    assert str(error.value) == (
        "here: deep: the value 0.100000001, stored in float32, would be rounded to 0.100097656 in bfloat16; "
        "--torch-dtype float32 keeps every value, --torch-dtype bfloat16 asks for rounding"
    )
    with pytest.raises(UserError) as error:
        Casts("here", rounding=True)("deep", values.bfloat16(), torch.float16)
    assert str(error.value) == (
        "here: deep: the value -99840 is beyond float16, whose largest is 65504; "
        "--torch-dtype bfloat16 keeps every value"
    )


def test_nan_and_infinity_of_the_source_are_carried_over() -> None:
    values = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.5])
    casts = Casts("here")
    found = casts("name", values, torch.float16)
    assert torch.equal(found.nan_to_num(7.0), values.half().nan_to_num(7.0))
    assert str(found[4].item()) == "-0.0"
    assert casts.notes() == []


# ---- overflow


def with_value(folder: Path, name: str, value: float) -> Path:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[5] = value

    edit_tensors(folder, change)
    return folder


@pytest.mark.parametrize("name", [TOWER + UP, TOWER + NORM, TOWER + EMBED])
@pytest.mark.parametrize("tp", [1, 2])
def test_import_refuses_a_cast_that_overflows(
    name: str, tp: int, source: Source, tmp_path: Path, capsys: Capture
) -> None:
    """found.md: ``--torch-dtype float16`` over a bf16 value of 1e5 wrote ``inf``, without a word."""
    folder = with_value(copy(source("vlm", dtype="bfloat16"), tmp_path / "model"), name, 1e5)
    args = ("import", "--hf-model", folder, "--megatron-path", tmp_path / "m", "--tp", tp)
    assert run(*args, "--torch-dtype", "float16") == 1
    message = capsys.readouterr().err
    assert f"error: {folder}: {name}: the value 99840 is beyond float16, whose largest is 65504" in message
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert run(*args) == 0


@pytest.mark.parametrize(("target", "name"), [("embedder", UP), ("vlm", UP), ("vlm", "vision_tower.ln_pre.weight")])
def test_export_refuses_a_cast_that_overflows(
    target: str, name: str, source: Source, tmp_path: Path, capsys: Capture
) -> None:
    full = name if name.startswith("vision") else TOWER + name
    folder = with_value(copy(source("vlm", dtype="bfloat16"), tmp_path / "model"), full, -1e5)
    import_hf(folder, tmp_path / "m", progress=False)
    args = ("export", "--megatron-path", tmp_path / "m", "--hf-path", tmp_path / "hf", "--target", target)
    assert run(*args, "--torch-dtype", "float16") == 1
    shown = name.removeprefix("model.") if target == "embedder" else full
    assert f": {shown}: the value -99840 is beyond float16" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
    assert run(*args) == 0


def test_an_fp8_scale_beyond_bfloat16_is_refused(tmp_path: Path) -> None:
    folder, _ = fp8_source(tmp_path / "fp8")
    scale = f"{TOWER}{UP}_scale_inv"
    edit_tensors(folder, lambda tensors: tensors.update({scale: torch.tensor(1e36)}))
    with pytest.raises(UserError, match=rf"{scale}: the scale 1e\+36 takes FP8 values beyond bfloat16"):
        import_hf(folder, tmp_path / "m", progress=False)


# ---- rounding


@pytest.fixture
def mislabelled(source: Source, tmp_path: Path) -> Path:
    """fp32 tensors under a config that says bfloat16."""
    folder = copy(source("vlm", dtype="float32"), tmp_path / "model")
    edit_json(folder / "config.json", lambda raw: raw.update(dtype="bfloat16"))
    return folder


def changed(tensors: dict[str, Tensor], dtype: torch.dtype) -> tuple[int, int]:
    """(values, tensors) that a cast would round."""
    counts = [int((tensor.to(dtype).double() != tensor.double()).sum()) for tensor in tensors.values()]
    return sum(counts), sum(count > 0 for count in counts)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_config_of_a_narrower_dtype_than_its_tensors_is_refused(
    tp: int, mislabelled: Path, tmp_path: Path, capsys: Capture
) -> None:
    """found.md: ``dtype: bfloat16`` in the config over fp32 tensors rounded, without a word."""
    args = ("import", "--hf-model", mislabelled, "--megatron-path", tmp_path / "m", "--tp", tp)
    assert run(*args) == 1
    message = capsys.readouterr().err
    assert f"error: {mislabelled}: {TOWER}{EMBED}: the value " in message
    assert "stored in float32, would be rounded to" in message
    assert "--torch-dtype float32 keeps every value, --torch-dtype bfloat16 asks for rounding" in message
    assert not (tmp_path / "m").exists()
    assert run(*args, "--torch-dtype", "float32") == 0
    export_hf(tmp_path / "m", tmp_path / "hf", progress=False)
    assert_same_bits(tensors_of(tmp_path / "hf"), encoder_tensors_of(mislabelled))


@pytest.mark.parametrize("tp", [1, 2])
def test_rounding_that_is_asked_for_is_counted(tp: int, mislabelled: Path, tmp_path: Path, capsys: Capture) -> None:
    args = ("import", "--hf-model", mislabelled, "--megatron-path", tmp_path / "m", "--tp", tp)
    assert run(*args, "--torch-dtype", "bfloat16") == 0
    before = encoder_tensors_of(mislabelled)
    values, tensors = changed(before, torch.bfloat16)
    assert f"{values:,} values in {tensors} tensors rounded, the largest change 0.39% of a value (in " in (
        capsys.readouterr().out
    )
    export_hf(tmp_path / "m", tmp_path / "hf", progress=False)
    assert_same_bits(tensors_of(tmp_path / "hf"), {name: tensor.bfloat16() for name, tensor in before.items()})


def test_values_that_the_narrower_dtype_holds_exactly_need_no_asking(source: Source, tmp_path: Path) -> None:
    folder = copy(source("vlm", dtype="bfloat16"), tmp_path / "model")
    edit_tensors(folder, lambda tensors: tensors.update({name: t.float() for name, t in tensors.items()}))
    done = import_hf(folder, tmp_path / "m", progress=False)
    assert not [note for note in done.notes if "rounded" in note]
    export_hf(tmp_path / "m", tmp_path / "hf", progress=False)
    assert_same_bits(tensors_of(tmp_path / "hf"), encoder_tensors_of(source("vlm", dtype="bfloat16")))


def test_underflow_is_rounding(source: Source, tmp_path: Path, capsys: Capture) -> None:
    folder = with_value(copy(source("vlm", dtype="bfloat16"), tmp_path / "model"), TOWER + UP, 1e-30)
    import_hf(folder, tmp_path / "m", progress=False)
    args = ("export", "--megatron-path", tmp_path / "m", "--hf-path", tmp_path / "hf", "--torch-dtype", "float16")
    assert run(*args) == 0
    values, tensors = changed(encoder_tensors_of(folder), torch.float16)
    expected = (
        f"{values:,} values in {tensors} tensors rounded, the largest change 100.00% of a value (in layers.1.mlp.up"
    )
    assert expected in capsys.readouterr().out


def test_a_vlm_exported_in_another_dtype_is_counted_whole(source: Source, tmp_path: Path) -> None:
    folder = source("vlm", dtype="float32", tie_word_embeddings=False)
    import_hf(folder, tmp_path / "m", progress=False)
    done = export_hf(tmp_path / "m", tmp_path / "hf", target="vlm", torch_dtype="bfloat16", progress=False)
    values, tensors = changed(tensors_of(folder), torch.bfloat16)
    assert [note for note in done.notes if f"{values:,} values in {tensors} tensors rounded" in note]


def test_fp8_is_dequantised_without_asking_and_said_so(tmp_path: Path) -> None:
    folder, _ = fp8_source(tmp_path / "fp8")
    done = import_hf(folder, tmp_path / "m", progress=False)
    assert "14 FP8 weights became bfloat16: fp8 · scale, rounded once" in done.notes
    assert not [note for note in done.notes if "tensors rounded" in note]


# ---- checkpoints in a wider dtype than their source's


def as_if(checkpoint: Path, **sections: Any) -> None:
    """Let an fp32 checkpoint say that its source was bfloat16; ``train`` makes it a training run's."""
    path = without_checksums(checkpoint / "iter_0000000") / "run_config.yaml"
    run_config = yaml.safe_load(path.read_text())
    run_config["encoder"]["dtype"] = "bfloat16"
    path.write_text(yaml.safe_dump({**run_config, **sections}))


def test_a_checkpoint_trained_in_fp32_is_exported_in_the_sources_dtype_and_says_what_it_cost(
    source: Source, tmp_path: Path
) -> None:
    """The contract's default; it needs no asking, but telling."""
    import_hf(source("vlm", dtype="float32"), tmp_path / "m", progress=False)
    as_if(tmp_path / "m", train={"train_iters": 3})
    done = export_hf(tmp_path / "m", tmp_path / "hf", progress=False)
    values, tensors = changed(encoder_tensors_of(source("vlm", dtype="float32")), torch.bfloat16)
    (note,) = done.notes
    assert note.startswith(f"{values:,} values in {tensors} tensors rounded")
    assert note.endswith("; --torch-dtype float32 keeps every value")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"
    assert export_hf(tmp_path / "m", tmp_path / "hf32", torch_dtype="float32", progress=False).notes == []


def test_any_other_checkpoint_is_not_rounded_without_asking(source: Source, tmp_path: Path) -> None:
    import_hf(source("vlm", dtype="float32"), tmp_path / "m", progress=False)
    as_if(tmp_path / "m")
    with pytest.raises(UserError, match=r"embed_tokens.weight: the value .* --torch-dtype bfloat16 asks for rounding"):
        export_hf(tmp_path / "m", tmp_path / "hf", progress=False)
    assert not (tmp_path / "hf").exists()
    (note,) = export_hf(tmp_path / "m", tmp_path / "hf", torch_dtype="bfloat16", progress=False).notes
    assert "tensors rounded" in note
    assert "keeps" not in note
