"""Going on with a run: with the same recipe, in the same data, for as many steps as there are to come."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from support.runs import make_inputs, read_metrics, recipe

from megatron_embed.bridge.cpu import host
from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.mcore.folder import iteration_folder, write_tracker
from megatron_embed.conversion.mcore.statements import read_run_config
from megatron_embed.recipes.retrieval.writer_lock import LOCK
from megatron_embed.recipes.train import main
from megatron_embed.recipes.training import loop
from megatron_embed.recipes.training.loop import TrainingRun, train

pytestmark = pytest.mark.slow

EXACT = ("step", "loss", "grad_norm", "learning_rate", "consumed_samples", "tokens")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    host.run_on_cpu()
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    train(recipe(folder, "two", "train.train_iters=2"))
    return folder


@pytest.fixture
def folder(inputs: Path, tmp_path: Path) -> Path:
    """A model, data, and ``run``: a run of two steps, all its own."""
    shutil.copytree(inputs / "model", tmp_path / "model")
    shutil.copy2(inputs / "train.jsonl", tmp_path)
    shutil.copytree(inputs / "two", tmp_path / "run")
    for sums in (tmp_path / "run").rglob("checksums.json"):
        sums.unlink()  # what follows is changed on purpose
    for config in (tmp_path / "run").rglob("run_config.yaml"):
        config.write_text(config.read_text().replace(str(inputs), str(tmp_path)))
    return tmp_path


def run(folder: Path, *overrides: str) -> list[int]:
    """Train; the steps that metrics.jsonl then tells of."""
    train(recipe(folder, "run", *overrides))
    return [record["step"] for record in read_metrics(folder / "run")]


def numbers(folder: Path) -> list[list[float]]:
    return [[record[key] for key in EXACT] for record in read_metrics(folder)]


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Everything in a folder, with the time of its last change."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in [folder, *folder.rglob("*")]
    }


# ---- what must be the same


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.pooling=last", "model.pooling: 'avg' before, 'last' now"),
        ("model.normalize=false", "model.normalize: True before, False now"),
        ("model.precision=bf16", "model.precision: 'fp32' before, 'bf16' now"),
        ("model.hf_model={folder}/other", "model.hf_model: '{folder}/model' before, '{folder}/other' now"),
        ("data.train={folder}/other.jsonl", "{folder}/other.jsonl"),
        ("data.negatives_per_query=1", "data.negatives_per_query: 4 before, 1 now"),
        ("optimizer.lr=2e-4", "optimizer.lr: 0.0001 before, 0.0002 now"),
        ("optimizer.warmup_iters=1", "optimizer.warmup_iters: 0 before, 1 now"),
        ("train.seed=1", "train.seed: 42 before, 1 now"),
        ("train.global_batch_size=4", "train.global_batch_size: 8 before, 4 now"),
        ("loss.temperature=0.5", "loss.temperature: 0.02 before, 0.5 now"),
    ],
)
def test_a_run_with_another_key_is_refused_by_its_name_and_left_alone(
    folder: Path, override: str, message: str
) -> None:
    shutil.copytree(folder / "model", folder / "other")
    shutil.copy(folder / "train.jsonl", folder / "other.jsonl")
    before = snapshot(folder / "run")
    with pytest.raises(UserError, match="holds a checkpoint of a different run") as error:
        run(folder, "train.train_iters=3", override.format(folder=folder))
    assert message.format(folder=folder) in str(error.value)
    assert str(error.value).count(" now") == 1
    assert snapshot(folder / "run") == before


def test_the_checkpoint_says_what_it_was_trained_with_not_the_folder(folder: Path) -> None:
    """The folder's file may be of a run that was killed before its first save, written by an earlier version."""
    path = folder / "run" / "run_config.yaml"
    path.write_text(path.read_text().replace("temperature: 0.02", "temperature: 0.5"))
    with pytest.raises(UserError, match=r"loss.temperature: 0\.02 before, 0\.5 now"):
        run(folder, "train.train_iters=3", "loss.temperature=0.5")
    path.unlink()
    assert run(folder, "train.train_iters=3") == [1, 2, 3]
    assert "temperature: 0.02" in path.read_text()


