"""Quality for equal processor time: ours beside sentence-transformers, then mined negatives against none.

    python benchmarks/cpu_minutes_quality.py --tokenizer DIR --data medquad.jsonl squad.jsonl --eval liveqa_medquad \\
        --workdir DIR [--minutes 10] [--threads 2] [--seeds 1]

All runs of a seed start from one folder of random weights. A trial run on the same weights, which is thrown away,
measures the cost of a step; the budget divided by it gives the number of steps. A run that turns out dearer ends with
the step that reaches the budget, where the learning rate is nearly 0. Each stage runs in its own process, and its
result stays in ``--workdir``, so that a killed benchmark continues with the missing stages (delete
``seed-N/STAGE.json`` to repeat a stage):

    start        make random weights; score them and BM25
    theirs ours  train both sides from the start
    mine         mine hard negatives with the model of ``ours``, from all passages of the training data
    mined        train as ``ours``, but with these negatives; compare with ``ours``, which has none
    more-mined more-none    train with and without the negatives, from the model of ``ours``
    report       write benchmarks/results/DATE-NAME.md about the finished stages
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from budget import FORMS, Meter, distinct_passages, train_ours
from budget_report import write_report
from common import make_embedder
from quality import load_theirs, recipe, scores

from megatron_embed.bridge.cpu import host
from megatron_embed.conversion.exporting import export_hf
from megatron_embed.recipes.config.schema import RecipeConfig
from megatron_embed.recipes.datasets.beir import load_beir
from megatron_embed.recipes.retrieval.bm25 import bm25_run
from megatron_embed.recipes.retrieval.evaluation import metrics

STAGES = ("start", "theirs", "ours", "mine", "mined", "more-mined", "more-none")
#: settings that results depend on; a work folder holds results for one set of their values
SETTINGS = ("minutes", "threads", "trial_steps", "batch", "length", "lr", "temperature", "their_form")
MINING = ("negatives", "rank_range", "max_score_ratio")


def seed_folder(options: argparse.Namespace, seed: int) -> Path:
    return options.workdir / f"seed-{seed}"


def make_start(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    folder = seed_folder(options, seed) / "start"
    shutil.rmtree(folder, ignore_errors=True)
    make_embedder(folder, options.tokenizer, seed=seed, embedding_std=0.02, max_length=options.length)
    collection = load_beir(options.eval)
    bm25 = metrics(collection.qrels, bm25_run(collection))
    return {"scores": scores(load_theirs(folder, options.length), collection), "bm25": bm25}


def config_of(options: argparse.Namespace, seed: int, name: str, steps: int) -> RecipeConfig:
    """Return the config of a stage's training, for our side and theirs: its data and first weights."""
    folder = seed_folder(options, seed)
    start = folder / ("ours" if name.startswith("more-") else "start")
    mined = name.endswith("mined")
    data = [folder / "negatives" / path.name for path in options.data] if mined else options.data
    cfg = recipe(folder / f"{name}-run", start, data, options, seed=seed, steps=steps)
    cfg.data.negatives_per_query = options.negatives if mined else 0
    cfg.optimizer.distributed = cfg.optimizer.overlap_grad_reduce = False
    return cfg


def train_side(options: argparse.Namespace, cfg: RecipeConfig, name: str, meter: Meter, *, keep: bool) -> Any:
    """Train with either side; return the model for theirs and None for ours."""
    shutil.rmtree(str(cfg.train.save_dir), ignore_errors=True)
    if name == "theirs":
        return FORMS[options.their_form](cfg.resolved(), Path(cfg.model.hf_model or ""), meter)
    return train_ours(cfg, meter, keep=keep)


def try_out(options: argparse.Namespace, seed: int, name: str) -> float:
    """Return the processor seconds of a step."""
    cfg = config_of(options, seed, name, steps=100_000)
    meter = Meter(most=options.trial_steps)
    train_side(options, cfg, name, meter, keep=False)
    shutil.rmtree(str(cfg.train.save_dir), ignore_errors=True)
    return meter.a_step()


def train_in_budget(options: argparse.Namespace, seed: int, name: str) -> dict[str, Any]:
    """Train one side within its budget; save the trained model in a folder with the stage's name."""
    budget, cost = 60 * options.minutes, in_child(try_out, options, seed, name)
    steps = max(math.floor(budget / cost), 1)
    print(f"seed {seed}, {name}: {cost:.3f} processor seconds a step, {steps} steps planned", flush=True)
    return in_child(train_and_score, options, seed, name, cost, Meter(budget=budget), steps)


