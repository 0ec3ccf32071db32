"""Runs that must fail: one message, once, every process gone, nothing damaged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import make_inputs, recipe

from megatron_embed.conversion.mcore.folder import resolve


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("failures")
    make_inputs(path)
    return path


def launch(folder: Path, name: str, *overrides: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """``torchrun`` (or a single process) with the recipe of :func:`support.runs.recipe`; the limit is for hangs."""
    config = folder / f"{name}.yaml"
    from megatron_embed.recipes.config.run_config import save_run_config

    save_run_config(recipe(folder, name), config)
    program = ["-m", "megatron_embed.recipes.train", "--config", str(config), "device=cpu", *overrides]
    command = [sys.executable, *program]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        command = [sys.executable, *torchrun, *program]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=folder, check=False)


def shows_no_code(stderr: str) -> bool:
    """Whether no traceback reaches into this project (torchrun's own summary may hold one)."""
    return not any(
        f"/{package}/" in line for line in stderr.splitlines() for package in ("recipes", "bridge") if 'File "' in line
    )


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(folder: Path) -> None:
    done = launch(folder, "nan", "optimizer.lr=1e30", "optimizer.warmup_iters=1", "train.save_interval=1", processes=2)
    assert done.returncode == 1
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "is nan" in message or "is inf" in message
    assert f"{folder / 'train.jsonl'} lines" in message
    step = int(message.split("step ")[1].split(":")[0])
    checkpoint = resolve(folder / "nan")
    assert checkpoint.name == f"iter_{step - 1:07d}"
    assert str(checkpoint) in message
    named = message.split("train.jsonl lines ")[1].split(".")[0]
    assert len(named.split(",")) == 8
    assert shows_no_code(done.stderr)


def test_one_rank_failing_ends_all_with_its_message_once(folder: Path) -> None:
    # only the rank that has the long texts cannot hold its batch; the other waits for it in a collective
    rows = [{"query": f"short {i}", "positive": f"passage {i} " * (60 if i % 2 else 1)} for i in range(64)]
    path = folder / "uneven.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = launch(
        folder, "uneven", f"data.train={path}", "loss.mode=direct", "train.micro_batch_tokens=300", processes=2
    )
    assert done.returncode == 1
    assert done.stderr.count("loss.mode: direct needs a rank's whole batch in one micro-batch") == 1
    assert shows_no_code(done.stderr)


FAILS_ALONE = """
import torch
import torch.distributed as dist
from megatron_embed.bridge import parallel
from megatron_embed.bridge.cpu import host
from megatron_embed.bridge.errors import UserError
from megatron_embed.bridge.layout import Layout
from megatron_embed.recipes.cli import run_program

def main():
    host.run_on_cpu()
    try:
        with parallel.parallel_world(Layout()):
            if dist.get_rank() == 1:
                raise UserError("rank 1 knows why")
            dist.all_reduce(torch.zeros(1))
    except UserError:
        assert dist.is_initialized(), "closed: the others fail of that, and may be heard first"
        raise

run_program(main)
"""


def test_the_rank_that_fails_is_heard_not_those_that_wait_for_it(tmp_path: Path) -> None:
    program = tmp_path / "fails.py"
    program.write_text(FAILS_ALONE)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if line.startswith("error:")] == ["error: rank 1 knows why"]


@pytest.mark.parametrize(
    ("overrides", "processes", "message"),
    [
        (["model.tensor_model_parallel_size=3"], 2, "world size: found 2; wanted a multiple of 3"),
        (["model.tensor_model_parallel_size=2", "model.hf_model={vlm}"], 2, "does not divide num_key_value_heads 1"),
        (
            ["model.pipeline_model_parallel_size=4", "train.global_batch_size=8"],
            4,
            "4 is more than the model's 3 layers",
        ),
        (["data.train={folder}/absent.jsonl"], 1, "absent.jsonl"),
        (["model.hf_model={folder}/absent"], 1, "absent"),
        (["checkpoint.pretrained_checkpoint={folder}/empty"], 1, "latest_checkpointed_iteration.txt"),
        (["checkpoint.load={folder}/empty"], 1, "latest_checkpointed_iteration.txt"),
        (["loss.mode=direct", "train.micro_batch_size=2"], 1, "loss.mode: direct needs a rank's whole batch"),
        (
            ["loss.score_distillation_weight=1"],
            1,
            "train.jsonl, line 1: no scores, which loss.score_distillation_weight",
        ),
    ],
)
def test_refused_once_whatever_the_number_of_processes(
    folder: Path, overrides: list[str], processes: int, message: str
) -> None:
    (folder / "empty").mkdir(exist_ok=True)
    if "{vlm}" in " ".join(overrides) and not (folder / "one_kv_head").exists():
        from support.tiny_models import save_vlm

        save_vlm(folder / "one_kv_head", num_key_value_heads=1)
    given = [text.format(folder=folder, vlm=folder / "one_kv_head") for text in overrides]
    done = launch(folder, "refused", *given, processes=processes)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1, done.stderr[-3000:]
    assert message in errors[0]
    assert not (folder / "refused" / "checkpoints").exists()


def test_another_runs_folder_is_refused_and_left_alone(folder: Path) -> None:
    assert launch(folder, "mine", "train.train_iters=1").returncode == 0
    before = sorted(path.name for path in (folder / "mine").rglob("*"))
    done = launch(folder, "mine", "loss.temperature=0.5", "data.query_prompt=other: ")
    assert done.returncode == 1
    assert "loss.temperature: 0.02 before, 0.5 now" in done.stderr
    assert "data.query_prompt: 'query: ' before, 'other: ' now" in done.stderr
    assert sorted(path.name for path in (folder / "mine").rglob("*")) == before