def test_a_relative_and_an_absolute_path_to_one_file_are_equal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "link.jsonl").symlink_to("train.jsonl")
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder)
    assert run(folder, "train.train_iters=3", "model.hf_model=model", "data.train=train.jsonl")[-1] == 3
    monkeypatch.chdir(folder / "elsewhere")  # what was relative before still means the same
    assert run(folder, "train.train_iters=4", f"data.train={folder}/link.jsonl")[-1] == 4
    shutil.copy(folder / "train.jsonl", folder / "elsewhere" / "other.jsonl")
    with pytest.raises(UserError, match=r"train.jsonl.* before, .*other.jsonl.* now"):
        run(folder, "train.train_iters=5", "data.train=other.jsonl")


def test_a_model_of_the_hub_keeps_its_name() -> None:
    from megatron_embed.recipes.training.resume import _real

    assert _real("mistralai/Ministral-3-8B-Base-2512", Path.cwd()) == "mistralai/Ministral-3-8B-Base-2512"
    assert _real("hf://org/name", Path.cwd()) == "hf://org/name"


def test_derived_values_are_not_compared_where_nobody_gave_them(folder: Path) -> None:
    """``warmup_iters`` was 0, a tenth of 2; given as 0 it is the same, too."""
    iter_dir = iteration_folder(folder / "run" / "checkpoints", 2)
    assert read_run_config(iter_dir)["optimizer"]["warmup_iters"] is None
    assert read_run_config(iter_dir)["model"]["sequence_parallel"] is None
    assert run(folder, "train.train_iters=3", "optimizer.warmup_iters=0")[-1] == 3
    with pytest.raises(UserError, match=r"optimizer.warmup_iters: 0 before, 3 now"):  # 0 was given, 3 is derived
        run(folder, "train.train_iters=30")


def test_a_checkpoint_of_an_earlier_version_goes_on(folder: Path) -> None:
    """It holds derived values as if they had been given, and not where relative paths start."""
    path = iteration_folder(folder / "run" / "checkpoints", 2) / "run_config.yaml"
    values = yaml.safe_load(path.read_text())
    del values["directory"]
    values["optimizer"]["warmup_iters"] = 0
    values["model"]["sequence_parallel"] = False
    path.write_text(yaml.safe_dump(values))
    assert run(folder, "train.train_iters=10", "train.save_interval=10")[-1] == 10
    assert read_metrics(folder / "run")[2]["learning_rate"] == 1e-4 * (1 - 1 / 9)


def test_a_checkpoint_that_does_not_say_what_it_was_trained_with_is_named(folder: Path) -> None:
    iter_dir = iteration_folder(folder / "run" / "checkpoints", 2)
    (iter_dir / "run_config.yaml").write_text("train: {")
    with pytest.raises(
        UserError, match=r"iter_0000002/run_config.yaml: is missing, damaged, or not that of a training run"
    ) as error:
        run(folder, "train.train_iters=3")
    ways = [word for word in str(error.value).split() if word.startswith("checkpoint.")]
    assert run(folder, "train.train_iters=3", *ways) == [1, 2, 3]


def test_weights_without_a_run_are_named(folder: Path) -> None:
    common = iteration_folder(folder / "run" / "checkpoints", 2) / "common.pt"
    values = torch.load(common, weights_only=True)
    del values["consumed_samples"]
    torch.save(values, common)
    with pytest.raises(UserError, match="iter_0000002: holds weights only, no training run to continue; start from"):
        run(folder, "train.train_iters=3")


