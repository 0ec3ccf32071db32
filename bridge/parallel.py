"""Set-up and tear-down of process groups. No other file does either."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_embed.bridge import environment, liveness
from megatron_embed.bridge.cpu import host
from megatron_embed.bridge.errors import UserError
from megatron_embed.bridge.layout import Layout


def select_device(wanted: str = "auto") -> torch.device:
    """Choose the device on which this process computes, and prepare it.

    Args:
        wanted: ``cpu``, ``cuda``, or ``auto`` (CUDA where there is any).

    Raises:
        UserError: this host has GPUs, or must have them, but fewer than processes.
    """
    environment.set_defaults()
    local_world = local_world_size()
    gpus = 0 if host.cuda_is_hidden() or wanted == "cpu" else torch.cuda.device_count()
    if gpus < local_world and (gpus or wanted == "cuda"):
        # A job with a GPU too few would otherwise run on the CPU, a thousand times slower, and say nothing.
        raise UserError(
            f"device: {wanted} finds {gpus} GPU{'s' * (gpus != 1)} for {local_world} processes on this host; wanted "
            f"one for each: lower torchrun's --nproc-per-node, let each process see all GPUs of the host "
            f"(CUDA_VISIBLE_DEVICES), or set device=cpu"
        )
    if not gpus:
        host.run_on_cpu()
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return host.device()


def initialize(layout: Layout, *, timeout_minutes: float = 30) -> None:
    """Create torch's process group (if there is none) and megatron-core's model-parallel groups.

    Under ``torchrun`` the environment names rank and world; a lone process becomes a world of one without any network.

    Args:
        timeout_minutes: how long a collective waits for a rank that does not answer.
    """
    from megatron.core import parallel_state

    if not dist.is_initialized():
        backend = "gloo" if host.cuda_is_hidden() else "nccl"
        # NCCL ends with an abort that does not name the rank that did not answer. It gets a minute more, so that the
        # rank can be named before.
        limited = backend == "nccl"
        timeout = timedelta(minutes=timeout_minutes + (1 if limited else 0))
        if "RANK" in os.environ:
            # With its device named, NCCL connects at once and knows which GPU a rank without tensors belongs to.
            device = None if host.cuda_is_hidden() else host.device()
            dist.init_process_group(backend, timeout=timeout, device_id=device)
            if dist.get_world_size() > 1:
                store = dist.PrefixStore("liveness", dist.distributed_c10d._get_default_store())
                rank, size = dist.get_rank(), dist.get_world_size()
                liveness.join(store, rank=rank, size=size, minutes=timeout_minutes, limited=limited)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    layout.data_parallel_size(dist.get_world_size())
    _groups_before.update(_process_groups())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        # megatron-core wants gloo twins beside NCCL groups; where gloo is the backend they would be duplicates.
        create_gloo_process_groups=not host.cuda_is_hidden(),
        distributed_timeout_minutes=timeout_minutes if host.cuda_is_hidden() else timeout_minutes + 1,
    )
    _add_random_states()


def _add_random_states() -> None:
    """Add the random states that megatron-core forks under sequence parallelism; keep the process's own state.

    No layer draws from them: dropout is 0, and all parameters are loaded. So the seed has no effect on any result.
    """
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    before = torch.cuda.get_rng_state()
    model_parallel_cuda_manual_seed(0)
    torch.cuda.set_rng_state(before)


def shut_down(*, process_group: bool = True) -> None:
    """Undo :func:`initialize`; ``process_group=False`` keeps torch's group for another layout."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    get_cuda_rng_tracker().reset()
    parallel_state.destroy_model_parallel()
    parallel_state._INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP = None  # megatron-core overlooks this one
    if dist.is_initialized():
        # megatron-core forgets its groups without destroying them. Each keeps threads that poll while the process
        # lives: 51 at two ranks for every layout that was entered.
        for group in _process_groups() - _groups_before:
            dist.destroy_process_group(group)
        gc.collect()  # models refer to their groups in reference cycles; the threads stay until these are collected
        if process_group:
            liveness.leave()
            dist.destroy_process_group()
    _groups_before.clear()


#: the groups that existed when :func:`initialize` began; they belong to other code
_groups_before: set[dist.ProcessGroup] = set()


def _process_groups() -> set[dist.ProcessGroup]:
    """Return every process group that has this process as a member; torch lists them in no public place."""
    return set(dist.distributed_c10d._world.pg_map)


@contextmanager
def parallel_world(layout: Layout, *, timeout_minutes: float = 30) -> Iterator[None]:
    """Call :func:`initialize` on entry and :func:`shut_down` on exit; keep a process group that existed before.

    A rank that fails among several leaves its group open until its process ends. If it closed the group at once, the
    other ranks would fail because of that, and would report before the rank that knows the cause.
    """
    owned = not dist.is_initialized()
    initialize(layout, timeout_minutes=timeout_minutes)
    try:
        yield
    except BaseException:
        shut_down(process_group=owned and dist.get_world_size() == 1)
        raise
    shut_down(process_group=owned)


def data_parallel_hosts() -> dist.ProcessGroup:
    """Return the data-parallel ranks as a group for tensors of the host: numbers that no GPU has to be waited for."""
    from megatron.core import parallel_state

    if host.cuda_is_hidden():
        return parallel_state.get_data_parallel_group()
    return parallel_state.get_data_parallel_group_gloo()


def world_size() -> int:
    """Return the number of processes in this run, before or after the process group exists."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Return the number of this run's processes on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank() -> int:
    """Return this process's number, before or after the process group exists."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
