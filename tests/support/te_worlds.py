"""Worlds of gloo processes that compute with Transformer Engine's own Python, in the environment of a child process.

The folder ``.te`` holds its Python without the compiled parts; `make test` fills it. No other process sees it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch

from support.places import ROOT

FOLDER = ROOT / ".te"

#: mark of every test that needs the folder
needs_te = pytest.mark.skipif(
    not (FOLDER / "transformer_engine").is_dir(), reason=f"no {FOLDER.name} folder; `make test` sets it up"
)


def run_te_world(function: Callable[..., Any], world_size: int, *args: Any, on_gpu: bool = True) -> list[Any]:
    """Call ``function(*args)`` on every rank of a fresh world, beside Transformer Engine; return each rank's result.

    ``on_gpu``: see :func:`support.te_kernels.install`.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.save((function, args), f"{folder}/call.pt")
        places = [str(FOLDER), str(ROOT / "tests"), str(ROOT / "tests" / "te")]
        environment = {
            **os.environ,
            "PYTHONPATH": ":".join([*places, os.environ.get("PYTHONPATH", "")]).rstrip(":"),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "LOCAL_WORLD_SIZE": str(world_size),
        }
        command = [sys.executable, "-m", "support.te_worlds", folder, str(world_size), "gpu" if on_gpu else "cpu"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return [torch.load(f"{folder}/result{rank}.pt", weights_only=False) for rank in range(world_size)]


def main(folder: str, world_size: int, device: str) -> None:
    """Import once, and fork the ranks."""
    from support import te_kernels

    te_kernels.install(on_gpu=device == "gpu")
    import megatron_embed.recipes.training.loop  # noqa: F401  of which every rank has a copy

    function, args = torch.load(f"{folder}/call.pt", weights_only=False)
    torch.multiprocessing.start_processes(
        _rank, args=(world_size, folder, function, args), nprocs=world_size, start_method="fork"
    )


def _rank(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    torch.save(function(*args), f"{folder}/result{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
