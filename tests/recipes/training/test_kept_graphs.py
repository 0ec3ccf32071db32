"""``loss.kept_micro_batches``: the same numbers, bit for bit, from fewer forward passes.

`tests/distributed/test_gradients.py` holds the gradients under every layout against one process.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import make_inputs, read_metrics, recipe
from support.tiny_models import tiny_config

from megatron_embed.bridge import EncoderConfig
from megatron_embed.bridge.encoder import EncoderStage
from megatron_embed.bridge.layout import Layout
from megatron_embed.recipes import train
from megatron_embed.recipes.encoding.micro_batches import BatchingPlan, MicroBatch
from megatron_embed.recipes.planning.activations import Activations, Shape
from megatron_embed.recipes.planning.state import chunks_of
from megatron_embed.recipes.training import kept_count
from megatron_embed.recipes.training.kept_count import KeptCount


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept")
    make_inputs(folder)
    return folder


def run(folder: Path, kept: str, monkeypatch: pytest.MonkeyPatch) -> tuple[list[tuple[float, float]], int]:
    """Train five steps; their losses and gradient norms, and how often the encoder computed a micro-batch."""
    calls = 0
    forward = EncoderStage.forward

    def counted(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return forward(*args)

    monkeypatch.setattr(EncoderStage, "forward", counted)
    cfg = recipe(folder, f"run-{kept}", "train.train_iters=5", "loss.mode=cached", f"loss.kept_micro_batches={kept}")
    train(cfg)
    return [(each["loss"], each["grad_norm"]) for each in read_metrics(folder / f"run-{kept}")], calls


def test_a_run_that_keeps_graphs_is_the_same_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "megatron_embed")
    none, twice = run(folder, "0", monkeypatch)
    assert not any("keeps the graphs" in record.getMessage() for record in caplog.records)
    two, calls = run(folder, "2", monkeypatch)
    assert two == none
    assert calls == twice - 5 * 2
    alone, calls = run(folder, "auto", monkeypatch)
    assert alone == none
    assert twice - calls > 3 * 2, "the last three steps compute every micro-batch once"
    (line,) = [
        r.getMessage() for r in caplog.records if "loss.kept_micro_batches auto: 3 instead of 4" in r.getMessage()
    ]
    assert line.startswith("step 3: keeps the graphs of ")


def micro_batches(count: int) -> list[MicroBatch]:
    plan = BatchingPlan(pad_id=11, packed=True, max_texts=2)
    return plan.split([[5] * (number + 3) for number in range(2 * count)])


def counter(wanted: Any) -> KeptCount:
    config = EncoderConfig.from_hf(tiny_config(num_hidden_layers=3))
    activations = Activations(config, Layout(), "fp32", sequence_parallel=False, device="cpu")
    return KeptCount(wanted, activations, chunks_of(config, Layout(), 0), "none")


def test_a_number_is_kept_as_it_is() -> None:
    groups = micro_batches(5)
    assert [counter(wanted).of(groups) for wanted in (0, 3, 5, 9)] == [0, 3, 5, 5]


def test_auto_keeps_what_fits_into_the_memory_that_the_second_cached_step_left(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, groups = counter("auto"), micro_batches(5)
    sizes = [kept.activations.chunk(kept.chunks[0], Shape.of(group.tokens), "none") for group in groups]
    monkeypatch.setattr(kept_count, "spare_memory", lambda: sum(sizes[:3]) + 1)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_args, **_kwargs: None)
    found = []
    for mode in ("direct", "cached", "direct", "cached"):
        found.append(kept.of(groups))
        kept.close_step(mode)
    assert [*found, kept.of(groups)] == [0, 0, 0, 0, 3]
    assert kept.of(groups[:2]) == 2
