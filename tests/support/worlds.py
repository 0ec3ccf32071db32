"""Runs a function in 1, 2 or 4 gloo processes on this host."""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

#: what every world needs and takes long to import: one process imports it, and the ranks are forked from that one
PRELOADED = (
    "pytest",
    "transformers.models.ministral3.modeling_ministral3",
    "megatron.core.distributed",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "megatron_embed.bridge.encoder",
    "megatron_embed.conversion.convert_checkpoints",
    "megatron_embed.recipes.training.loop",
)


def run_world(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Call ``function(*args)`` in every process of a fresh world; return each rank's result.

    The rendezvous is a file, so no port is taken. A rank that raises fails the call at once with its traceback.
    """
    multiprocessing.set_forkserver_preload(list(PRELOADED))  # heeded when the server starts, at the first world
    with tempfile.TemporaryDirectory() as folder:
        every = (world_size, folder, dict(os.environ), function, args)
        try:
            mp.start_processes(_child, args=every, nprocs=world_size, start_method="forkserver")
        finally:
            for said in sorted(Path(folder).glob("said*")):
                os.write(2, said.read_bytes())
        return [torch.load(Path(folder) / f"result{rank}.pt", weights_only=False) for rank in range(world_size)]


def _child(
    rank: int,
    world_size: int,
    folder: str,
    environment: dict[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    gc.freeze()  # every collection would look through the imports again: a quarter of a rank's time
    # the environment and the outputs are the server's, as they were when it started
    for output in (1, 2):
        os.dup2(os.open(f"{folder}/said{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), output)
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo", LOCAL_WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    from megatron_embed.bridge.cpu import host

    host.run_on_cpu()
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    try:
        result = function(*args)
    except BaseException:
        traceback.print_exc()
        raise
    torch.save(result, Path(folder) / f"result{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
