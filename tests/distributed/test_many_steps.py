"""Twelve steps of many uneven micro-batches at a high learning rate, against a stock model trained in one process.

A step that is wrong now and then shows only over many steps and messages: buffers must be reused while messages are
under way. So every run here sends hundreds of messages of different lengths, and some runs are repeated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import tensors_of
from support.one_process import train_by_the_book
from support.runs import read_metrics, recipe, write_pairs
from support.tiny_models import save_model
from support.worlds import run_world

STEPS, MICRO_BATCHES, SIZES = 12, 15, 8
#: how far a run may be from one process
TOLERANCE = 1e-5

TP2 = "model.tensor_model_parallel_size=2"
CP2 = "model.context_parallel_size=2"
PP2, PP4 = (f"model.pipeline_model_parallel_size={size}" for size in (2, 4))
VPP2 = "model.virtual_pipeline_model_parallel_size=2"
#: a data-parallel rank has half of the texts: as many micro-batches of fewer
DP2 = "train.micro_batch_size=2"
AT_THE_END = "optimizer.overlap_grad_reduce=false"

#: name → (overrides, how often); what is left over of the world is data parallel
Runs = dict[str, tuple[list[str], int]]
SHORT: Runs = {"pp2_vpp2": ([PP2, VPP2], 2)}
TWO_RANKS: Runs = {"pp2_vpp2": ([PP2, VPP2], 5), "pp2_vpp2_reduced_at_the_end": ([PP2, VPP2, AT_THE_END], 1)}
FOUR_RANKS: Runs = {
    "pp4_vpp2": ([PP4, VPP2], 5),
    "tp2_pp2": ([TP2, PP2], 2),
    "cp2_pp2": ([CP2, PP2], 2),
    "dp2_pp2": ([DP2, PP2], 2),
    "dp2_pp2_vpp2": ([DP2, PP2, VPP2], 2),
    "tp2_pp2_reduced_at_the_end": ([TP2, PP2, AT_THE_END], 1),
    "cp2_pp2_reduced_at_the_end": ([CP2, PP2, AT_THE_END], 1),
    "dp2_pp2_reduced_at_the_end": ([DP2, PP2, AT_THE_END], 1),
}


def many_steps(folder: Path, name: str, *overrides: str) -> Any:
    """The recipe of every run."""
    return recipe(
        folder,
        name,
        f"train.train_iters={STEPS}",
        "train.global_batch_size=24",
        "train.micro_batch_size=3",
        "optimizer.lr=1e-3",
        "optimizer.warmup_iters=2",
        "loss.mode=cached",
        *overrides,
    )


def train_all(folder: str, runs: Runs) -> list[list[int]]:
    """Train; the lengths of this rank's micro-batches, step by step."""
    from megatron_embed.recipes import train
    from megatron_embed.recipes.training import run as training

    seen: list[list[int]] = []
    step = training.contrastive_step

    def recorded(stages: Any, groups: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append([group.tokens.total_tokens for group in groups])
        return step(stages, groups, *args, **kwargs)

    training.contrastive_step = recorded
    for name, (overrides, times) in runs.items():
        for number in range(times):
            train(many_steps(Path(folder), f"{name}-{number}", *overrides))
    return seen


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose 8 stages are uneven and whose Llama-4 scale acts, and texts for one epoch."""
    folder = tmp_path_factory.mktemp("many-steps")
    save_model(folder / "model", num_hidden_layers=9, rope_parameters={"original_max_position_embeddings": 16})
    write_pairs(folder / "train.jsonl", 300, negatives=None)
    return folder


@pytest.fixture(scope="module")
def wanted(inputs: Path) -> list[dict[str, float]]:
    return train_by_the_book(many_steps(inputs, "unused"))


def trained(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's last checkpoint, optimizer state included."""
    return tensors_of(run / "checkpoints" / f"iter_{STEPS:07}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "runs"),
    [
        pytest.param(2, SHORT, id="short"),
        pytest.param(2, TWO_RANKS, id="two-ranks", marks=pytest.mark.exhaustive),
        pytest.param(4, FOUR_RANKS, id="four-ranks", marks=pytest.mark.exhaustive),
    ],
)
def test_many_steps_are_those_of_one_process_and_the_same_every_time(
    tmp_path: Path, inputs: Path, wanted: list[dict[str, float]], world: int, runs: Runs
) -> None:
    for name in ("model", "train.jsonl"):
        (tmp_path / name).symlink_to(inputs / name)
    for seen in run_world(train_all, world, str(tmp_path), runs):
        assert min(map(len, seen)) >= MICRO_BATCHES
        assert min(len(set(lengths)) for lengths in seen) >= SIZES
    failures = []
    for name, (_, times) in runs.items():
        records = [read_metrics(tmp_path / f"{name}-{number}") for number in range(times)]
        for number, found in enumerate(records):
            assert [record["step"] for record in found] == list(range(1, STEPS + 1))
            for record, reference in zip(found, wanted, strict=True):
                failures += [
                    f"{name}, run {number}, step {record['step']}: {key} {record[key]}, wanted {reference[key]}"
                    for key in ("loss", "grad_norm", "learning_rate")
                    if record[key] != pytest.approx(reference[key], rel=TOLERANCE)
                ]
        exact = [[(record["loss"], record["grad_norm"]) for record in found] for found in records]
        tensors = [trained(tmp_path / f"{name}-{number}") for number in range(times)]
        for number in range(1, times):
            if exact[number] != exact[0]:
                failures.append(f"{name}: run {number} reports other numbers than run 0")
            assert tensors[number].keys() == tensors[0].keys()
            other = [key for key, value in tensors[0].items() if not torch.equal(value, tensors[number][key])]
            if other:
                failures.append(f"{name}: run {number} ends with other tensors than run 0: {other[:3]}")
    assert not failures, "\n".join(failures)
