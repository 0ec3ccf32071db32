"""All steps from a VLM to an evaluated embedder, in some minutes on any machine: ``make demo``.

The demo imports a small Ministral 3 VLM in Hugging Face form to Megatron, fine-tunes it as an embedder at TP 2 × PP 2,
exports it, loads it in sentence-transformers, and evaluates it before and after training, with BM25 for comparison.
Every step prints its command.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
METRICS = ("ndcg@10", "recall@100", "mrr@10")
WANTED_RISE = 0.10
#: of the training: TP 2 × PP 2
RANKS = 4
console = Console(highlight=False)


def main() -> int:
    """Run the demo; return 0 if held-out nDCG@10 rose by :data:`WANTED_RISE` and the export equals the checkpoint."""
    args = arguments()
    if args.device == "auto" and torch.cuda.device_count() < RANKS:
        args.device = "cpu"
    began = time.perf_counter()
    quiet()
    os.chdir(ROOT)
    out: Path = args.output
    shutil.rmtree(out, ignore_errors=True)
    vlm, megatron, run, export = out / "vlm", out / "megatron", out / "run", out / "export"
    train, held_out = out / "data" / "train.jsonl", out / "data" / "held-out"

    step("Retrieval pairs from docstrings: first sentence → the rest")
    python("examples/docstrings.py", out / "data", "--held-out", args.held_out, *packages(args.packages))
    step("A small Ministral 3 VLM with random weights, in Hugging Face form")
    python("examples/tiny_vlm.py", vlm, "--text", train)
    step("Import: Hugging Face → Megatron")
    python(
        "conversion/convert_checkpoints.py", "import", "--hf-model", vlm, "--megatron-path", megatron, "--no-progress"
    )
    step("Evaluate before training")
    evaluate(megatron, held_out, out / "before.json", args.device)
    step("Fine-tune on four processes: tensor parallel 2 × pipeline parallel 2")
    python(*train_command(args, vlm, megatron, run, train, held_out))
    step("Export: Megatron → sentence-transformers folder")
    python("conversion/convert_checkpoints.py", "export", "--megatron-path", run, "--hf-path", export, "--no-progress")
    step("Load the export in sentence-transformers, compare with the Megatron encoder")
    vectors, cosine = compare(run, export, held_out, args.device)
    step("Evaluate after training")
    evaluate(export, held_out, out / "after.json", args.device)

    before, after = (json.loads((out / name).read_text())[held_out.name] for name in ("before.json", "after.json"))
    rows = {"before": before, "after": after, "BM25": after["bm25"]}
    report(out / "report.html", run, rows, cosine, megatron, vectors, args.device)
    return summary(rows, cosine, out, time.perf_counter() - began, wanted=args.wanted_rise)


def arguments() -> argparse.Namespace:
    """Parse the command line; its defaults are those of ``make demo``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="replaced if it exists")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--train-iters", type=int, default=240)
    parser.add_argument("--held-out", type=int, default=500, help="pairs kept for evaluation")
    parser.add_argument("--packages", nargs="*", help="whose docstrings are read, beside the standard library's")
    parser.add_argument("--wanted-rise", type=float, default=WANTED_RISE, help="of nDCG@10, else status 1")
    return parser.parse_args()


def quiet() -> None:
    """Hide other packages' warnings and progress bars, in this process and in its child processes."""
    warnings.filterwarnings("ignore")
    os.environ.update(PYTHONWARNINGS="ignore", TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")


def packages(names: list[str] | None) -> list[str]:
    """Return the packages option for examples/docstrings.py, if it is not the default."""
    return [] if names is None else ["--packages", *names]


def train_command(
    args: argparse.Namespace, vlm: Path, megatron: Path, run: Path, train: Path, held_out: Path
) -> list[Any]:
    """Return the torchrun command with the recipe and the demo's overrides."""
    quarter = max(1, args.train_iters // 4)
    return [
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", RANKS),
        *("-m", "megatron_embed.recipes.train", "ministral3_tiny_embed_config"),
        *(f"model.hf_model={vlm}", f"checkpoint.pretrained_checkpoint={megatron}"),
        *("model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2", f"device={args.device}"),
        *(f"data.train={train}", f"data.eval={held_out}", "data.query_max_length=64", "data.passage_max_length=64"),
        *(f"train.train_iters={args.train_iters}", "train.global_batch_size=64", "optimizer.lr=3e-3"),
        *(f"train.eval_interval={quarter}", f"train.save_interval={args.train_iters}", "train.log_interval=5"),
        f"train.save_dir={run}",
    ]


def step(title: str) -> None:
    """Print a heading."""
    step.number += 1  # type: ignore[attr-defined]
    console.print(f"\n[bold]{step.number}. {title}[/bold]")  # type: ignore[attr-defined]


step.number = 0  # type: ignore[attr-defined]


def python(*arguments: Any) -> None:
    """Show a command, run it and print its time; a failure ends the demo with the command's own status."""
    command = [sys.executable, *map(str, arguments)]
    shown = shlex.join([os.path.relpath(sys.executable), *command[1:]])
    console.print(f"$ {shown}", style="dim", soft_wrap=True, markup=False)
    began = time.perf_counter()
    # Four training processes share the cores, so each gets a quarter of them as threads.
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 4)), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, check=False)
    if done.returncode:
        console.print(f"This step failed with status {done.returncode}; the demo ends here.", style="red")
        sys.exit(done.returncode)
    took(began)


