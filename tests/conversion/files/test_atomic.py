"""An output is there whole or not at all, whatever ends the program."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.hf_files import Source, assert_same_bits, encoder_tensors_of, tensors_of
from torch import Tensor

from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.exporting import export_hf
from megatron_embed.conversion.files.atomic import atomic_output
from megatron_embed.conversion.importing import import_hf
from megatron_embed.conversion.mcore import tensors as tensor_stream

pytestmark = pytest.mark.slow


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_appears_at_the_end(tmp_path: Path) -> None:
    with atomic_output(tmp_path / "a" / "out") as folder:
        (folder / "config.json").touch()
        assert not (tmp_path / "a" / "out").exists()
        assert folder.parent == tmp_path / "a"
    assert names(tmp_path / "a") == ["out"]
    assert names(tmp_path / "a" / "out") == ["config.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", [True, False])
def test_any_failure_leaves_what_was_there(error: type[BaseException], before: bool, tmp_path: Path) -> None:
    if before:
        with atomic_output(tmp_path / "out") as folder:
            (folder / "config.json").write_text('{"model_type": "old"}')
            (folder / "modules.json").touch()

    def write() -> None:
        with atomic_output(tmp_path / "out", overwrite=True) as folder:
            (folder / "config.json").write_text("new")
            raise error

    with pytest.raises(error):
        write()
    assert names(tmp_path) == (["out"] if before else [])
    assert not before or "old" in (tmp_path / "out" / "config.json").read_text()


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic_output(tmp_path / "out") as folder:
        (folder / "x").touch()
    assert names(tmp_path / "out") == ["x"]


def test_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    with atomic_output(tmp_path / "out") as first:
        (first / "x").touch()
        with pytest.raises(RuntimeError), atomic_output(tmp_path / "out"):
            raise RuntimeError
        assert (first / "x").exists()


def test_killed_between_the_two_renames(tmp_path: Path) -> None:
    """--overwrite moves the old folder away first; the next run brings it back."""
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced" / "config.json").touch()
    with pytest.raises(UserError, match="exists already"), atomic_output(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_was_put_there_meanwhile_is_left(overwrite: bool, tmp_path: Path) -> None:
    why = "is no model or checkpoint" if overwrite else "exists already"

    def write() -> None:
        with atomic_output(tmp_path / "out", overwrite=overwrite):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "thesis.txt").touch()

    with pytest.raises(UserError, match=why):
        write()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["thesis.txt"]


def test_ctrl_c_between_the_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with atomic_output(tmp_path / "out") as folder:
        (folder / "config.json").write_text('{"model_type": "old"}')
        (folder / "modules.json").touch()
    rename = Path.rename

    def stopped(path: Path, target: Path) -> Path:
        if ".partial-" in path.name:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt), atomic_output(tmp_path / "out", overwrite=True):
        pass
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["config.json", "modules.json"]


def test_a_place_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"), atomic_output(tmp_path / "file" / "out"):
        pass


def test_a_reader_that_fails_half_way(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_hf(source("model"), tmp_path / "m", progress=False)
    load, count = tensor_stream.CheckpointReader._addresses, iter(range(100))

    def broken(self: tensor_stream.CheckpointReader, *args: object) -> object:
        if next(count) == 9:
            raise UserError("a bad sector")
        return load(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(tensor_stream.CheckpointReader, "_addresses", broken)
    with pytest.raises(UserError, match="a bad sector"):
        export_hf(tmp_path / "m", tmp_path / "hf", progress=False)
    assert names(tmp_path) == ["m"]


#: Runs the command line in forked children, each of which ends itself at one of its own steps: a file opened, a folder
#: made, a tensor written, a rename, anything removed below the given folder. Step 0 lets it finish, and counts.
STEPS = """
import os, signal, sys
from pathlib import Path
from transformers import Ministral3Config  # once for all children
from megatron_embed.conversion import convert_checkpoints, exporting, importing
from megatron_embed.conversion.hf import safetensors_writer
from megatron_embed.conversion.mcore import tensors as tensor_stream
from megatron_embed.conversion.files import block_writer

number, below, steps, taken, args = getattr(signal, sys.argv[1]), sys.argv[2], sys.argv[3].split(","), 0, sys.argv[4:]