def test_a_run_whose_data_changed_does_not_go_on_by_itself(folder: Path) -> None:
    data = folder / "train.jsonl"
    os.utime(data)  # the same bytes, copied anew
    assert run(folder, "train.train_iters=3")[-1] == 3
    before = data.read_bytes()
    with data.open("a") as file:
        file.write(json.dumps({"query": "one", "positive": "more"}) + "\n")
    there = snapshot(folder / "run")
    for path in (data, data.parent / "model" / ".." / "train.jsonl"):  # however it is named
        with pytest.raises(UserError, match=r"train.jsonl had 200 examples in [\d,]+ bytes, now 201 in") as error:
            run(folder, "train.train_iters=4", f"data.train={path}")
    assert snapshot(folder / "run") == there
    ways = [word.strip(",;") for word in str(error.value).split() if word.startswith("checkpoint.")]
    assert run(folder, "train.train_iters=4", *ways[1:]) == [1, 2, 3, 4]  # in the new order, as the message says
    data.write_bytes(before)
    with pytest.raises(UserError, match=r"train.jsonl had 201 examples"):  # what the last checkpoint was trained on
        run(folder, "train.train_iters=5")


# ---- how long


def rate(step: int, iters: int) -> float:
    """The learning rate of a step (from 1): up to 1e-4 in a tenth of the steps, then down to 0, each linearly."""
    done, warmup = step - 1, iters // 10
    return 1e-4 * float(done) / float(warmup) if done <= warmup else 1e-4 * (1.0 - (done - warmup) / (iters - warmup))


