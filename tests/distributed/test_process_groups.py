"""Process groups end with their layout: a process has as many threads after a world as before it."""

from __future__ import annotations

import gc
import os
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from support.runs import make_inputs, recipe
from support.tiny_models import tiny_config
from support.worlds import run_world

from megatron_embed.bridge import EncoderConfig
from megatron_embed.bridge.encoder import EncoderStage, build_stages, transformer_config
from megatron_embed.bridge.layout import Layout
from megatron_embed.bridge.parallel import parallel_world
from megatron_embed.recipes import train
from megatron_embed.recipes.training.optimizer import wrap_ddp

LAYOUTS = [
    layout
    for tp, pp, cp in product((1, 2, 4), repeat=3)
    if 4 % (tp * pp * cp) == 0
    for layout in (Layout(tp=tp, pp=pp, cp=cp),)
]


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _use_groups(layout: Layout) -> None:
    config = EncoderConfig.from_hf(tiny_config(num_hidden_layers=4))
    encoders = build_stages(config, transformer_config(config, layout, dtype=torch.float32))
    wrap_ddp(encoders)  # models hold on to their groups
    for group in (
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_pipeline_model_parallel_group(),
        parallel_state.get_data_parallel_group(with_context_parallel=True),
    ):
        dist.all_reduce(torch.ones(1), group=group)


def _enter(count: int) -> tuple[int, list[int], int]:
    """Threads before, after each layout, and groups that torch still knows at the end."""
    other = dist.new_group()  # somebody else's: it must outlive every layout
    dist.all_reduce(torch.ones(1), group=other)  # the first message starts threads of the backend's own
    before = _threads()
    after = []
    for number in range(count):
        with parallel_world(LAYOUTS[number % len(LAYOUTS)]):
            _use_groups(LAYOUTS[number % len(LAYOUTS)])
        after.append(_threads())
    total = torch.ones(1)
    dist.all_reduce(total, group=other)
    assert total.item() == dist.get_world_size()
    return before, after, len(dist.distributed_c10d._world.pg_map)


def test_training_leaves_no_thread_and_no_model(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    threads = []
    for number in range(3):
        train(recipe(tmp_path, f"run{number}", "train.train_iters=2"))
        threads.append(_threads())
        assert not [each for each in gc.get_objects() if type(each) is EncoderStage]
    assert threads[1:] == threads[:1] * 2  # the first message of a process starts threads of the backend's own


@pytest.mark.slow
def test_twenty_layouts_leave_no_thread_and_no_group() -> None:
    for before, after, groups in run_world(_enter, 4, 20):
        assert after == [before] * 20
        assert groups == 2  # the default one, and the one made beside the layouts
