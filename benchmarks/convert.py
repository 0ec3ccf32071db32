"""Import and export at the real sizes, beside ``cp -r`` of the same bytes on the same disk in the same run.

    python benchmarks/convert.py --size 3b 8b 14b --workdir /fast/disk
    python benchmarks/convert.py --size tiny          # seconds; writes no result

The models have the names and shapes of the real configs and random values. Each step starts with its files out of the
page cache and ends with ``sync``. A conversion is the command line in its own process, including Python's start; its
anonymous memory (all but page cache) is sampled. Conversion and cp take turns at going first. Each removes its old
output right before its next run. The report has the medians and every single time. One size is on disk at a time, at
most three models at 8B (54 GB) and two at 14B (56 GB).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from common import write_result

CONFIGS = Path(__file__).parents[1] / "tests" / "fixtures" / "hf_configs"
SCRIPT = Path(__file__).parents[1] / "conversion" / "convert_checkpoints.py"
SIZES = {"tiny": "ministral-3-3b", "3b": "ministral-3-3b", "8b": "ministral-3-8b", "14b": "ministral-3-14b"}
#: limits of the issue: ratio of seconds to those of cp, and anonymous GiB
RATIO, MEMORY = 1.5, {"tiny": 3.0, "3b": 3.0, "8b": 4.0, "14b": 5.0}


#: seconds of rest before each step
SETTLE = 2.0

# ---- the source


def make_source(folder: Path, size: str) -> int:
    """Write a whole VLM of random bf16 values, from one random block, in 5 GB shards; return its tensors' bytes."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    from megatron_embed.conversion.hf.safetensors_writer import TensorSpec, _header, _plan
    from megatron_embed.conversion.hf.stored_tensors import INDEX

    raw = json.loads((CONFIGS / f"{SIZES[size]}.json").read_text())
    if size == "tiny":
        raw["text_config"] |= {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 512}
    with torch.device("meta"):
        model = Mistral3ForConditionalGeneration(Mistral3Config(**json.loads(json.dumps(raw))))
    names = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.", "model.": ""}
    specs = []
    for name, parameter in model.named_parameters():
        old = next(prefix for prefix in names if name.startswith(prefix))
        specs.append(TensorSpec(names[old] + name.removeprefix(old), tuple(parameter.shape), torch.bfloat16))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    _make_tokenizer(folder)
    block = (torch.randn(1 << 27) * 0.02).bfloat16().view(torch.uint8).numpy()
    norm = (1 + torch.randn(1 << 14) * 0.02).bfloat16().view(torch.uint8).numpy()
    shards = _plan(specs, 5 * 10**9)
    weight_map, at = {}, 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with (folder / file).open("wb") as stream:
            stream.write(_header(shard))
            for spec in shard:
                values = norm if "norm" in spec.name else block  # norms near 0 would make all states vanish
                left = spec.nbytes
                while left:
                    at %= len(values)
                    written = stream.write(memoryview(values[at : at + left]))
                    at, left = at + written, left - written
        weight_map |= {spec.name: file for spec in shard}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(spec.nbytes for spec in specs)


