"""Process groups: set-up and tear-down. The only file that does either."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_embed.bridge import host
from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.errors import UserError


@dataclass(frozen=True)
class Layout:
    """How the world is divided; what is left over is data parallel."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    vpp: int | None = None

    @property
    def model_parallel_size(self) -> int:
        return self.tp * self.pp * self.cp

    def data_parallel_size(self, world_size: int) -> int:
        """Raises UserError where tp × pp × cp does not divide the world."""
        if world_size % self.model_parallel_size:
            raise UserError(
                f"world size {world_size} is not a multiple of tensor {self.tp} × pipeline {self.pp} × "
                f"context {self.cp} = {self.model_parallel_size} model-parallel processes; start a multiple of "
                f"{self.model_parallel_size} processes or change model.*_parallel_size"
            )
        return world_size // self.model_parallel_size

    def __str__(self) -> str:
        virtual = f" × VPP {self.vpp}" if self.vpp else ""
        return f"TP {self.tp} × PP {self.pp}{virtual} × CP {self.cp}"


def pipeline_split(num_layers: int, stages: int) -> list[int]:
    """Layers on each of the (virtual) pipeline stages, as even as can be.

    Where they do not divide, the last stages in the middle take one more: the first also holds the embedding, the last
    the final norm and the pooling. 26 layers at 4 stages → ``[6, 7, 7, 6]``.
    """
    base, extra = divmod(num_layers, stages)
    # the ends come last in the order in which stages receive an extra layer
    middle_first = [*range(1, stages - 1), stages - 1, 0]
    heavier = set(middle_first[:extra])
    return [base + (stage in heavier) for stage in range(stages)]


def check_layout(config: EncoderConfig, layout: Layout) -> None:
    """Refuse a layout that cannot hold the model, before anything is loaded."""
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        value = getattr(config, name)
        if value % layout.tp:
            raise UserError(
                f"model.tensor_model_parallel_size: {layout.tp} does not divide {name} {value}; "
                f"choose a divisor of {value}"
            )
    stages = layout.pp * (layout.vpp or 1)
    if stages > config.num_hidden_layers:
        raise UserError(
            f"model.pipeline_model_parallel_size: {layout.pp}{f' × {layout.vpp} virtual stages' if layout.vpp else ''} "
            f"is more than the model's {config.num_hidden_layers} layers"
        )


def select_device(wanted: str = "auto") -> torch.device:
    """Decide where this process computes, and prepare it.

    Args:
        wanted: ``cpu``, ``cuda``, or ``auto`` (CUDA where every local process has a GPU of its own).
    """
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = 0 if host.cuda_is_hidden() or wanted == "cpu" else torch.cuda.device_count()
    if wanted == "cuda" and gpus < local_world:
        raise UserError(f"device: cuda was asked for {local_world} processes on this host, which has {gpus} GPUs")
    if gpus < local_world:
        host.run_on_cpu()
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return host.device()


def initialize(layout: Layout, *, timeout_minutes: int = 30) -> None:
    """Create torch's process group (if there is none) and megatron-core's model-parallel groups.

    Under ``torchrun`` the environment says who is who; a lone process becomes a world of one without any network.
    """
    from megatron.core import parallel_state

    if not dist.is_initialized():
        backend = "gloo" if host.cuda_is_hidden() else "nccl"
        timeout = timedelta(minutes=timeout_minutes)
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    layout.data_parallel_size(dist.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        # megatron-core wants gloo twins beside NCCL groups; where gloo is the backend they would be the same again
        create_gloo_process_groups=not host.cuda_is_hidden(),
    )


def shut_down(*, process_group: bool = True) -> None:
    """Undo :func:`initialize`; ``process_group=False`` keeps torch's group for another layout."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if process_group and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def parallel_world(layout: Layout) -> Iterator[None]:
    """:func:`initialize` on entry, :func:`shut_down` on exit; a process group that was there before stays."""
    owned = not dist.is_initialized()
    initialize(layout)
    try:
        yield
    finally:
        shut_down(process_group=owned)


def world_size() -> int:
    """Processes in this run, before or after the process group exists."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number, before or after the process group exists."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
