"""Training with Transformer Engine's layers and FusedAdam: the same run as without, and either loads the other's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import tensors_of
from support.one_process import train_by_the_book
from support.runs import make_inputs, read_metrics, recipe, write_pairs
from support.te_worlds import needs_te, run_te_world
from support.tiny_models import save_model
from support.worlds import run_world

from megatron_embed.conversion.mcore.folder import iteration_folder

pytestmark = [needs_te, pytest.mark.slow]

STEPS, HALF, TOLERANCE = 12, 6, 1e-5
CLASSES = {"TERowParallelLinear", "TransformerEngineAttention", "FusedAdam"}
#: name → what differs from one rank with the distributed optimizer
FORMS = {
    "tensor-parallel": ["model.tensor_model_parallel_size=2"],
    "data-parallel": ["optimizer.distributed=true"],
    "plain": ["optimizer.distributed=false", "model.tensor_model_parallel_size=2", "model.recompute=full"],
    "learned-temperature": ["loss.learn_temperature=true", "model.pipeline_model_parallel_size=2"],
    "bf16": ["model.precision=bf16", "model.tensor_model_parallel_size=2"],
}
#: the layers round differently in 16 bits
IN_16_BITS = 5e-2


def train_all(folder: str, side: str, forms: list[str], other: str | None) -> list[tuple[str, set[str]]]:
    """Train each form to its end, or to the end from the middle of the ``other`` side's run; what computed it."""
    from megatron_embed.recipes import train
    from megatron_embed.recipes.training import loop as training

    seen: set[str] = set()
    set_up = training.set_up_training

    def recorded(encoders: Any, *args: Any, **kwargs: Any) -> Any:
        state = set_up(encoders, *args, **kwargs)
        seen.update(type(module).__name__ for encoder in encoders for module in encoder.modules())
        seen.update(type(each.optimizer).__name__ for each in getattr(state.optimizer, "chained_optimizers", []))
        return state

    training.set_up_training = recorded
    root, used = Path(folder), []
    for form in forms:
        options = [*FORMS[form], f"train.train_iters={STEPS}", f"train.save_interval={HALF}"]
        name = f"{form}-{side}"
        if other is not None:
            options.append(f"checkpoint.load={iteration_folder(root / f'{form}-{other}' / 'checkpoints', HALF)}")
            name += f"-after-{other}"
        seen.clear()
        train(recipe(root, name, *options))
        used.append((name, set(seen)))
    return used


def train_te(folder: str, forms: list[str]) -> list[tuple[str, set[str]]]:
    return [*train_all(folder, "te", forms, None), *train_all(folder, "te", forms, "local")]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Weights and moments of a run's last checkpoint."""
    return tensors_of(iteration_folder(run / "checkpoints", STEPS))


def check(folder: Path, forms: list[str]) -> None:
    make_inputs(folder)
    run_world(train_all, 2, str(folder), "local", forms, None)
    for used in run_te_world(train_te, 2, str(folder), forms):
        for name, classes in used:
            assert classes >= CLASSES, name
    run_world(train_all, 2, str(folder), "local", forms, "te")
    for form in forms:
        tolerance = IN_16_BITS if form == "bf16" else TOLERANCE
        wanted, tensors = read_metrics(folder / f"{form}-local"), weights(folder / f"{form}-local")
        for name in (f"{form}-te", f"{form}-te-after-local", f"{form}-local-after-te"):
            found = read_metrics(folder / name)
            assert [record["step"] for record in found] == [record["step"] for record in wanted[-len(found) :]], name
            assert len(found) == (HALF if "after" in name else STEPS)
            for record, reference in zip(found, wanted[-len(found) :], strict=True):
                for key in ("loss_step", "grad_norm", "learning_rate"):
                    assert record[key] == pytest.approx(reference[key], rel=tolerance), (name, record["step"], key)
            ended = weights(folder / name)
            assert ended.keys() == tensors.keys(), name
            for key, tensor in tensors.items():
                difference = (ended[key] - tensor).float().norm()
                assert difference <= tolerance * tensor.float().norm(), (name, key)


def test_a_run_with_it_is_that_of_one_process(tmp_path: Path) -> None:
    save_model(tmp_path / "model", num_hidden_layers=3)
    write_pairs(tmp_path / "train.jsonl", 200, negatives=None)
    wanted = train_by_the_book(recipe(tmp_path, "unused", f"train.train_iters={STEPS}").resolved())
    used = run_te_world(train_all, 2, str(tmp_path), "te", ["tensor-parallel"], None)
    assert all(classes >= CLASSES for ((_, classes),) in used)
    found = read_metrics(tmp_path / "tensor-parallel-te")
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    for record, reference in zip(found, wanted, strict=True):
        for key in ("loss", "grad_norm", "learning_rate"):
            assert record[key] == pytest.approx(reference[key], rel=TOLERANCE), (record["step"], key)


@pytest.mark.exhaustive
def test_runs_of_every_form_are_the_same_with_it_and_go_on_from_and_without_it(tmp_path: Path) -> None:
    check(tmp_path, list(FORMS))


@pytest.mark.exhaustive
def test_a_process_on_a_cpu_trains_beside_it(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    (((_, classes),),) = run_te_world(train_all, 1, str(tmp_path), "local", ["data-parallel"], None, on_gpu=False)
    assert classes >= {"CpuAttention", "FusedAdamW"}
