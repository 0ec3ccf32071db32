"""A real run from random weights, compared with sentence-transformers on equal weights, data and hyper-parameters.

    python benchmarks/medquad_quality.py --tokenizer DIR --data medquad.jsonl --eval liveqa_medquad --steps 500

A seed changes only the weights and the data order. The same code evaluates the export of our run (not the Megatron
model) and the model that sentence-transformers trained. The runs are jobs of a pool of ``--jobs`` processes with
``--threads`` threads each, so that both sides' seconds are measured on an equally busy machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common import SMALL, make_embedder, timed, write_result
from quality import OPTIMIZER, load_theirs, recipe, scores, train_theirs

from megatron_embed.bridge.cpu import host
from megatron_embed.conversion.exporting import export_hf
from megatron_embed.recipes import train
from megatron_embed.recipes.datasets.beir import load_beir


def run_side(options: argparse.Namespace, seed: int, side: str) -> dict[str, float]:
    """Run one of the six jobs: ``ours`` or ``theirs`` from a seed's weights."""
    torch.set_num_threads(options.threads)
    host.run_on_cpu()
    collection = load_beir(options.eval)

    def score(folder: Path) -> float:
        return scores(load_theirs(folder, options.length), collection)["ndcg@10"]

    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = make_embedder(folder / "model", options.tokenizer, seed=seed, embedding_std=0.02)
        cfg = recipe(folder / "run", model, [options.data], options, seed=seed, steps=options.steps)
        if side == "ours":
            found["before"] = score(model)
            found["our seconds"] = timed(lambda: train(cfg))
            export_hf(folder / "run", folder / "export", progress=False)
            found["ours"] = score(folder / "export")
        else:
            trained: list[Any] = []
            found["their seconds"] = timed(lambda: trained.append(train_theirs(cfg.resolved(), model)))
            found["theirs"] = scores(trained[0], collection)["ndcg@10"]
    print(seed, found, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=24, help="short: an answer names its subject at the beginning")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each job")
    parser.add_argument("--only-ours", action="store_true", help="for trying settings; writes no result")
    options = parser.parse_args()
    sides = ["ours"] if options.only_ours else ["theirs", "ours"]
    jobs = [(options, seed, side) for side in sides for seed in range(options.seeds)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=spawn, max_tasks_per_child=1) as pool:
        found = list(pool.map(run_side, *zip(*jobs, strict=True)))
    if options.only_ours:
        return
    runs = [found[seed] | found[options.seeds + seed] for seed in range(options.seeds)]
    columns = ("before", "ours", "theirs", "our seconds", "their seconds")
    table = [
        "| seed | nDCG@10 before | ours after | theirs after | our seconds | their seconds |",
        "|---|---|---|---|---|---|",
    ]
    rows = {str(seed): run for seed, run in enumerate(runs)}
    rows["**mean**"] = {key: statistics.mean(run[key] for run in runs) for key in columns}
    for name, run in rows.items():
        scores, seconds = (f"{run[key]:.4f}" for key in columns[:3]), (f"{run[key]:.0f}" for key in columns[3:])
        table.append(f"| {' | '.join((name, *scores, *seconds))} |")
    settings = {
        "model": SMALL,
        **{
            key: value
            for key, value in vars(options).items()
            if key in ("steps", "batch", "length", "lr", "temperature", "jobs", "threads")
        },
    }
    settings["initial weights"] = "normal, std 0.02, embeddings too (transformers' own)"
    settings |= {"data": options.data.name, "evaluated on": options.eval.name, "precision": "fp32"}
    settings["optimizer"] = OPTIMIZER
    write_result(
        "medquad-quality", "Training from random weights beside sentence-transformers", "\n".join(table), settings
    )


if __name__ == "__main__":
    main()
