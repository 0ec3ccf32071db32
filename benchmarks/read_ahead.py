"""Seconds of a training step whose batch takes 30 ms to read, prepared in the background or in the step itself.

    python benchmarks/read_ahead.py --tokenizer DIR --data squad.jsonl

Both sides have the same model and batches and take turns block by block. The cost is added to the reading of a batch,
once as waiting (a slow disk, a network) and once as running Python, which takes its share of the processor.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import make_embedder, timed, write_result
from train_step import Ours, builder_of

from megatron_embed.bridge.parallel import Layout, parallel_world, select_device
from megatron_embed.recipes.config.schema import DataSource
from megatron_embed.recipes.datasets.pairs import PairDataset
from megatron_embed.recipes.training.rank_batch import PackedBatch, pack
from megatron_embed.recipes.training.read_ahead import ReadAhead

COST = 0.03


def work(seconds: float) -> None:
    """Keep Python busy."""
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


def block(ours: Ours, cost: Callable[[float], None], steps: range, *, ahead: bool) -> list[tuple[float, float]]:
    """Run some steps; return (seconds of a step, seconds that it waited for its batch) for all but the first."""

    def prepare(step: int) -> PackedBatch:
        cost(COST)
        return pack(ours.plan, ours.builder.build(step), mode=ours.mode)

    found = []
    with ReadAhead(prepare, steps if ahead else ()) as reader:
        for step in steps:
            taken: list[PackedBatch] = []
            began = time.perf_counter()
            waited = timed(lambda taken=taken, step=step: taken.append(reader.take() if ahead else prepare(step)))
            ours.compute(taken[0].batch, taken[0].groups)
            found.append((time.perf_counter() - began, waited))
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=16, help="queries a step")
    parser.add_argument("--steps", type=int, default=8, help="of a block")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    select_device("cpu")
    table = ["| a batch costs | prepared | s a step, median | s of it waiting for the batch |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder, parallel_world(Layout()):
        model = make_embedder(Path(folder) / "model", options.tokenizer)
        builder = builder_of(model, PairDataset([DataSource(path=str(options.data))]), options.batch, 128)
        ours = Ours(model, builder, torch.float32, "direct")
        costs: dict[str, Callable[[float], Any]] = {"nothing": lambda _: None, "30 ms of waiting": time.sleep}
        for name, cost in {**costs, "30 ms of work": work}.items():
            sides: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
            for number in range(options.blocks):
                for ahead, found in sides.items():
                    steps = range(number * options.steps, (number + 1) * options.steps)
                    found += block(ours, cost, steps, ahead=ahead)
            for ahead, found in sides.items():
                step, waited = (statistics.median(column) for column in zip(*found, strict=True))
                side = "in the background" if ahead else "in the step"
                table.append(f"| {name} | {side} | {step:.3f} | {waited:.4f} |")
                print(table[-1], flush=True)
    if not options.no_write:
        settings = {"queries a step": options.batch, "steps": options.steps * options.blocks, "data": options.data.name}
        write_result("read-ahead", "Batches prepared in the background", "\n".join(table), settings)


if __name__ == "__main__":
    main()
