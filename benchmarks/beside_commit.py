"""Training steps, encoding and conversions of this checkout beside those of another commit, in turns.

    git worktree add /tmp/before COMMIT
    python benchmarks/beside_commit.py --beside /tmp/before --tokenizer DIR --data medquad.jsonl

Every measurement is a process of its own, with the package and the benchmark scripts of its checkout; both take turns,
and which goes first alternates. A process of steps or texts is warm before it measures. A conversion is the whole
command.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
TEXTS, STEPS = 200, 4
#: a converted model: 270 M parameters in fp32
MEDIUM: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
}


def measure(kind: str, folder: Path, data: Path, threads: int) -> float:
    """Return the median seconds of a training step, or of encoding the texts, in this process."""
    import torch

    sys.path.remove(str(Path(__file__).resolve().parent))  # the scripts are those of the measured checkout
    import train_step
    from common import timed

    torch.set_num_threads(threads)
    work, dtype = kind.split()
    if work == "encode":
        from megatron_embed.recipes import Encoder

        lines = data.read_text(encoding="utf-8").splitlines()[:TEXTS]
        texts = [json.loads(line)["positive"] for line in lines]
        with Encoder.from_pretrained(folder, device="cpu", dtype=train_step.DTYPES[dtype]) as encoder:
            encoder.encode(texts[:100], kind="passage")
            return statistics.median(timed(lambda: encoder.encode(texts, kind="passage")) for _ in range(2))
    train_step.select_device("cpu")
    with train_step.parallel_world(train_step.Layout()):
        builder = train_step.builder_of(
            folder, train_step.PairDataset([train_step.DataSource(path=str(data))]), 64, 256
        )
        ours = train_step.Ours(folder, builder, train_step.DTYPES[dtype], work)
        seconds = [timed(lambda n=number: ours.step(n)) for number in range(2 + STEPS)]
    return statistics.median(seconds[2:])


def seconds_of(kind: str, checkout: Path, options: argparse.Namespace, models: Path) -> float:
    """Measure one kind of work in a process of a checkout."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    environment["PYTHONPATH"] = f"{checkout / '.types'}:{checkout / 'benchmarks'}"
    if kind in ("import", "export"):
        megatron, out = models / f"megatron-{checkout == HERE}", models / "out"
        way = ["--hf-model", str(models / "medium"), "--megatron-path", str(megatron)]
        if kind == "export":
            way = ["--megatron-path", str(megatron), "--hf-path", str(out)]
        for old in [megatron] if kind == "import" else [out]:
            shutil.rmtree(old, ignore_errors=True)
        command = [sys.executable, str(checkout / "conversion" / "convert_checkpoints.py"), kind, *way, "--no-progress"]
        began = time.perf_counter()
        subprocess.run(command, env=environment, check=True, capture_output=True)
        return time.perf_counter() - began
    own = [str(Path(__file__).resolve()), "--measure", kind, "--model", str(models / "small")]
    own += ["--data", str(options.data), "--threads", str(options.threads)]
    done = subprocess.run([sys.executable, *own], env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return float(done.stdout.splitlines()[-1])


KINDS = ("direct fp32", "direct bf16", "cached fp32", "cached bf16", "encode fp32", "encode bf16", "import", "export")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=Path, help="checkout of the other commit")
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json")
    parser.add_argument("--data", type=Path, required=True, help="question/paragraph pairs")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # the script calls itself with these
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(measure(options.measure, options.model, options.data, options.threads))
        return
    from common import SMALL, make_embedder, write_result

    table = ["| work | this, s | before, s | this over before | turns |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as temporary:
        models = Path(temporary)
        make_embedder(models / "small", options.tokenizer)
        make_embedder(models / "medium", options.tokenizer, **MEDIUM)
        for kind in options.only:
            seconds: dict[Path, list[float]] = {HERE: [], options.beside.resolve(): []}
            for turn in range(options.turns):
                for checkout in list(seconds)[:: 1 if turn % 2 == 0 else -1]:
                    seconds[checkout].append(seconds_of(kind, checkout, options, models))
            this, before = (statistics.median(each) for each in seconds.values())
            ratios = sorted(a / b for a, b in zip(*seconds.values(), strict=True))
            spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
            table.append(f"| {kind} | {this:.2f} | {before:.2f} | **{this / before:.2f}** | {spread} |")
            print(table[-1], flush=True)
    commit = ["git", "-C", str(options.beside), "rev-parse", "--short", "HEAD"]
    settings = {
        "before": subprocess.run(commit, check=True, capture_output=True, text=True).stdout.strip(),
        "steps and encoding": f"{SMALL}; batches of 64 pairs of up to 256 tokens, {STEPS} steps; {TEXTS} texts",
        "conversions": MEDIUM,
        "turns": options.turns,
        "threads": options.threads,
    }
    write_result(
        "beside-commit", "Steps, encoding and conversions beside an earlier commit", "\n".join(table), settings
    )


if __name__ == "__main__":
    main()