def _make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["a b c"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


# ---- measuring


@dataclass(frozen=True)
class Cost:
    """The seconds of a step's runs, ``sync`` included, and the peak GiB of all its processes without page cache."""

    runs: tuple[float, ...]
    memory: float
    #: processor seconds (user and system), the median of the runs
    processor: float

    @property
    def seconds(self) -> float:
        return statistics.median(self.runs)

    @classmethod
    def of(cls, costs: Sequence[Cost]) -> Cost:
        runs = tuple(seconds for cost in costs for seconds in cost.runs)
        return cls(runs, max(c.memory for c in costs), statistics.median(c.processor for c in costs))


def measure(command: Sequence[str | os.PathLike[str]], written: Path, *cold: Path) -> Cost:
    """Remove a program's old output, run it on files that are not in the page cache, and run ``sync``."""
    shutil.rmtree(written, ignore_errors=True)
    forget(*cold)
    time.sleep(SETTLE)  # the disk may still be discarding the removed files
    began = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
    peak = Peak(process.pid)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    subprocess.run(["sync"], check=True)
    seconds = time.perf_counter() - began
    memory = peak.stop() / 2**30
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: exit {process.returncode}")
    return Cost((seconds,), memory, usage.ru_utime + usage.ru_stime)


class Peak:
    """A sampler of the anonymous memory of a process and its children, every 20 ms."""

    def __init__(self, pid: int) -> None:
        self._process, self._peak, self._done = psutil.Process(pid), 0, threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()

    def _sample(self) -> None:
        while not self._done.wait(0.02):
            try:
                family = [self._process, *self._process.children(recursive=True)]
                self._peak = max(self._peak, sum(map(_anonymous, family)))
            except psutil.NoSuchProcess:
                continue

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return self._peak


def _anonymous(process: psutil.Process) -> int:
    try:
        text = Path(f"/proc/{process.pid}/status").read_text()
    except FileNotFoundError:
        return 0
    fields = dict(line.split(":", 1) for line in text.splitlines())
    return sum(int(fields.get(key, "0 kB").split()[0]) << 10 for key in ("RssAnon", "RssShmem"))


def forget(*folders: Path) -> None:
    """Drop the files' pages from the cache, so that every program reads from disk."""
    subprocess.run(["sync"], check=True)
    for path in files_of(*folders):
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def files_of(*folders: Path) -> Iterator[Path]:
    """Yield all files below the folders."""
    for folder in folders:
        yield from (path for path in folder.rglob("*") if path.is_file())


def size_of(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in files_of(folder))


def against_cp(command: Sequence[str], source: Path, out: Path, work: Path, repeats: int) -> tuple[Cost, Cost]:
    """Measure a conversion, and ``cp -r`` with ``sync`` of its output; in every other repeat cp goes first.

    ``out`` keeps the output of the last run.
    """
    costs, copies = [], []

    def converted() -> None:
        costs.append(measure(command, out, source))

    def copied() -> None:
        copies.append(measure(["cp", "-r", out, work / "copy"], work / "copy", out))

    for repeat in range(repeats):
        for run in (copied, converted) if repeat % 2 else (converted, copied):
            run()
    shutil.rmtree(work / "copy")
    return Cost.of(costs), Cost.of(copies)


# ---- the steps


@dataclass(frozen=True)
class Row:
    """A conversion compared with a copy of the bytes that it writes."""

    size: str
    what: str
    nbytes: int
    cost: Cost
    #: ``cp -r`` of the same bytes; None if not measured
    copied: Cost | None

    def cells(self) -> list[str]:
        copied = f"{self.copied.seconds:.1f}" if self.copied else "–"
        ratio = f"{self.cost.seconds / self.copied.seconds:.2f}" if self.copied else "–"
        return [
            self.size,
            self.what,
            f"{self.nbytes / 1e9:.1f}",
            f"{self.cost.seconds:.1f}",
            copied,
            ratio,
            f"{self.cost.processor:.1f}, {self.copied.processor:.1f}" if self.copied else f"{self.cost.processor:.1f}",
            f"{self.cost.memory:.2f}",
            " ".join(f"{seconds:.1f}" for seconds in self.cost.runs),
            " ".join(f"{seconds:.1f}" for seconds in self.copied.runs) if self.copied else "–",
        ]


def convert(*args: object) -> list[str]:
    """Return the command line of a conversion."""
    return [sys.executable, str(SCRIPT), *map(str, args), "--no-progress"]


def run_size(size: str, work: Path, repeats: int) -> tuple[list[Row], list[str]]:
    """Run all steps of one size and remove their files; return rows and further findings."""
    work.mkdir(parents=True, exist_ok=True)
    source, megatron, out = work / "source", work / "megatron", work / "hf"
    rows: list[Row] = []
    notes: list[str] = []

    def add(what: str, written: Path, cost: Cost, copied: Cost | None) -> None:
        rows.append(Row(size, what, size_of(written), cost, copied))
        print(" | ".join(rows[-1].cells()), flush=True)

    try:
        make_source(source, size)
        import_all = convert("import", "--hf-model", source, "--megatron-path", megatron, "--with-vision")
        if size == "14b":  # two models fill the disk, so there is no room for cp's copy
            add("import --with-vision, alone", megatron, measure(import_all, megatron, source), None)
            shutil.rmtree(source)
            export = convert("export", "--megatron-path", megatron, "--hf-path", out)
            add("export, source deleted", out, measure(export, out, megatron), None)
            return rows, notes
        both = against_cp(import_all, source, megatron, work, repeats)
        add("import --with-vision", megatron, *both)
        if size == "8b":  # four models would fill the disk
            shutil.rmtree(source)
        vlm = convert("export", "--megatron-path", megatron, "--hf-path", out, "--target", "vlm")
        add("export --target vlm", out, *against_cp(vlm, megatron, out, work, repeats))
        notes += _same_files(source, out) if source.exists() else []
        embedder = convert("export", "--megatron-path", megatron, "--hf-path", out)
        shutil.rmtree(out)
        add("export (embedder)", out, *against_cp(embedder, megatron, out, work, repeats))
        shutil.rmtree(out)
        if size in ("tiny", "3b"):
            stock = [sys.executable, __file__, "--transformers", str(source), str(out)]
            add("transformers: from_pretrained + save_pretrained", out, *against_cp(stock, source, out, work, repeats))
            shutil.rmtree(out)
            shutil.rmtree(megatron)
            notes += direct_start(source, size)
    finally:
        for folder in (source, megatron, out, work / "copy"):
            shutil.rmtree(folder, ignore_errors=True)
    return rows, notes


def _same_files(source: Path, out: Path) -> list[str]:
    """Compare the imported and exported VLM with its source, tensor by tensor."""
    from megatron_embed.conversion.hf.folder import HFFolder

    a, b = HFFolder(source), HFFolder(out)
    assert a.names() == b.names()
    for name in a.names():
        assert torch.equal(a.read(name), b.read(name)), name
    return [f"The {len(a.names())} tensors of the exported VLM equal the source's, bit by bit."]


def with_transformers(source: Path, out: Path) -> None:
    """Load and save a model with transformers, for the comparison."""
    from transformers import Mistral3ForConditionalGeneration

    model = Mistral3ForConditionalGeneration.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(out)


# ---- loading straight from the folder


def direct_start(source: Path, size: str) -> list[str]:
    """Fill a model from the folder on four ranks, TP 2 × PP 2; compare the bytes each rank requests and holds."""
    import torch.multiprocessing as mp

    forget(source)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_direct_rank, args=(folder, str(source)), nprocs=4)
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(4)]
    lines = [
        "",
        f"Direct start at {size} with four ranks, TP 2 × PP 2, bf16:",
        "",
        "| rank | GB requested | GB of its parameters | ratio | seconds | GiB not page cache |",
        "|---|---|---|---|---|---|",
    ]
    for rank, one in enumerate(found):
        ratio = one["requested"] / one["own"]
        assert abs(ratio - 1) <= 0.1, ratio
        lines.append(
            f"| {rank} | {one['requested'] / 1e9:.3f} | {one['own'] / 1e9:.3f} | {ratio:.4f} "
            f"| {one['seconds']:.1f} | {one['memory'] / 2**30:.2f} |"
        )
    return lines


