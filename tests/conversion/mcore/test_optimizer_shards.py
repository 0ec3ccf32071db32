"""The distributed optimizer's state in a checkpoint: every rank saves and loads the values that it owns.

`tests/distributed/test_optimizer_forms.py` and the tests of resuming hold the numbers, under other layouts and forms.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import tiny_config
from support.worlds import run_world

from megatron_embed.bridge import EncoderConfig
from megatron_embed.bridge.layout import Layout
from megatron_embed.bridge.parallel import parallel_world
from megatron_embed.conversion.mcore.optimizer_shards import boxes


@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=4), data=st.data())
def test_boxes_are_the_range_in_its_order(shape: list[int], data: st.DataObject) -> None:
    whole = torch.arange(math.prod(shape)).view(shape)
    start = data.draw(st.integers(0, whole.numel()))
    end = data.draw(st.integers(start, whole.numel()))
    found = list(boxes(tuple(shape), start, end))
    parts = [whole[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))] for box in found]
    assert torch.cat([part.flatten() for part in parts] or [torch.empty(0, dtype=torch.long)]).tolist() == list(
        range(start, end)
    )
    assert len(found) <= 2 * len(shape) - 1


def save_and_load(folder: str) -> Any:
    """Save and load a state; the bytes that the rank states, those that it owns, whether the moments are equal."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from megatron_embed.bridge.encoder import build_stages, transformer_config
    from megatron_embed.conversion.mcore import model_state
    from megatron_embed.recipes.config.schema import OptimizerSection
    from megatron_embed.recipes.training.optimizer import set_up_training

    def gathered(*_: Any, **__: Any) -> Any:
        raise AssertionError("a rank collects what others own")

    DistributedOptimizer.get_parameter_state_dp_zero = gathered
    config = EncoderConfig.from_hf(tiny_config(num_hidden_layers=3))
    layout = Layout()
    with parallel_world(layout):
        stages = build_stages(config, transformer_config(config, layout, dtype=torch.bfloat16))
        for stage in stages:
            for parameter in stage.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
        optimizer = set_up_training(stages, OptimizerSection(), train_iters=3).optimizer
        (each,) = optimizer.chained_optimizers
        model_state._make_moments(optimizer)
        generator = torch.Generator().manual_seed(torch.distributed.get_rank())
        states = list(each.optimizer.state.values())
        for state in states:
            for name in ("exp_avg", "exp_avg_sq"):
                state[name].copy_(torch.randn(state[name].shape, generator=generator))
        before = [value.clone() for state in states for value in (state["exp_avg"], state["exp_avg_sq"])]
        own = sum(3 * state["exp_avg"].nbytes for state in states)
        stated = []
        sharded = DistributedOptimizer.sharded_state_dict

        def recorded(*args: Any, **kwargs: Any) -> Any:
            found = sharded(*args, **kwargs)
            pieces = nested_values(found["param_state"])
            stated.append(sum(math.prod(piece.local_shape) * piece.dtype.itemsize for piece in pieces))
            return found

        DistributedOptimizer.sharded_state_dict = recorded
        path = model_state.save_model_state(Path(folder), 1, stages, optimizer=optimizer)
        for state in states:
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()
        model_state.load_model_state(path, stages, optimizer=optimizer)
        after = [value for state in states for value in (state["exp_avg"], state["exp_avg_sq"])]
        return stated, own, all(map(torch.equal, before, after)), sum(p.numel() for p in stages[0].parameters())


@pytest.mark.slow
def test_a_rank_saves_and_loads_what_it_owns_and_nothing_else(tmp_path: Path) -> None:
    results = run_world(save_and_load, 2, str(tmp_path))
    for stated, own, equal, _ in results:
        assert stated == [own, own], "at the save and at the load"
        assert equal
    assert sum(own for _, own, _, _ in results) == 12 * results[0][3]