def took(began: float) -> None:
    """Print the time since ``began``."""
    console.print(f"  {time.perf_counter() - began:.1f} s", style="green")


def evaluate(model: Path, held_out: Path, output: Path, device: str) -> None:
    """Run the evaluation program."""
    options = ("--model", model, "--data", held_out, "--output", output, "--device", device)
    python("-m", "megatron_embed.recipes.evaluate", *options)


def compare(run: Path, export: Path, held_out: Path, device: str) -> tuple[dict[str, Any], float]:
    """Encode held-out pairs with the export in sentence-transformers and with the trained Megatron checkpoint.

    Returns:
        The pairs with sentence-transformers' vectors, and the smallest cosine between the two encoders' vectors.
    """
    import transformers
    from sentence_transformers import SentenceTransformer

    from megatron_embed.recipes import Encoder
    from megatron_embed.recipes.datasets.beir import load_beir

    console.print(
        f'>>> SentenceTransformer("{export}").encode_query(…)  against  Encoder.from_pretrained("{run}").encode(…)',
        style="dim",
        soft_wrap=True,
        markup=False,
    )
    began = time.perf_counter()
    collection = load_beir(held_out)
    queries = list(collection.queries.values())[:64]
    passages = list(collection.corpus.values())[:64]
    transformers.utils.logging.disable_progress_bar()
    model = SentenceTransformer(str(export), device="cpu")
    theirs = {"query": model.encode_query(queries), "passage": model.encode_document(passages)}
    with Encoder.from_pretrained(run, device=device) as encoder:
        ours = {
            "query": encoder.encode(queries, kind="query"),
            "passage": encoder.encode(passages, kind="passage"),
        }
    cosine = min(float((ours[kind] * theirs[kind]).sum(axis=1).min()) for kind in ("query", "passage"))
    console.print(f"  128 texts, smallest cosine between the two: {cosine:.7f}")
    took(began)
    return {"queries": queries, "passages": passages, **theirs}, cosine


def report(
    path: Path, run: Path, rows: dict[str, Any], cosine: float, megatron: Path, pairs: dict[str, Any], device: str
) -> None:
    """Write the HTML page: scores, similarities before and after training, and training curves."""
    from megatron_embed.recipes import Encoder
    from megatron_embed.recipes.training.run_report import heat_map, read_run, table, write_report

    shown = 10
    queries, passages = pairs["queries"][:shown], pairs["passages"][:shown]
    with Encoder.from_pretrained(megatron, device=device) as encoder:
        early = encoder.encode(queries, kind="query") @ encoder.encode(passages, kind="passage").T
    late = np.asarray(pairs["query"][:shown]) @ np.asarray(pairs["passage"][:shown]).T
    scores = table(
        ("held-out pairs", *METRICS), [(name, *(values[m] for m in METRICS)) for name, values in rows.items()]
    )
    note = f"<p>sentence-transformers and Megatron give the same vectors: smallest cosine {cosine:.7f}.</p>"
    similar = "".join(
        heat_map(matrix, queries, passages, caption=f"Cosine of held-out queries (rows) and passages, {when} training.")
        for when, matrix in (("before", early), ("after", late))
    )
    sections = [("Retrieval before and after", scores + note), ("Similarity: the diagonal holds the pairs", similar)]
    write_report(path, [read_run(run)], title="megatron-embed: the demo", sections=sections)


def summary(rows: dict[str, Any], cosine: float, out: Path, seconds: float, *, wanted: float) -> int:
    """Print the closing table and return the exit status."""
    table = Table(title="Held-out docstring pairs")
    table.add_column("system")
    for metric in METRICS:
        table.add_column(metric, justify="right")
    for name, values in rows.items():
        table.add_row(name, *(f"{values[metric]:.4f}" for metric in METRICS))
    console.print()
    console.print(table)
    rise = rows["after"]["ndcg@10"] - rows["before"]["ndcg@10"]
    console.print(f"nDCG@10 rose by {rise:.4f}; export and checkpoint agree to cosine {cosine:.7f}.")
    console.print(f"The embedder: {out / 'export'}\nThe report: {out / 'report.html'}\n{seconds:.0f} s in all")
    if rise < wanted or cosine < 0.99999:
        console.print(f"Expected a rise of {wanted:.2f} and a cosine of 0.99999 at least.", style="red")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
