"""The choice of the device, and NCCL's start, on hosts with any number of GPUs (none of which is there)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_embed.bridge import liveness, parallel
from megatron_embed.bridge.cpu import host
from megatron_embed.bridge.errors import UserError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that gives this host some GPUs and processes."""
    monkeypatch.setattr(host, "_installed", False)
    chosen: list[Any] = []
    monkeypatch.setattr(host, "run_on_cpu", lambda: chosen.append("cpu"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: chosen.append(index))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)

    def have(count: int, processes: int) -> list[Any]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        monkeypatch.setenv("LOCAL_RANK", "1")
        return chosen

    return have


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_fewer_gpus_than_processes_are_refused(gpus: Any, wanted: str) -> None:
    chosen = gpus(1, 2)
    with pytest.raises(
        UserError, match=f"device: {wanted} finds 1 GPU for 2 processes on this host; wanted one for each"
    ):
        parallel.select_device(wanted)
    assert chosen == []


def test_without_any_gpu_auto_is_the_cpu_and_cuda_is_refused(gpus: Any) -> None:
    chosen = gpus(0, 2)
    parallel.select_device("auto")
    assert chosen == ["cpu"]
    with pytest.raises(UserError, match="device: cuda finds 0 GPUs for 2 processes"):
        parallel.select_device("cuda")


def test_each_process_takes_its_gpu(gpus: Any) -> None:
    chosen = gpus(8, 2)
    assert parallel.select_device("auto") == torch.device("cuda", 1)
    assert chosen == [1]


def test_nccl_is_told_the_device(gpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import parallel_state

    from megatron_embed.bridge.layout import Layout

    gpus(2, 2)
    monkeypatch.setenv("RANK", "1")
    seen: dict[str, Any] = {}
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **how: seen.update(how, backend=backend))
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(liveness, "join", lambda *_args, **_kwargs: None)
    monkeypatch.setattr(parallel_state, "initialize_model_parallel", lambda **_kwargs: None)
    monkeypatch.setattr(parallel, "_add_random_states", lambda: None)
    parallel.initialize(Layout())
    assert seen["backend"] == "nccl"
    assert seen["device_id"] == torch.device("cuda", 1)