def train_and_score(
    options: argparse.Namespace, seed: int, name: str, cost: float, meter: Meter, steps: int
) -> dict[str, Any]:
    cfg = config_of(options, seed, name, steps)
    trained = seed_folder(options, seed) / name
    shutil.rmtree(trained, ignore_errors=True)
    model = train_side(options, cfg, name, meter, keep=True)
    if model is None:
        export_hf(str(cfg.train.save_dir), trained, progress=False)
    else:
        model.save(str(trained))
    shutil.rmtree(str(cfg.train.save_dir), ignore_errors=True)
    return {
        "scores": scores(load_theirs(trained, options.length), load_beir(options.eval)),
        "planned": steps,
        "steps": meter.steps,
        "processor": meter.processor,
        "wall": meter.wall,
        "trial": cost,
        "budget": meter.budget,
    }


def mine(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Run the mining program for each data file, with the passages of all files as corpus; return its audits."""
    folder = seed_folder(options, seed)
    into = folder / "negatives"
    into.mkdir(exist_ok=True)
    corpus = into / "corpus.jsonl"
    with corpus.open("w", encoding="utf-8") as file:
        for number, text in enumerate(distinct_passages(options.data)):
            file.write(json.dumps({"_id": str(number), "text": text}) + "\n")
    audits, began = {}, time.perf_counter()
    for path in options.data:
        output = into / path.name
        command = [sys.executable, "-m", "megatron_embed.recipes.mine", "--model", str(folder / "ours")]
        command += ["--data", str(path), "--corpus", str(corpus), "--output", str(output), "--overwrite"]
        command += ["--cache", str(into / "vectors"), "--device", "cpu", "--negatives", str(options.negatives)]
        command += ["--rank-range", options.rank_range, "--max-score-ratio", str(options.max_score_ratio)]
        subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(options.threads)}, check=True)
        audits[path.name] = json.loads(output.with_suffix(".audit.json").read_text(encoding="utf-8"))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"audits": audits, "processor": used.ru_utime + used.ru_stime, "wall": time.perf_counter() - began}


def in_child(function: Any, options: argparse.Namespace, *arguments: Any) -> Any:
    """Return the function's value, computed in a fresh process."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=prepare, initargs=(options.threads,)) as pool:
        return pool.submit(function, options, *arguments).result()


def prepare(threads: int) -> None:
    torch.set_num_threads(threads)
    host.run_on_cpu()


def run_stage(options: argparse.Namespace, seed: int, name: str) -> None:
    """Run a stage and keep its result, unless there is one already."""
    kept = seed_folder(options, seed) / f"{name}.json"
    if kept.exists():
        print(f"seed {seed}, {name}: is there already", flush=True)
        return
    kept.parent.mkdir(parents=True, exist_ok=True)
    if name == "start":
        found = in_child(make_start, options, seed)
    elif name == "mine":
        found = in_child(mine, options, seed)
    else:
        found = train_in_budget(options, seed, name)
    beside = kept.with_suffix(".part")
    beside.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    beside.replace(kept)
    print(f"seed {seed}, {name}: {json.dumps(found)}", flush=True)


def check_settings(options: argparse.Namespace) -> None:
    """Refuse a work folder of other settings, because its results would mix with those of this run."""
    settings = {key: getattr(options, key) for key in (*SETTINGS, *MINING)}
    settings |= {"data": [path.name for path in options.data], "evaluated on": options.eval.name}
    path = options.workdir / "settings.json"
    if not path.exists():
        options.workdir.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    there = json.loads(path.read_text(encoding="utf-8"))
    changed = [f"{key} {there.get(key)!r} → {value!r}" for key, value in settings.items() if there.get(key) != value]
    if changed:
        sys.exit(f"{options.workdir}: holds results of other settings ({', '.join(changed)}); name another folder")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="training pairs, one source each")
    parser.add_argument("--eval", type=Path, required=True, help="BEIR folder")
    parser.add_argument("--workdir", type=Path, required=True, help="models and results of the stages")
    parser.add_argument("--stage", nargs="+", choices=(*STAGES, "report"), default=[*STAGES, "report"], metavar="STAGE")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=10, help="of processor time, each run")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trial-steps", type=int, default=30, help="that say what a step costs")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=24, help="short: an answer names its subject at the beginning")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--their-form", choices=tuple(FORMS), default="loop", help="how sentence-transformers trains")
    parser.add_argument("--negatives", type=int, default=1, help="mined for, and used with, each query")
    parser.add_argument("--rank-range", default="5:100")
    parser.add_argument("--max-score-ratio", type=float, default=0.95)
    parser.add_argument("--result", default="cpu-minutes-quality", help="name of the result file")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    check_settings(options)
    for seed in range(options.seeds):
        for name in STAGES:
            if name in options.stage:
                run_stage(options, seed, name)
    if "report" in options.stage:
        torch.set_num_threads(options.threads)
        settings = json.loads((options.workdir / "settings.json").read_text(encoding="utf-8"))
        write_report(options.workdir, STAGES, settings, name=options.result)


if __name__ == "__main__":
    main()
