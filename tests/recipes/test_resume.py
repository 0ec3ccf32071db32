"""Going on with a run: not in other data than it began with."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support.runs import make_inputs, read_metrics, recipe

from megatron_embed.bridge import host
from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes.training import train


def run(folder: Path, *overrides: str) -> list[int]:
    """Train; the steps that metrics.jsonl then tells of."""
    train(recipe(folder, "run", "train.save_interval=2", *overrides))
    return [record["step"] for record in read_metrics(folder / "run")]


def test_a_run_whose_data_changed_does_not_go_on_by_itself(tmp_path: Path) -> None:
    host.run_on_cpu()
    make_inputs(tmp_path)
    data = tmp_path / "train.jsonl"
    assert run(tmp_path, "train.train_iters=2") == [1, 2]
    os.utime(data)  # the same bytes, copied anew
    assert run(tmp_path, "train.train_iters=3")[-1] == 3
    before = data.read_bytes()
    with data.open("a") as file:
        file.write(json.dumps({"query": "one", "positive": "more"}) + "\n")
    checkpoints = tmp_path / "run" / "checkpoints"
    there = sorted(checkpoints.rglob("*"))
    with pytest.raises(UserError, match=r"train.jsonl had 200 examples in [\d,]+ bytes, now 201 in") as error:
        run(tmp_path, "train.train_iters=4")
    assert sorted(checkpoints.rglob("*")) == there
    ways = [word.strip(",;") for word in str(error.value).split() if word.startswith("checkpoint.")]
    assert run(tmp_path, "train.train_iters=4", *ways[1:])[-1] == 4  # in the new order, as the message says
    data.write_bytes(before)
    with pytest.raises(UserError, match=r"train.jsonl had 201 examples"):  # what the last checkpoint was trained on
        run(tmp_path, "train.train_iters=5")
