"""Memory of the device that this rank computes on: what there is, what is left, and whether a run will fit."""

from __future__ import annotations

import psutil
import torch

from megatron_embed.bridge import parallel
from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.cpu import host
from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes.config.schema import RecipeConfig
from megatron_embed.recipes.planning.layouts import GIB, USABLE, plan_layout
from megatron_embed.recipes.training.metrics import peak_memory_bytes


def device_memory() -> int:
    """Return the bytes of this rank's GPU, or of its share of the host's memory on a CPU."""
    if host.cuda_is_hidden():
        return psutil.virtual_memory().total // parallel.local_world_size()
    return torch.cuda.get_device_properties(host.device()).total_memory


def spare_memory() -> int:
    """Return the bytes that this process never used until now and may use: of its GPU, or of its share of the host."""
    if host.cuda_is_hidden():
        used = psutil.Process().memory_info().rss
        # other programs of the host need memory too
        share = psutil.virtual_memory().available // 2 // parallel.local_world_size()
        return share - (peak_memory_bytes() - used)
    free, total = torch.cuda.mem_get_info()
    ours = torch.cuda.memory_reserved() + free
    return ours - peak_memory_bytes() - int((1 - USABLE) * total)


def too_large(cfg: RecipeConfig, config: EncoderConfig, world_size: int) -> str | None:
    """Return a warning if the plan of a run does not fit into this rank's device, with every text at its limit."""
    planned = cfg.model_copy(deep=True)
    planned.device = "cpu" if host.cuda_is_hidden() else "cuda"
    try:
        plan = plan_layout(planned, config, world_size)[cfg.model.recompute]
    except UserError:  # loss.mode=direct may hold the real texts, though not the longest that may come
        return None
    memory = device_memory()
    if plan.fits(memory / GIB):
        return None
    kind = "this host's share of a rank" if host.cuda_is_hidden() else "this GPU"
    return (
        f"a rank needs about {plan.total / GIB:.1f} GiB with every text at its greatest length, and {kind} has "
        f"{memory / GIB:.1f} (of which {USABLE:.0%} count): it may run out of memory. Lower train.micro_batch_tokens, "
        f"set model.recompute=full, or see the layouts that fit: python -m megatron_embed.recipes.plan {cfg.recipe} "
        f"--world-size {world_size} --gpu-memory {memory // GIB}"
    )