@pytest.mark.parametrize("first", [20, 13])
def test_a_longer_run_goes_on_with_the_schedule_of_its_length_and_says_so(
    inputs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, first: int
) -> None:
    """20 steps, then 60: bit for bit the run of 60 steps whose first 20 had the rates of a run of 20.

    And so where the run of 20 was stopped after 13.
    """
    overrides = [f"train.save_dir={tmp_path / 'run'}", "train.save_interval=13"]
    train(recipe(inputs, "run", *overrides))
    if first == 13:
        shutil.rmtree(iteration_folder(tmp_path / "run" / "checkpoints", 20))
        (tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("13\n")
    caplog.set_level(logging.INFO, "megatron_embed")
    train(recipe(inputs, "run", *overrides, "train.train_iters=60"))
    (told,) = [line for line in caplog.messages if "train.train_iters" in line]
    assert told.strip("\r ") == (
        f"train.train_iters: 20 before, 60 now; from step {first + 1} on the learning rate is that of a run of 60 "
        f"steps (optimizer.warmup_iters 6)"
    )
    rates = [rate(step, 20 if step <= first else 60) for step in range(1, 61)]
    assert [record["learning_rate"] for record in read_metrics(tmp_path / "run")] == rates
    with mock.patch.object(OptimizerParamScheduler, "get_lr", lambda self, group: [*rates, 0.0][self.num_steps]):
        train(recipe(inputs, "oracle", f"train.save_dir={tmp_path / 'oracle'}", "train.train_iters=60"))
    assert numbers(tmp_path / "run") == numbers(tmp_path / "oracle")


@pytest.mark.parametrize("iters", [1, 2])
def test_a_run_that_has_its_steps_says_so_and_touches_nothing(
    folder: Path, capfd: pytest.CaptureFixture[str], iters: int
) -> None:
    before = snapshot(folder)
    cfg = recipe(folder, "run")
    overrides = [f"model.hf_model={cfg.model.hf_model}", f"train.save_dir={cfg.train.save_dir}", "device=cpu"]
    (folder / "cfg.yaml").write_text(yaml.safe_dump(cfg.to_dict()))
    with pytest.raises(SystemExit) as ended:
        main(["--config", str(folder / "cfg.yaml"), *overrides, f"train.train_iters={iters}"])
    (folder / "cfg.yaml").unlink()
    assert ended.value.code == 0
    newest = iteration_folder(folder / "run" / "checkpoints", 2)
    said = capfd.readouterr()
    wanted = f"nothing to do: {newest} has 2 steps, train.train_iters is {iters}; a larger one goes on\n"
    assert said.out + said.err == wanted
    after = snapshot(folder)
    assert {name: after[name] for name in after if name != "."} == {
        name: before[name] for name in before if name != "."
    }


def test_eight_and_twelve_steps_are_twenty_bit_for_bit(inputs: Path, tmp_path: Path) -> None:
    """Stopped by the number of steps alone: the schedule is given, so that it is the same."""
    same = ["optimizer.warmup_iters=3", "optimizer.lr_decay_style=cosine"]
    train(recipe(inputs, "whole", f"train.save_dir={tmp_path / 'whole'}", *same, "train.save_interval=8"))
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    root = tmp_path / "parts" / "checkpoints"
    for later in (16, 20):
        shutil.rmtree(iteration_folder(root, later))
    (root / "latest_checkpointed_iteration.txt").write_text("8\n")
    train(recipe(inputs, "parts", f"train.save_dir={tmp_path / 'parts'}", *same))
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")


# ---- another run's checkpoint


def test_another_runs_checkpoint_is_loaded_whatever_its_recipe(folder: Path) -> None:
    """At another batch size the position in the data stays; from then on the new run is compared with itself."""
    given = ["train.global_batch_size=4", "optimizer.lr=3e-4", "loss.temperature=0.05", "train.save_dir={folder}/new"]
    given = [text.format(folder=folder) for text in given]
    train(recipe(folder, "new", *given, f"checkpoint.load={folder / 'run'}", "train.train_iters=5"))
    records = read_metrics(folder / "new")
    assert [record["step"] for record in records] == [5]
    assert records[0]["consumed_samples"] == 20
    assert records[0]["learning_rate"] == 3e-4 * (1 - 4 / 5)
    train(recipe(folder, "new", *given, f"checkpoint.load={folder / 'run'}", "train.train_iters=6"))
    assert [record["step"] for record in read_metrics(folder / "new")] == [5, 6]
    with pytest.raises(UserError, match=r"loss.temperature: 0\.05 before, 0\.02 now"):
        train(recipe(folder, "new", *given[:2], *given[3:], f"checkpoint.load={folder / 'run'}"))
    with pytest.raises(
        UserError, match=r"16 samples were trained on, which is no multiple of train.global_batch_size 6"
    ):
        train(recipe(folder, "third", f"checkpoint.load={folder / 'run'}", "train.global_batch_size=6"))
    assert not (folder / "third").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 2}, "num_hidden_layers is 2, but the checkpoint's model has 3"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "rope_parameters is "),  # the same shapes: it was loaded
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_the_field(
    folder: Path, change: dict[str, Any], message: str
) -> None:
    (folder / "made").mkdir()
    make_inputs(folder / "made", **change)
    other = folder / "made" / "model"
    new = [f"model.hf_model={other}", f"checkpoint.load={folder / 'run'}", "train.train_iters=3"]
    with pytest.raises(UserError, match=message) as error:
        train(recipe(folder, "new", *new))
    assert f"in {folder / 'run' / 'checkpoints' / 'iter_0000002'}, from which the run would go on" in str(error.value)
    assert not (folder / "new").exists()


def test_going_back_to_an_earlier_checkpoint_of_the_run_puts_the_later_ones_aside(folder: Path) -> None:
    assert run(folder, "train.train_iters=4", "train.save_interval=1") == [1, 2, 3, 4]
    checkpoints = folder / "run" / "checkpoints"
    kept = snapshot(iteration_folder(checkpoints, 4))
    back = [f"checkpoint.load={iteration_folder(checkpoints, 2)}", "checkpoint.resume=false"]
    assert run(folder, "train.train_iters=3", *back, "optimizer.lr=1e-3") == [1, 2, 3]
    assert sorted(path.name for path in checkpoints.glob("iter_*")) == ["iter_0000002", "iter_0000003"]
    aside = folder / "run" / "replaced-1" / "checkpoints"
    assert sorted(path.name for path in aside.iterdir()) == ["iter_0000003", "iter_0000004"]
    assert snapshot(iteration_folder(aside, 4)) == kept


