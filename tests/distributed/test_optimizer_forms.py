"""An optimizer's state, saved in one form and loaded in another: the same numbers, bit for bit."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.runs import make_inputs, recipe
from support.worlds import run_world

from megatron_embed.conversion.mcore.folder import iteration_folder

TP2 = "model.tensor_model_parallel_size=2"
#: name → (overrides, where the main parameters are)
FORMS = {
    "distributed_fp32": (["optimizer.distributed=true"], "optimizer.state.param."),
    "plain_fp32": (["optimizer.distributed=false", TP2], ""),
    "distributed_bf16": (["optimizer.distributed=true", "model.precision=bf16", TP2], "optimizer.state.param."),
    "plain_bf16": (["optimizer.distributed=false", "model.precision=bf16"], "optimizer.state.fp32_param."),
}
#: what a run may change when it goes on, and the layout with it
RESUMED = [("distributed_fp32", "plain_fp32"), ("plain_fp32", "distributed_fp32")]
RESUMED += [("distributed_bf16", "plain_bf16"), ("plain_bf16", "distributed_bf16")]


def checkpoint(folder: Path, *names: str) -> Path:
    return iteration_folder(folder / "-".join(names) / "checkpoints", 2)


def temperature(pair: tuple[str, str]) -> str:
    """Learned, which is a parameter group more; but a plain optimizer of 16-bit weights refuses it."""
    return "loss.learn_temperature=" + str("plain_bf16" not in pair).lower()


def save_and_save_again(folder: str, pairs: list[tuple[str, str]]) -> None:
    """Two steps in the first form of each pair; then the checkpoint is loaded in the second and saved at once.

    Another precision is taken with ``checkpoint.load`` only.
    """
    from megatron_embed.recipes import train
    from megatron_embed.recipes.training import run as training

    root = Path(folder)
    short = ["train.train_iters=2", "optimizer.warmup_iters=0"]
    for source, learned in dict.fromkeys((pair[0], temperature(pair)) for pair in pairs):
        train(recipe(root, f"{source}-{learned}", *short, learned, *FORMS[source][0]))
    with mock.patch.object(training.TrainingRun, "loop", lambda run, start: run._save(start.step)):
        for source, name in pairs:
            learned = temperature((source, name))
            load = [f"checkpoint.load={root / f'{source}-{learned}'}", "train.train_iters=3", learned]
            train(recipe(root, f"{source}-{name}", *short, *load, *FORMS[name][0]))


def state(iter_dir: Path, main: str, scratch: Path) -> dict[str, torch.Tensor]:
    """Main parameters, moments, and step counts of a checkpoint under the same names for every form."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(iter_dir, scratch)
    found = {}
    for name, value in torch.load(scratch, weights_only=False).items():
        if name.startswith("optimizer.state.exp_avg"):
            found[name] = value
        elif name.startswith(main) and not (main == "" and name.startswith("optimizer.")):
            found[f"main.{name.removeprefix(main)}"] = value
    optimizer: dict[str, Any] = torch.load(iter_dir / "common.pt", weights_only=True)["optimizer"]
    for index, group in enumerate(optimizer.get("optimizer", optimizer)["param_groups"]):
        found[f"step of group {index}"] = torch.tensor(group["step"])
        found[f"decay of group {index}"] = torch.tensor(group["weight_decay"])
    return found


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, but for the rows by which TP 2 pads an odd vocabulary."""
    rows = min(len(a), len(b)) if a.dim() else 0
    return torch.equal(a[:rows], b[:rows]) if a.dim() else torch.equal(a, b)


def check(folder: Path, pairs: list[tuple[str, str]]) -> None:
    make_inputs(folder)
    run_world(save_and_save_again, 2, str(folder), pairs)
    for source, name in pairs:
        wanted = state(checkpoint(folder, source, temperature((source, name))), FORMS[source][1], folder / "state.pt")
        kinds = {key.partition(".decoder")[0] for key in wanted if ".decoder" in key}
        assert kinds == {"main", "optimizer.state.exp_avg", "optimizer.state.exp_avg_sq"}
        assert wanted["step of group 0"] == 2
        assert all(value.any() for key, value in wanted.items() if key.startswith("optimizer.state"))
        found = state(checkpoint(folder, source, name), FORMS[name][1], folder / "state.pt")
        assert found.keys() == wanted.keys(), (source, name)
        assert [key for key in wanted if not same(found[key], wanted[key])] == [], (source, name)


@pytest.mark.slow
def test_the_state_of_a_plain_and_of_a_distributed_optimizer_load_into_each_other_bit_for_bit(tmp_path: Path) -> None:
    check(tmp_path, RESUMED)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_every_form_of_an_optimizers_state_loads_into_every_other_bit_for_bit(tmp_path: Path) -> None:
    check(tmp_path, list(itertools.product(FORMS, FORMS)))
