"""An output is there whole or not at all, whatever ends the program."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.hf_files import Source, assert_same_bits, encoder_tensors_of, tensors_of

from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion import tensor_stream
from megatron_embed.conversion.atomic import atomic_output
from megatron_embed.conversion.exporting import export_hf
from megatron_embed.conversion.importing import import_hf


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
            (folder / "config.json").write_text("old")

    def write() -> None:
        with atomic_output(tmp_path / "out", overwrite=True) as folder:
            (folder / "config.json").write_text("new")
            raise error

    with pytest.raises(error):
        write()
    assert names(tmp_path) == (["out"] if before else [])
    assert not before or (tmp_path / "out" / "config.json").read_text() == "old"


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


def test_a_place_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"), atomic_output(tmp_path / "file" / "out"):
        pass


def test_a_reader_that_fails_half_way(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_hf(source("model"), tmp_path / "m", progress=False)
    load, count = tensor_stream.CheckpointReader._load, iter(range(100))

    def broken(self: tensor_stream.CheckpointReader, *args: object) -> object:
        if next(count) == 9:
            raise UserError("a bad sector")
        return load(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(tensor_stream.CheckpointReader, "_load", broken)
    with pytest.raises(UserError, match="a bad sector"):
        export_hf(tmp_path / "m", tmp_path / "hf", progress=False)
    assert names(tmp_path) == ["m"]


KILL = """
import os, signal, sys
from megatron_embed.conversion import safetensors_writer, tensor_stream
from megatron_embed.conversion.convert_checkpoints import main

kind, at = sys.argv[1], int(sys.argv[2])
module, name = {"import": (tensor_stream, "_save"), "export": (safetensors_writer, "_write_tensor")}[kind]
real, calls = getattr(module, name), iter(range(10_000))

def write(stream, *args):
    if next(calls) == at:
        stream.flush()
        os.kill(os.getpid(), getattr(signal, sys.argv[3]))
    return real(stream, *args)

setattr(module, name, write)
sys.exit(main([*sys.argv[4:], "--no-progress"]))
"""


@pytest.mark.parametrize(("kind", "at"), [("import", 5), ("export", 13)])
def test_kill_9_leaves_nothing_and_a_rerun_succeeds(kind: str, at: int, source: Source, tmp_path: Path) -> None:
    folder = source("vlm")
    work = tmp_path / "work"
    work.mkdir()
    import_hf(folder, tmp_path / "m", progress=False)
    args = {
        "import": ["import", "--hf-model", folder, "--megatron-path", work / "out"],
        "export": ["export", "--megatron-path", tmp_path / "m", "--hf-path", work / "out"],
    }[kind]
    command = [sys.executable, "-c", KILL, kind, str(at), "SIGKILL", *map(str, args)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    (stale,) = names(work)
    assert stale.startswith(".out.partial-")
    if kind == "import":
        import_hf(folder, work / "out", progress=False)
        export_hf(work / "out", tmp_path / "hf", progress=False)
    else:
        export_hf(tmp_path / "m", work / "out", progress=False)
        os.rename(work / "out", tmp_path / "hf")
    assert not [name for name in names(work) if name != "out"]
    assert_same_bits(tensors_of(tmp_path / "hf"), encoder_tensors_of(folder))


def test_sigterm_cleans_up(source: Source, tmp_path: Path) -> None:
    args = ["import", "--hf-model", str(source("model")), "--megatron-path", str(tmp_path / "out")]
    command = [sys.executable, "-c", KILL, "import", "5", "SIGTERM", *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: interrupted; nothing was written\n")
    assert names(tmp_path) == []