def test_a_checkpoint_that_no_tracker_names_yet_is_gone_on_from(folder: Path) -> None:
    """The run was killed at its first save, between the checkpoint's name and the tracker."""
    checkpoints = folder / "run" / "checkpoints"
    (checkpoints / "latest_checkpointed_iteration.txt").unlink()
    assert run(folder, "train.train_iters=3", f"checkpoint.load={iteration_folder(checkpoints, 2)}") == [1, 2, 3]


def test_a_missing_tracker_is_damage_and_no_reason_to_start_over(folder: Path) -> None:
    tracker = folder / "run" / "checkpoints" / "latest_checkpointed_iteration.txt"
    tracker.unlink()  # as after a first save that was ended before it wrote this
    assert run(folder, "train.train_iters=3") == [1, 2, 3]
    tracker.unlink()
    before = snapshot(folder / "run")
    with pytest.raises(UserError, match=f"no {tracker.name} in it .found iter_0000002, iter_0000003") as error:
        run(folder, "train.train_iters=4")
    assert f"write 3 into {tracker}; the newest sound checkpoint before it is {tracker.parent}" in str(error.value)
    assert snapshot(folder / "run") == before
    assert run(folder, "train.train_iters=4", "checkpoint.allow_fallback=true") == [1, 2, 3, 4]
    assert tracker.read_text() == "4\n"
    tracker.unlink()
    tracker.write_text("4")  # what the message says
    assert run(folder, "train.train_iters=5") == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("key", ["load", "pretrained_checkpoint"])
def test_a_run_does_not_take_the_place_of_what_it_reads(folder: Path, key: str) -> None:
    before = snapshot(folder / "run")
    other = [f"checkpoint.{key}={folder / 'run'}", "checkpoint.resume=false", "train.global_batch_size=4"]
    with pytest.raises(UserError, match=f"checkpoint.{key}: .*/run is in the run's own train.save_dir"):
        run(folder, *other)
    assert snapshot(folder / "run") == before


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("inside", ["latest_checkpointed_iteration.txt", "iter_0000002", "iter_0000002/.metadata"])
def test_a_checkpoint_folder_is_no_folder_for_a_run(folder: Path, inside: str, pretrained: bool) -> None:
    """Export, by the name of the run's folder, would find the old weights there."""
    checkpoint = folder / "run" / "checkpoints"
    if inside == "iter_0000002":
        (checkpoint / "latest_checkpointed_iteration.txt").unlink()
    save_dir = (checkpoint / inside).parent
    before = snapshot(folder)
    start_from = [f"checkpoint.pretrained_checkpoint={folder / 'run'}"] if pretrained and "iter" not in inside else []
    with pytest.raises(UserError, match=rf"train\.save_dir: {save_dir} is itself a Megatron checkpoint"):
        train(recipe(folder, "run", f"train.save_dir={save_dir}", *start_from))
    assert snapshot(folder) == before


# ---- two runs at once


