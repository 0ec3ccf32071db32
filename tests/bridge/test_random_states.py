"""megatron-core's random states: a layout adds those that sequence parallelism forks, and takes them away again."""

from __future__ import annotations

import pytest
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_embed.bridge.cpu import host
from megatron_embed.bridge.layout import Layout
from megatron_embed.bridge.parallel import parallel_world


def test_a_layout_has_the_states_that_sequence_parallelism_forks() -> None:
    host.run_on_cpu()
    for _ in range(2):
        with parallel_world(Layout()), get_cuda_rng_tracker().fork():
            pass
        with (
            pytest.raises(Exception, match="cuda rng state model-parallel-rng is not added"),
            get_cuda_rng_tracker().fork(),
        ):
            pass


def test_entering_a_layout_keeps_the_generator_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    host.run_on_cpu()
    seeds = [7]  # of the stand-in for the GPU's generator
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: torch.tensor(seeds[-1]))
    for name in ("manual_seed", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, lambda seed, *_: seeds.append(int(seed)))
    with parallel_world(Layout()):
        assert len(seeds) > 1
        assert seeds[-1] == 7