def step(event, values):
    global taken
    seen = event == "tensor" or (
        event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and str(values[0]).startswith(below)
    )
    if seen:
        taken += 1
        if taken == at:
            os.kill(os.getpid(), number)

def counted(function):
    def write(stream, *args):
        sys.audit("tensor")
        return function(stream, *args)
    return write

tensor_stream._save = counted(tensor_stream._save)
safetensors_writer.write_values = counted(safetensors_writer.write_values)
block_writer.BLOCK = 4096  # small tensors, too, are in the file soon after
sys.addaudithook(step)
for at in map(int, steps):
    taken = 0
    if not (child := os.fork()):
        code = convert_checkpoints.main([a.replace("STEP", str(at)) for a in args] + ["--no-progress"])
        sys.stdout.flush()
        print("finished", code, taken, flush=True)
        os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print("step", at, "ended", status, flush=True)
"""


def run_to_steps(
    below: Path, steps: list[int], args: list[object], *, number: str = "SIGKILL", messages: str = ""
) -> list[str]:
    """Lines ``finished CODE STEPS`` and ``step N ended STATUS``; ``messages`` are what stderr must hold."""
    command = [sys.executable, "-c", STEPS, number, str(below), ",".join(map(str, steps)), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == messages
    return [line for line in done.stdout.splitlines() if line.startswith(("finished", "step"))]


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("kind", ["import", "export"])
def test_kill_9_at_any_moment(kind: str, overwrite: bool, source: Source, tmp_path: Path) -> None:
    """At five moments picked at random among all steps, and at the last ones, the renames: afterwards the output is
    complete or absent (or, with --overwrite, the old one), and a rerun succeeds and leaves nothing else behind."""
    folder, old = source("vlm"), source("vlm", seed=4)
    work, megatron = tmp_path / "work", tmp_path / "m"
    import_hf(folder, megatron, progress=False)
    out = work / "STEP" / "out"
    if kind == "import":
        args: list[object] = ["import", "--hf-model", folder, "--megatron-path", out]
    else:
        args = ["export", "--megatron-path", megatron, "--hf-path", out]
    args += ["--overwrite"] if overwrite else []

    def prepare(step: int) -> Path:
        (work / str(step)).mkdir(parents=True)
        if overwrite:
            import_hf(old, tmp_path / f"old{step}", progress=False)
            if kind == "import":
                os.rename(tmp_path / f"old{step}", work / str(step) / "out")
            else:
                export_hf(tmp_path / f"old{step}", work / str(step) / "out", progress=False)
        return work / str(step) / "out"

    def weights(path: Path) -> dict[str, Tensor]:
        if kind == "export":
            return tensors_of(path)
        export_hf(path, tmp_path / "check", overwrite=True, progress=False)
        return tensors_of(tmp_path / "check")

    prepare(0)
    finished, _ = run_to_steps(work, [0], args)
    assert finished.startswith("finished 0 ")
    total = int(finished.split()[2])
    assert total > 30
    new, before = encoder_tensors_of(folder), encoder_tensors_of(old)
    renames = 2 if overwrite else 1
    moments = sorted({*random.Random(f"{kind}{overwrite}").sample(range(1, total), 5), *range(total - renames, total)})
    paths = {step: prepare(step) for step in moments}
    assert run_to_steps(work, moments, args) == [f"step {step} ended -9" for step in moments]
    seen = set()
    for step, path in paths.items():
        seen.add(path.exists())
        if path.exists():
            found = weights(path)
            assert_same_bits(found, before if overwrite and torch.equal(found[NORM], before[NORM]) else new)
        if kind == "import":
            import_hf(folder, path, overwrite=path.exists() or overwrite, progress=False)
        else:
            export_hf(megatron, path, overwrite=path.exists() or overwrite, progress=False)
        assert names(path.parent) == ["out"], step
        assert_same_bits(weights(path), new)
    assert seen == ({True, False} if overwrite else {False})


NORM = "norm.weight"


def test_sigterm_cleans_up(source: Source, tmp_path: Path) -> None:
    work = tmp_path / "work"
    args = ["import", "--hf-model", source("model"), "--megatron-path", work / "out"]
    lines = run_to_steps(
        work, [9, 30], args, number="SIGTERM", messages="error: interrupted; nothing was written\n" * 2
    )
    assert [line for line in lines if line.startswith("step")] == ["step 9 ended 1", "step 30 ended 1"]
    assert not work.exists() or names(work) == []
