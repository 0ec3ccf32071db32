"""``convert-checkpoints verify`` at the real sizes: seconds, peak memory, and whether it names a changed key.

    python benchmarks/verify.py --size 3b 14b --workdir /fast/disk
    python benchmarks/verify.py --size tiny           # seconds; writes no result

The models have the names and shapes of the real configs and random values. Every run is the command line in its own
process. ``verify`` compares configs, tokenizer, settings and every tensor, then embeds with both sides in fp32, one
layer at a time. Memory is the peak without page cache (``RssAnon + RssShmem``, sampled every 20 ms) and ``VmHWM``,
which also counts the pages of mapped files. One size is on disk at a time, with at most two models.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from common import write_result
from convert import SIZES, Peak, convert, forget, make_source, size_of

#: limit of the issue in GiB, without page cache
LIMIT = 4.0


class HighWater:
    """A reader of a process's ``VmHWM`` for as long as it lives."""

    def __init__(self, pid: int) -> None:
        self._status, self.bytes, self._done = Path(f"/proc/{pid}/status"), 0, threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        while not self._done.wait(0.02):
            try:
                lines = self._status.read_text().splitlines()
            except (FileNotFoundError, ProcessLookupError):
                return
            found = [int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")]
            self.bytes = max([self.bytes, *found])

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return self.bytes


def run(*args: object, cold: tuple[Path, ...] = (), status: int = 0) -> dict[str, Any]:
    """Run the command line on files that are not in the page cache."""
    forget(*cold)
    began = time.perf_counter()
    process = subprocess.Popen(convert(*args), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak, high = Peak(process.pid), HighWater(process.pid)
    assert process.stdout is not None
    output = process.stdout.read()
    _, code, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(code)
    seconds = time.perf_counter() - began
    memory, water = peak.stop() / 2**30, high.stop() / 2**30
    if process.returncode != status:
        raise SystemExit(f"{' '.join(map(str, args))}: exit {process.returncode}\n{output}")
    processor = usage.ru_utime + usage.ru_stime
    return {"seconds": seconds, "processor": processor, "memory": memory, "water": water, "output": output}


def embeddings_of(output: str) -> str:
    """Return the last column of the table's row about embeddings."""
    row = next(line for line in output.splitlines() if line.startswith("│ embeddings"))
    return row.split("│")[4].strip()


def run_size(size: str, work: Path) -> tuple[list[list[str]], list[str]]:
    """Do all runs of one size and remove their files; return rows and further findings."""
    work.mkdir(parents=True, exist_ok=True)
    source, megatron, out = work / "source", work / "megatron", work / "hf"
    rows: list[list[str]] = []
    notes: list[str] = []

    def add(what: str, *folders: Path, status: int = 0) -> str:
        flag = "--megatron-path" if folders[1] == megatron else "--hf-path"
        found = run("verify", "--hf-model", folders[0], flag, folders[1], cold=folders, status=status)
        total = sum(map(size_of, folders)) / 1e9
        numbers = [f"{total:.1f}", f"{found['seconds']:.0f}", f"{found['processor']:.0f}"]
        numbers += [f"{found['memory']:.2f}", f"{found['water']:.2f}"]
        rows.append([size, what, *numbers, embeddings_of(found["output"])])
        print(" | ".join(rows[-1]), flush=True)
        if found["memory"] > LIMIT:
            notes.append(f"Over the limit of {LIMIT} GiB: {what} at {size}.")
        return str(found["output"])

    try:
        make_source(source, size)
        run("import", "--hf-model", source, "--megatron-path", megatron)
        shown = add("source VLM against checkpoint", source, megatron)
        notes += ["", f"{size}, source VLM against checkpoint:", "", "```", shown.rstrip(), "```", ""]
        if size == "14b":  # three models would fill the disk
            shutil.rmtree(source)
        run("export", "--megatron-path", megatron, "--hf-path", out)
        add("exported embedder against checkpoint", out, megatron)
        if not source.exists():
            return rows, notes
        shutil.rmtree(megatron)
        add("source VLM against exported embedder", source, out)
        raw = json.loads((out / "config.json").read_text())
        raw["rope_parameters"]["rope_theta"] *= 10
        (out / "config.json").write_text(json.dumps(raw))
        shown = add("the same, rope_theta of the export × 10", source, out, status=1)
        notes += ["", f"{size}, rope_theta of the export changed: {shown.rstrip().splitlines()[-1]}", ""]
    finally:
        for folder in (source, megatron, out):
            shutil.rmtree(folder, ignore_errors=True)
    return rows, notes


def main() -> None:
    """Measure, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["3b", "14b"])
    parser.add_argument("--workdir", type=Path, default=Path(tempfile.gettempdir()) / "verify-benchmark")
    args = parser.parse_args()
    rows, notes, load = [], [], os.getloadavg()[0]
    for size in args.size:
        found, more = run_size(size, args.workdir)
        rows += found
        notes += more
    head = ["size", "compared", "GB on the disk", "seconds", "processor seconds", "GiB not page cache", "VmHWM, GiB"]
    head.append("largest difference of the embeddings")
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])
    body = table + "\n\n" + "\n".join(notes)
    if args.size == ["tiny"]:
        print(body)
        return
    settings = {
        "sizes": ", ".join(args.size),
        "source": "the whole VLM in bf16, 5 GB shards, random values; checkpoints without the vision tower",
        "texts": "3, in fp32 on both sides, tolerance 1e-5 of the largest value",
        "limit": f"{LIMIT} GiB that are not page cache",
        "load average": f"{load:.1f} at the start, {os.getloadavg()[0]:.1f} at the end",
        "page cache": "the files that a step reads are dropped from it first",
    }
    write_result("verify", "Verifying conversions at the real sizes", body, settings)


if __name__ == "__main__":
    main()
