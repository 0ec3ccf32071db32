"""Memory of the loss alone: 4096 queries × 8 passages over 2 ranks, compared with that of the whole score matrix.

    python benchmarks/loss_memory.py

It is the peak growth of resident memory in a process that computes the loss and its gradient, with the gathered
embeddings.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

import torch
from common import resident, write_result

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from support.worlds import run_world

QUERIES, SLOTS, WORLD = 4096, 8, 2


def measure(width: int) -> tuple[float, float]:
    """Return (bytes of growth, the loss) on this rank."""
    import torch.distributed as dist

    from megatron_embed.recipes.config.schema import LossSection
    from megatron_embed.recipes.training.loss import ContrastiveLoss
    from megatron_embed.recipes.training.targets import Targets

    mine = QUERIES // WORLD
    generator = torch.Generator().manual_seed(dist.get_rank())
    vectors = torch.randn(mine * (1 + SLOTS), width, generator=generator)
    leaf = torch.nn.functional.normalize(vectors, dim=1).requires_grad_()
    loss = ContrastiveLoss(LossSection(), group=dist.group.WORLD)
    targets = Targets(mine, torch.ones(mine, SLOTS, dtype=torch.bool))
    gc.collect()
    before = resident("VmRSS")
    value = loss(leaf, targets)
    value.backward()
    return float(resident("VmHWM") - before), value.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024, help="dimensions of an embedding")
    options = parser.parse_args()
    (growth, _), *_ = run_world(measure, WORLD, options.width)
    matrix = QUERIES / WORLD * QUERIES * SLOTS * 4
    gathered = QUERIES * SLOTS * options.width * 4
    allowed = 1.5 * matrix + gathered
    mib = 2**20
    body = (
        "| | MiB |\n|---|---|\n"
        f"| score matrix of a rank, B/W × N in fp32 | {matrix / mib:.0f} |\n"
        f"| gathered passages | {gathered / mib:.0f} |\n"
        f"| goal: 1.5 × matrix + gathered | {allowed / mib:.0f} |\n"
        f"| **peak growth, loss and gradient** | **{growth / mib:.0f}** |\n"
    )
    settings = {"queries": QUERIES, "passages a query": SLOTS, "ranks": WORLD, "width": options.width}
    write_result("loss-memory", "Memory of the loss", body, settings)


if __name__ == "__main__":
    main()
