"""Seconds and memory of a cached step that keeps no, half or all graphs, beside a direct step on the same batch.

    python benchmarks/kept_graphs.py --tokenizer DIR --data medquad.jsonl

All sides are warm and take turns step by step in one process. Each side's peak memory is measured in a process of its
own. In theory a step costs 4 forward passes, or 3.5, or 3, over the 3 of a direct step.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from common import SMALL, make_embedder, resident, timed, write_result
from train_step import DTYPES, Ours, builder_of

from megatron_embed.bridge.parallel import Layout, parallel_world, select_device
from megatron_embed.recipes.config.schema import DataSource
from megatron_embed.recipes.datasets.pairs import PairDataset

BATCH, LENGTH = 64, 256
#: side → (mode, share of the micro-batches whose graphs are kept), goal
SIDES = {
    "direct": ("direct", 0.0, None),
    "cached, none kept": ("cached", 0.0, 1.36),
    "cached, half kept": ("cached", 0.5, 1.20),
    "cached, all kept": ("cached", 1.0, 1.05),
}


def side_of(folder: Path, data: Path, name: str, dtype: torch.dtype) -> Ours:
    """Return a side of the comparison, ready to step."""
    mode, share, _ = SIDES[name]
    builder = builder_of(folder, PairDataset([DataSource(path=str(data))]), BATCH, LENGTH)
    return Ours(folder, builder, dtype, mode, kept=share)


def measure(folder: Path, data: Path, dtype: torch.dtype, steps: int) -> dict[str, float]:
    """Return each side's seconds over those of the direct side: the median of the steps' ratios."""
    sides = {name: side_of(folder, data, name, dtype) for name in SIDES}
    ratios: dict[str, list[float]] = {name: [] for name in SIDES}
    for number in range(2 + steps):
        took = {name: timed(lambda n=number, side=side: side.step(n)) for name, side in sides.items()}
        if number >= 2:
            for name, seconds in took.items():
                ratios[name].append(seconds / took["direct"])
    return {name: statistics.median(each) for name, each in ratios.items()}


def peak_memory(folder: Path, data: Path, name: str, dtype: str, threads: int) -> tuple[float, float]:
    """Return this process's resident GiB before the first step, and at its peak within three steps."""
    torch.set_num_threads(threads)
    select_device("cpu")
    with parallel_world(Layout()):
        side = side_of(folder, data, name, DTYPES[dtype])
        before = resident("VmRSS")
        for number in range(3):
            side.step(number)
    return before / 2**30, resident("VmHWM") / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--data", type=Path, required=True, help="question/paragraph pairs")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    select_device("cpu")
    table = ["| dtype | side | over direct | goal | peak GiB |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_embedder(Path(temporary) / "model", options.tokenizer)
        for dtype in DTYPES:
            with parallel_world(Layout()):
                ratios = measure(folder, options.data, DTYPES[dtype], options.steps)
            spawn = multiprocessing.get_context("spawn")
            for name, ratio in ratios.items():
                with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                    _, peak = pool.submit(peak_memory, folder, options.data, name, dtype, options.threads).result()
                goal = SIDES[name][2]
                table.append(f"| {dtype} | {name} | **{ratio:.2f}** | {f'≤ {goal}' if goal else ''} | {peak:.2f} |")
                print(table[-1], flush=True)
    settings = {
        "model": SMALL,
        "batch": BATCH,
        "most tokens of a text": LENGTH,
        "tokens of a micro-batch": 4096,
        "steps measured": options.steps,
        "threads": options.threads,
    }
    write_result("kept-graphs", "Graphs kept for the second pass of a cached step", "\n".join(table), settings)


if __name__ == "__main__":
    main()
