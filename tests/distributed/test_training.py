"""Whole runs: the same numbers under every layout, and across a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import tensors_of
from support.runs import make_inputs, read_metrics, recipe
from support.worlds import run_world

TP2 = "model.tensor_model_parallel_size=2"
PP2 = "model.pipeline_model_parallel_size=2"

Runs = dict[str, list[str]]
#: name → overrides, by world size; what is left over is data parallel
RUNS: dict[int, Runs] = {
    1: {"one": [], "one_direct": ["train.micro_batch_tokens=16384"]},
    2: {
        "dp2": [],
        "dp2_plain_optimizer": ["optimizer.distributed=false"],
        "dp2_direct": ["loss.mode=direct", "train.micro_batch_tokens=16384"],
        "tp2": [TP2],
        "tp2_no_sp": [TP2, "model.sequence_parallel=false"],
        "pp2": [PP2],
        "pp2_direct": [PP2, "loss.mode=direct", "train.micro_batch_tokens=16384"],
    },
    4: {
        "tp2_pp2": [TP2, PP2],
        "tp2_cp2": [TP2, "model.context_parallel_size=2"],
        "pp2_vpp": [PP2, "model.virtual_pipeline_model_parallel_size=2"],
    },
}
MORE_RUNS: dict[int, Runs] = {
    4: {
        "tp2_dp2": [TP2],
        "padded": [TP2, "data.packing=false", "model.recompute=full"],
        "pp2_dp2": [PP2],
        "tp4": ["model.tensor_model_parallel_size=4"],
        "dp4": ["train.micro_batch_size=3"],
    },
}


def train_all(folder: str, runs: dict[str, list[str]]) -> None:
    from megatron_embed.recipes import train

    for name, overrides in runs.items():
        train(recipe(Path(folder), name, *overrides))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs")
    make_inputs(path, num_hidden_layers=5)
    run_world(train_all, 1, str(path), RUNS[1])
    return path


@pytest.mark.parametrize(
    ("world", "runs"),
    [
        pytest.param(2, RUNS[2], id="2"),
        pytest.param(4, RUNS[4], id="4"),
        pytest.param(4, MORE_RUNS[4], id="4-more", marks=pytest.mark.exhaustive),
    ],
)
def test_twenty_steps_are_the_same_under_every_layout(folder: Path, world: int, runs: Runs) -> None:
    wanted = read_metrics(folder / "one")
    assert [record["step"] for record in wanted] == list(range(1, 21))
    assert wanted[-1]["loss"] < wanted[0]["loss"]
    run_world(train_all, world, str(folder), runs)
    failures = []
    for name in (*runs, "one_direct"):
        for record, reference in zip(read_metrics(folder / name), wanted, strict=True):
            failures += [
                f"{name} step {record['step']}: {key} {record[key]}, wanted {reference[key]}"
                for key in ("loss", "grad_norm", "learning_rate", "tokens", "consumed_samples")
                if record[key] != pytest.approx(reference[key], rel=1e-5)
            ]
    assert not failures, "\n".join(failures)


def stop_and_go_on(folder: str) -> Any:
    """20 steps at once, and 10 + 10 at the same and at other layouts."""
    import shutil

    import torch.distributed as dist

    from megatron_embed.recipes import train

    root = Path(folder)
    saving = "train.save_interval=10"
    train(recipe(root, "whole", saving))
    for name, overrides in {"same": [], "tp2": [TP2], "pp2": [PP2], "plain": ["optimizer.distributed=false"]}.items():
        if dist.get_rank() == 0:  # as it stood when the run was killed after its first checkpoint
            shutil.copytree(root / "whole", root / name)
            shutil.rmtree(root / name / "checkpoints" / "iter_0000020")
            (root / name / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("10\n")
            config = (root / name / "run_config.yaml").read_text()
            (root / name / "run_config.yaml").write_text(config.replace(f"{root}/whole", f"{root}/{name}"))
        dist.barrier()
        if name != "plain":  # its optimizer state has another form
            train(recipe(root, name, saving, *overrides))


def weights(root: Path, name: str) -> dict[str, torch.Tensor]:
    """All tensors of a run's last checkpoint, optimizer state included."""
    return tensors_of(root / name / "checkpoints" / "iter_0000020")


def test_a_resumed_run_is_the_uninterrupted_run(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    run_world(stop_and_go_on, 2, str(tmp_path))
    exact = ("step", "loss", "grad_norm", "learning_rate", "consumed_samples", "tokens")
    whole, same = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "same")
    assert [[r[key] for key in exact] for r in same] == [[r[key] for key in exact] for r in whole]
    wanted, found = weights(tmp_path, "whole"), weights(tmp_path, "same")
    assert any("exp_avg_sq" in name for name in wanted)
    assert wanted.keys() == found.keys()
    assert [name for name in wanted if not torch.equal(wanted[name], found[name])] == []
    for name in ("tp2", "pp2"):
        for record, reference in zip(read_metrics(tmp_path / name), whole, strict=True):
            assert record["loss"] == pytest.approx(reference["loss"], rel=1e-5), (name, record["step"])
            assert record["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5), (name, record["step"])
    common = torch.load(tmp_path / "same" / "checkpoints" / "iter_0000020" / "common.pt", weights_only=True)
    assert {group["step"] for group in common["optimizer"]["optimizer"]["param_groups"]} == {20}
