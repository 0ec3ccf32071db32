"""Batches that are prepared in the background are those that a step would have read itself, and so are their errors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from support.runs import make_inputs, read_metrics, recipe

from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes.report import read_run, write_report
from megatron_embed.recipes.training import run as training
from megatron_embed.recipes.training.loop import train
from megatron_embed.recipes.training.rank_batch import BatchBuilder, RankBatch
from megatron_embed.recipes.training.read_ahead import ReadAhead

EXACT = ("step", "loss", "grad_norm", "learning_rate", "consumed_samples", "tokens")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


class AtOnce:
    """Prepares each step when it is wanted, in the step's own thread."""

    def __init__(self, prepare: Callable[[int], Any], steps: Iterable[int]) -> None:
        self.prepare, self.steps = prepare, iter(steps)

    def __enter__(self) -> AtOnce:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def take(self) -> Any:
        return self.prepare(next(self.steps))

    def paused(self) -> AtOnce:
        return self


def own_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def run(folder: Path, name: str, *overrides: str) -> list[list[float]]:
    train(recipe(folder, name, "device=cpu", *overrides))
    return [[record[key] for key in EXACT] for record in read_metrics(folder / name)]


def failing_from(first: int) -> Callable[[BatchBuilder, int], RankBatch]:
    """A builder that cannot read the batches from this one on (from 0)."""
    build = BatchBuilder.build

    def fail(self: BatchBuilder, step: int) -> RankBatch:
        if step >= first:
            raise UserError("train.jsonl, line 77: cannot be read")
        return build(self, step)

    return fail


def test_steps_come_in_their_order_and_at_most_two_are_ahead() -> None:
    prepared: list[int] = []
    taken = threading.Semaphore(0)

    def prepare(step: int) -> str:
        assert threading.current_thread() is not threading.main_thread()
        prepared.append(step)
        taken.release()
        return f"step {step}"

    with ReadAhead(prepare, range(3, 40)) as ahead:
        for step in range(3, 40):
            assert ahead.take() == f"step {step}"
            assert taken.acquire(timeout=60)
            assert max(prepared) <= step + 2
    assert prepared == [*range(3, 40)]


@pytest.mark.parametrize("end", ["all taken", "some left", "an error in the step", "an error in the background"])
def test_no_thread_stays_behind(end: str) -> None:
    before = threading.enumerate()

    def prepare(step: int) -> int:
        if end == "an error in the background" and step == 2:
            raise UserError("row 2")
        return step

    def steps() -> None:
        with ReadAhead(prepare, range(5)) as ahead:
            for step in range(3 if end == "some left" else 5):
                assert ahead.take() == step
                if end == "an error in the step" and step == 1:
                    raise UserError("step 1")

    if end.startswith("an error"):
        with pytest.raises(UserError, match="row 2" if end.endswith("background") else "step 1"):
            steps()
    else:
        steps()
    assert threading.enumerate() == before


def test_an_error_is_that_of_its_own_step_and_those_before_are_had() -> None:
    def prepare(step: int) -> int:
        if step == 3:
            raise UserError("a.jsonl, line 3: gone")
        return step

    with ReadAhead(prepare, range(9)) as ahead:
        assert [ahead.take() for _ in range(3)] == [0, 1, 2]
        with pytest.raises(UserError, match=r"^a.jsonl, line 3: gone$"):
            ahead.take()


def test_nothing_is_prepared_while_it_is_paused() -> None:
    prepared: list[int] = []
    with ReadAhead(lambda step: prepared.append(step), range(9)) as ahead:
        with ahead.paused():
            before = [*prepared]
            taker = threading.Thread(target=lambda: [ahead.take() for _ in range(len(before) + 1)])
            taker.start()
            taker.join(0.2)
            assert taker.is_alive()
            assert prepared == before
        taker.join(60)
        assert not taker.is_alive()


@pytest.mark.slow
def test_training_is_the_same_with_and_without_and_goes_on_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ("train.train_iters=6", "train.save_interval=3", "train.global_batch_size=4")
    ahead = run(folder, "ahead", *overrides)
    with monkeypatch.context() as patch:
        patch.setattr(BatchBuilder, "build", failing_from(3))
        with pytest.raises(UserError, match="cannot be read"):
            run(folder, "again", *overrides)
    again = run(folder, "again", *overrides)  # goes on from the checkpoint of step 3
    assert not own_threads()
    monkeypatch.setattr(training, "ReadAhead", AtOnce)
    at_once = run(folder, "at-once", *overrides)
    assert ahead == at_once
    assert again == at_once
    for record in read_metrics(folder / "ahead"):
        assert 0 <= record["data_seconds"] <= record["step_seconds"]
    page = write_report(folder / "report.html", [read_run(folder / "ahead")]).read_text()
    assert "waited for data (median)" in page


def test_what_is_wrong_with_a_row_ends_its_step_and_no_earlier_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BatchBuilder, "build", failing_from(3))
    with pytest.raises(UserError, match=r"^train.jsonl, line 77: cannot be read$"):
        run(folder, "fails", "train.train_iters=6")
    assert [record["step"] for record in read_metrics(folder / "fails")] == [1, 2, 3]
    assert not own_threads()
