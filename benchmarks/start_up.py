"""Time and memory from a program's start to its first batch of training pairs, at the first and the second start.

    python benchmarks/start_up.py [--rows 2000000] [--beside CHECKOUT]

The data are two files of synthetic pairs: one with few repeated texts, one in which four queries share each positive.
Each start is a separate process that opens the data, draws the first batch and reads its texts. The first start reads
every row and writes it into a table in a separate cache folder; the second start maps the table. ``--beside`` names a
checkout of another commit, whose starts are measured in turn with these.

Memory is the growth of resident memory (anonymous and file-mapped together) since the end of the imports, at the end
and at its peak.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

SHAPES = {"few repeated texts": 1, "four queries share each positive": 4}
GOALS = {"seconds to the first batch at the second start": 5, "MB of resident growth at any time": 300}


def write_pairs(path: Path, rows: int, sharing: int, seed: int = 0) -> None:
    """Write JSON lines: queries of about 60 characters, positives of about 300, negatives in every fifth row.

    Args:
        sharing: number of queries that share each positive. With 1, one row in fifty repeats another's positive.
    """
    chance = random.Random(seed)
    words = ["".join(chance.choices("abcdefghijklmnopqrstuvwxyzäé", k=chance.randint(2, 9))) for _ in range(5000)]
    phrases = [" ".join(chance.choices(words, k=15)) for _ in range(20_000)]

    def passage(number: int) -> str:
        at = number * 7919
        return f"{number} " + " ".join(phrases[(at + step * 104_729) % len(phrases)] for step in range(3))

    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            repeated = sharing == 1 and number % 50 == 0
            row: dict[str, Any] = {
                "query": f"{number} {phrases[number % len(phrases)][:52]}",
                "positive": passage(number // 2 if repeated else number // sharing),
            }
            if number % 5 == 0:
                row["negatives"] = [passage(rows + number + more) for more in range(1 + number % 3)]
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def memory() -> dict[str, float]:
    """Return the MB of this process: resident memory, the anonymous part of it, and the peak of resident memory."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    names = {"resident": "VmRSS", "anonymous": "RssAnon", "highest": "VmHWM"}
    return {name: int(fields[field].split()[0]) * 1024 / 1e6 for name, field in names.items()}


def start(path: str, batch: int) -> None:
    """Run one start, in this separate process, and print the measurements."""
    try:
        from megatron_embed.recipes.config.schema import DataSource
        from megatron_embed.recipes.datasets.pairs import PairDataset
        from megatron_embed.recipes.datasets.sampler import GlobalBatchSampler
    except ImportError:  # a commit from before the tables
        from megatron_embed.recipes.config import DataSource  # type: ignore[attr-defined, no-redef]
        from megatron_embed.recipes.data import GlobalBatchSampler, PairDataset  # type: ignore[no-redef]

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of resident memory
    imported, before = time.time(), memory()
    data = PairDataset([DataSource(path=path)])
    opened = time.time()
    examples = [data[index] for index in GlobalBatchSampler(data, batch, 0).batch(0)]
    done, after = time.time(), memory()
    found = {
        "imported": imported,
        "opened": opened,
        "done": done,
        "cpu": time.process_time(),
        "resident": after["resident"] - before["resident"],
        "anonymous": after["anonymous"] - before["anonymous"],
        "highest": after["highest"] - before["resident"],
        "batch": sha256(repr(examples).encode()).hexdigest(),
    }
    print(json.dumps(found))


def measured(path: Path, cache: Path, batch: int, checkout: str | None) -> dict[str, Any]:
    """Start a process and return its measurements, with times relative to its start."""
    command = [sys.executable, __file__, "--start", str(path), "--batch", str(batch)]
    environment = {**os.environ, "MEGATRON_EMBED_CACHE": str(cache)}
    if checkout is not None:
        environment["PYTHONPATH"] = str(Path(checkout).resolve() / ".types")
    began = time.time()
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    found["from process start"] = found["done"] - began
    found["from construction"] = found["done"] - found["imported"]
    found["sampler"] = found["done"] - found["opened"]
    return found


def compare(folder: Path, options: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """Run all starts; return the rows of the table and further notes."""
    table, notes, missed = [], {}, []
    for shape, sharing in SHAPES.items():
        path = folder / "pairs.jsonl"
        write_pairs(path, options.rows, sharing)
        batches = set()
        for version in (None, *([options.beside] if options.beside else [])):
            cache = folder / f"cache-{sharing}-{'here' if version is None else 'beside'}"
            for name in ("first", "second"):
                found = measured(path, cache, options.batch, version)
                batches.add(found["batch"])
                seconds = [f"{found[key]:.2f}" for key in ("from process start", "from construction", "sampler", "cpu")]
                grown = [f"{found[key]:.0f}" for key in ("resident", "anonymous", "highest")]
                of = f"{name}, {version}" if version else name
                table.append(f"| {shape} | {of} | {' | '.join(seconds + grown)} |")
                print(table[-1], flush=True)
                if version is None:
                    missed += [f"{shape}, {name} start: {found['highest']:.0f} MB"] * (found["highest"] > 300)
                    missed += [f"{shape}, second start"] * (name == "second" and found["from process start"] > 5)
            kept = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
            of = f" ({version})" if version else ""
            notes[f"{shape}: MB of the file, of what is kept{of}"] = (
                f"{path.stat().st_size / 1e6:.0f}, {kept / 1e6:.0f}"
            )
            shutil.rmtree(cache)
        if len(batches) > 1:
            raise SystemExit("the starts gave different batches")
        path.unlink()
    return table, {**notes, "goals": GOALS, "goals missed": "; ".join(missed) or "none"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--batch", type=int, default=1024, help="queries a step")
    parser.add_argument("--beside", metavar="CHECKOUT", help="another commit, measured in turn")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--start", help=argparse.SUPPRESS)  # the script calls itself with this option
    options = parser.parse_args()
    if options.start:
        start(options.start, options.batch)
        return
    from common import write_result

    load = os.getloadavg()[0]
    columns = ["data", "start", "s from process start", "s from construction", "s of it for the batch"]
    columns += ["processor s, with imports", "MB grown at the end", "MB of it anonymous", "MB grown at the highest"]
    table = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    with tempfile.TemporaryDirectory() as temporary:
        rows, settings = compare(Path(temporary), options)
    settings = {
        "rows": f"{options.rows:,}",
        "queries a step": options.batch,
        "memory": "resident (anonymous + file-mapped) beyond what it was after the imports, from /proc/self/status",
        "page cache": "warm: the file, and before the second start its table, have just been written",
        "load average at the start and the end": f"{load:.1f}, {os.getloadavg()[0]:.1f}",
        **settings,
    }
    body = "\n".join([*table, *rows, "", "The first batches of all starts hold the same examples."])
    if options.no_write:
        print(body, settings)
    else:
        write_result("start-up", "From a program's start to its first batch of training pairs", body, settings)


if __name__ == "__main__":
    main()