def test_two_runs_never_train_into_one_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is refused before it loads a weight, or, if both were loading, before it writes."""
    lock, set_up = folder / "run" / LOCK, loop._set_up
    message = r"/run: is being written by process 4711 on node7, since now; wait until it ends, or name another"

    def hold() -> int:
        file = os.open(lock, os.O_CREAT | os.O_RDWR)
        fcntl.flock(file, fcntl.LOCK_EX)
        os.write(file, json.dumps({"host": "node7", "pid": 4711, "since": "now"}).encode())
        return file

    def first(action: Callable[[], Any]) -> None:
        monkeypatch.setattr(loop, "_set_up", lambda *given: (action(), set_up(*given))[1])

    first(lambda: pytest.fail("the model is being loaded"))
    held = [hold()]
    before = snapshot(folder / "run")
    with pytest.raises(UserError, match=message):
        run(folder, "train.train_iters=3")
    assert snapshot(folder / "run") == before
    os.close(held.pop())  # as the kernel does for a dead run; its file is still there
    lock.unlink()
    first(lambda: held.append(hold()))
    with pytest.raises(UserError, match=message):
        run(folder, "train.train_iters=3")
    os.close(held.pop())
    checkpoints = folder / "run" / "checkpoints"
    first(lambda: save_another(checkpoints))
    message = r"/run: another run has saved \S+/iter_0000003 while this one was loading \S+/iter_0000002; start"
    with pytest.raises(UserError, match=message):
        run(folder, "train.train_iters=4")
    assert not lock.exists()
    shutil.rmtree(iteration_folder(checkpoints, 3))
    write_tracker(checkpoints, 2)
    monkeypatch.setattr(loop, "_set_up", set_up)
    lock.write_text("left behind by a run that was killed")
    assert run(folder, "train.train_iters=3") == [1, 2, 3]
    assert not lock.exists()


def save_another(checkpoints: Path) -> None:
    """Save step 3 as another run would, with the samples of three steps."""
    later = iteration_folder(checkpoints, 3)
    shutil.copytree(iteration_folder(checkpoints, 2), later)
    common = torch.load(later / "common.pt", weights_only=True)
    torch.save({**common, "consumed_samples": 24}, later / "common.pt")
    write_tracker(checkpoints, 3)


# ---- the optimizer's form


def test_the_optimizer_may_be_distributed_or_not_when_a_run_goes_on(inputs: Path, tmp_path: Path) -> None:
    """On one rank, without clipping, either does the same arithmetic: all losses are equal bit for bit."""
    given = ["optimizer.clip_grad=0", "optimizer.warmup_iters=2"]

    def go_on(name: str, first: str, then: str) -> list[float]:
        where = f"train.save_dir={tmp_path / name}"
        train(recipe(inputs, name, where, *given, "train.train_iters=6", f"optimizer.distributed={first}"))
        assert form(tmp_path / name, 6) == first
        overlap = "optimizer.overlap_grad_reduce=false"
        train(recipe(inputs, name, where, *given, "train.train_iters=12", f"optimizer.distributed={then}", overlap))
        assert form(tmp_path / name, 12) == then
        return [record["loss"] for record in read_metrics(tmp_path / name)]

    wanted = go_on("same", "true", "true")
    assert go_on("to_plain", "true", "false") == wanted
    assert go_on("to_distributed", "false", "true") == wanted


def form(folder: Path, step: int) -> str:
    """What ``optimizer.distributed`` was when a checkpoint was written."""
    common = torch.load(iteration_folder(folder / "checkpoints", step) / "common.pt", weights_only=True)
    return str("param_state_sharding_type" in common["optimizer"]).lower()


@pytest.mark.parametrize("distributed", ["true", "false"])
def test_a_run_that_has_made_no_update_yet_is_saved_and_goes_on(
    inputs: Path, tmp_path: Path, distributed: str, caplog: pytest.LogCaptureFixture
) -> None:
    """fp16, whose first updates are skipped while the loss scale finds its place."""
    given = [f"train.save_dir={tmp_path / 'run'}", "model.precision=fp16", f"optimizer.distributed={distributed}"]
    train(recipe(inputs, "run", *given, "train.train_iters=1"))
    train(recipe(inputs, "run", *given, "train.train_iters=2"))
    first, second = read_metrics(tmp_path / "run")
    assert caplog.text.count("1 of 1 updates were skipped: gradients overflowed fp16") == 2
    assert first["grad_norm"] is None  # else this tests nothing
    assert second["grad_norm"] is None
    assert second["step"] == 2


def test_a_foreign_line_of_the_metrics_ends_a_run_before_its_first_step(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = f"train.save_dir={tmp_path / 'run'}"
    train(recipe(inputs, "run", where, "train.train_iters=1"))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"foo": 1}\n')
    monkeypatch.setattr(TrainingRun, "loop", None)
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2: found .*, wanted an object"):
        train(recipe(inputs, "run", where, "train.train_iters=2"))
