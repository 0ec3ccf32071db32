"""Whether a run fits into the device that it finds."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_embed.recipes import RECIPES, SIZES
from megatron_embed.recipes.planning.layouts import GIB, plan_layout
from megatron_embed.recipes.planning.model_sizes import encoder_of
from megatron_embed.recipes.training import device_memory


@pytest.mark.parametrize("name", [name for name in RECIPES if "tiny" not in name])
def test_every_recipe_leaves_eight_percent_of_eighty_gigabytes(name: str) -> None:
    cfg = RECIPES[name]()
    plan = plan_layout(cfg, encoder_of(cfg, SIZES), 8)[cfg.model.recompute]
    assert plan.total <= 0.92 * 80 * GIB


@pytest.mark.parametrize(("gib", "warned"), [(80, False), (40, True)])
def test_a_run_that_does_not_fit_is_warned_of_before_it_starts(
    gib: int, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg: Any = RECIPES["ministral3_8b_embed_config"]()
    monkeypatch.setattr(device_memory, "device_memory", lambda: gib * GIB)
    monkeypatch.setattr(device_memory.host, "cuda_is_hidden", lambda: False)
    said = device_memory.too_large(cfg, encoder_of(cfg, SIZES), 8)
    if not warned:
        assert said is None
        return
    assert said is not None
    assert said.startswith("a rank needs about 53.7 GiB with every text at its greatest length, and this GPU has 40.0")
    assert "recipes.plan ministral3_8b_embed_config --world-size 8 --gpu-memory 40" in said


def test_training_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Any) -> None:
    from support.runs import make_inputs, recipe

    from megatron_embed.recipes import train

    make_inputs(tmp_path)
    monkeypatch.setattr(device_memory, "device_memory", lambda: 1 << 20)
    train(recipe(tmp_path, "run", "train.train_iters=1"))
    (line,) = [record for record in caplog.records if "it may run out of memory" in record.getMessage()]
    assert line.levelname == "WARNING"
