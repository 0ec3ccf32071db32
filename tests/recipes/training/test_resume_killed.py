"""A run that starts afresh where another one lies, killed at any moment: neither passes for the other afterwards."""

from __future__ import annotations

import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
from support.killing import Outcome, call_in_fresh_process, run_killed
from support.runs import make_inputs, read_metrics, recipe

from megatron_embed.conversion.files.atomic import atomic_file
from megatron_embed.conversion.mcore import folder as checkpoint_folder
from megatron_embed.conversion.mcore import model_state
from megatron_embed.recipes.config.run_config import save_run_config
from megatron_embed.recipes.training import checkpointing
from megatron_embed.recipes.training.loop import train
from megatron_embed.recipes.training.metrics import Reporter
from megatron_embed.recipes.training.run import TrainingRun
from megatron_embed.recipes.training.run_folder import RunFolder

pytestmark = pytest.mark.slow

OLD, NEW = ["loss.temperature=0.02", "train.train_iters=2"], ["loss.temperature=0.5", "train.train_iters=3"]
AFRESH = "checkpoint.resume=false"
#: where a run changes its folder, and the loop between
WATCHED = (
    TrainingRun.loop,
    TrainingRun._save,
    Reporter._write,
    Reporter._open,
    RunFolder.claim,
    RunFolder._put_aside,
    RunFolder._cut_metrics,
    save_run_config,
    atomic_file.__wrapped__,  # type: ignore[attr-defined]
    checkpointing.save,
    model_state.save_model_state,
    checkpoint_folder.write_tracker,
)


def start(folder: Path, name: str, *overrides: str, moment: int | None = None) -> Outcome:
    return run_killed(partial(train, recipe(folder, name, *overrides)), watched=WATCHED, moments=[moment])


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_metrics(folder)]


def kill_at(folder: Path, shares: list[float] | None) -> tuple[int, int]:
    """Check what holds wherever the new run is killed.

    Args:
        shares: of the lines that it would run; None: it is killed before every single one.

    Returns:
        how often the next start was refused, and how often it began afresh
    """
    assert start(folder, "old", *OLD).codes == [0]
    undisturbed = start(folder, "whole", *NEW)
    shutil.copytree(folder / "old", folder / "counted")
    counted = start(folder, "counted", *NEW, AFRESH)
    assert undisturbed.codes == counted.codes == [0], undisturbed.output + counted.output
    assert losses(folder / "counted") == losses(folder / "whole")
    old, wanted, lines = files_of(folder / "old"), losses(folder / "whole"), counted.lines[0]
    assert files_of(folder / "counted" / "replaced-1") == old
    refused, afresh = 0, 0
    for moment in range(1, lines + 1) if shares is None else [max(1, round(share * lines)) for share in shares]:
        run = folder / f"run{moment}"
        shutil.copytree(folder / "old", run)
        assert start(folder, run.name, *NEW, AFRESH, moment=moment).codes == [-signal.SIGKILL]
        there = files_of(run)
        moved = {name: there.get(f"replaced-1/{name}", there.get(name)) for name in old}
        assert moved == old, f"moment {moment}: of the old run was changed {[n for n in old if moved[n] != old[n]]}"
        untouched = there == old
        again = start(folder, run.name, *NEW)  # without being told to start afresh
        tracker = run / "checkpoints" / checkpoint_folder.TRACKER
        if tracker.is_file() and again.codes == [1]:
            assert "loss.temperature: 0.02 before, 0.5 now" in again.output, f"moment {moment}: {again.output}"
            assert files_of(run) == there
            refused += 1
        else:
            assert not untouched, f"moment {moment}: the old run was gone on with"
            assert again.codes == [0], f"moment {moment}: {again.output}"
            assert losses(run) == wanted, f"moment {moment}"
            assert checkpoint_folder.resolve(run).name == "iter_0000003"
            afresh += 1
        shutil.rmtree(run)
    return refused, afresh


def test_a_run_that_starts_afresh_and_is_killed_never_passes_for_the_one_before(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    refused, afresh = call_in_fresh_process(kill_at, tmp_path, [0.05, 0.35, 0.5, 0.95])
    assert refused
    assert afresh


@pytest.mark.exhaustive
def test_a_run_that_starts_afresh_and_is_killed_before_any_line_never_passes_for_the_one_before(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    refused, afresh = call_in_fresh_process(kill_at, tmp_path, None)
    assert refused > 10
    assert afresh > 30