def _direct_rank(rank: int, folder: str, source: str) -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="lo", LOCAL_WORLD_SIZE="4")
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_embed.bridge.cpu import host
    from megatron_embed.bridge.encoder import build_stages, transformer_config
    from megatron_embed.bridge.layout import Layout
    from megatron_embed.bridge.parallel import parallel_world
    from megatron_embed.conversion.hf.folder import HFFolder
    from megatron_embed.conversion.mcore.direct import load_hf_weights

    torch.set_num_threads(1)
    host.run_on_cpu()
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=4)
    layout = Layout(tp=2, pp=2)
    with parallel_world(layout):
        files = HFFolder(source)
        config = files.encoder_config()
        stages = build_stages(config, transformer_config(config, layout, dtype=torch.bfloat16))
        peak, began = Peak(os.getpid()), time.perf_counter()
        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        load_hf_weights([(s, s.layer_offset) for s in stages], files, config, tp_rank=tp_rank, tp_size=2)
        own = sum(math.prod(p.shape) * p.element_size() for stage in stages for p in stage.parameters())
        result: dict[str, Any] = {
            "requested": files.bytes_requested,
            "own": own,
            "seconds": time.perf_counter() - began,
            "memory": peak.stop(),
        }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def main() -> None:
    """Measure, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["3b", "8b", "14b"])
    parser.add_argument("--workdir", type=Path, default=Path(tempfile.gettempdir()) / "convert-benchmark")
    parser.add_argument("--repeats", type=int, default=3, help="of each step beside cp; the median is reported")
    parser.add_argument("--transformers", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.transformers:
        with_transformers(*args.transformers)
        return
    rows, notes, load = [], [], os.getloadavg()[0]
    for size in args.size:
        found, more = run_size(size, args.workdir, args.repeats)
        rows += found
        notes += more
    head = ["size", "step", "GB written", "seconds", "cp -r + sync, seconds", "ratio"]
    head += ["processor seconds: step, cp", "GiB not page cache", "all runs", "all runs of cp"]
    table = [head, ["---"] * len(head), *(row.cells() for row in rows)]
    body = "\n".join("| " + " | ".join(cells) + " |" for cells in table)
    for row in rows:
        if not row.what.startswith("transformers") and row.cost.memory > MEMORY[row.size]:
            notes.append(f"Over the goal: {row.what} at {row.size} took {row.cost.memory:.2f} GiB.")
        if not row.what.startswith("transformers") and row.copied and row.cost.seconds > RATIO * row.copied.seconds:
            notes.append(f"Over the goal: {row.what} at {row.size} took more than {RATIO} × cp.")
    body += "\n\n" + "\n".join(notes)
    if args.size == ["tiny"]:
        print(body)
        return
    disk = shutil.disk_usage(args.workdir)
    settings = {
        "sizes": ", ".join(args.size),
        "source": "the whole VLM in bf16, 5 GB shards, random values",
        "repeats": f"{args.repeats}, in turn; seconds are medians; 14b once",
        "max_shard_size": "5GB",
        "load average": f"{load:.1f} at the start, {os.getloadavg()[0]:.1f} at the end, its own steps included",
        "page cache": "the files that a step reads are dropped from it first; every step ends with sync",
        "disk": f"{disk.total / 1e9:.0f} GB, {disk.free / 1e9:.0f} GB free",
        "goals": f"{RATIO} × cp (1.2 aimed at); GiB not page cache: {MEMORY}",
    }
    write_result("convert", "Conversion at the real sizes", body, settings)


if __name__ == "__main__":
    main()
