"""In a step the host waits for the device once: for the norm, when the loss is known too."""

from __future__ import annotations

import threading
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import make_inputs, recipe
from support.worlds import run_world

from megatron_embed.recipes import train

#: each of them hands a number of the device to Python, so the host waits until the device has it
WAITS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")


def waits_of_steps(folder: str, name: str, overrides: list[str]) -> list[list[str]]:
    """Train; for every step the places where the host waited within it."""
    from megatron_embed.recipes.training import run

    found: list[list[str]] = []
    depth = 0

    def main() -> bool:
        return threading.current_thread() is threading.main_thread()

    step = run.TrainingRun._step

    def counted(method: str, plain: Any) -> Any:
        def wait(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            if not main():  # the next batch is made meanwhile
                return plain(*args, **kwargs)
            if inside and not depth:
                stack = [frame for frame in traceback.extract_stack()[:-1] if Path(frame.filename).name != "host.py"]
                place = stack[-1]
                found[-1].append(f"{method} in {Path(place.filename).name}, {place.name}")
            depth += 1
            try:
                return plain(*args, **kwargs)
            finally:
                depth -= 1

        return wait

    inside = False

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        found.append([])
        inside = True
        try:
            return step(*args, **kwargs)
        finally:
            inside = False

    with pytest.MonkeyPatch.context() as patch:
        for method in WAITS:
            patch.setattr(torch.Tensor, method, counted(method, getattr(torch.Tensor, method)))
        patch.setattr(run.TrainingRun, "_step", watched)
        train(recipe(Path(folder), name, "train.train_iters=4", *overrides))
    return found


CACHED = ["loss.mode=cached", "loss.kept_micro_batches=1"]
EVERYTHING = ["loss.learn_temperature=true", "loss.matryoshka_dims=[16]", "loss.symmetric=true"]
RUNS = {
    "direct": ["loss.mode=direct", "train.micro_batch_tokens=4096", *EVERYTHING],
    "cached": [*CACHED, *EVERYTHING],
    "padded": [*CACHED, "data.packing=false"],
    "whole_optimizer": [*CACHED, "optimizer.distributed=false"],
}
PIPELINE = {"pp2": [*CACHED, *EVERYTHING, "model.pipeline_model_parallel_size=2"], "dp2": [*CACHED, *EVERYTHING]}


def waits_of_runs(folder: str, runs: dict[str, list[str]]) -> dict[str, list[list[str]]]:
    return {name: waits_of_steps(folder, name, overrides) for name, overrides in runs.items()}


@pytest.mark.slow
def test_the_host_waits_once_a_step(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    for world, runs in ((1, RUNS), (2, PIPELINE)):
        for of_rank in run_world(waits_of_runs, world, str(tmp_path), runs):
            for name, steps in of_rank.items():
                assert len(steps) == 4
                for waits in steps:
                    # The second is no wait of its own: what it reads was on its way before the norm was.
                    assert waits == ["item in clip_grads.py, get_grad_norm_fp32", "tolist in step.py, read"], name
