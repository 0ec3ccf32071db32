"""Training steps a second, beside sentence-transformers: same weights, texts, dtype, optimizer; one process.

    python benchmarks/train_step.py --tokenizer DIR --data squad.jsonl medquad.jsonl

Both sides are warm and take turns step by step, so that other load on the machine affects both. A step includes
everything: tokenising, forward, loss, backward, clipping and AdamW (torch's fused kernel on both sides).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common import SMALL, make_embedder, matmul_flops, resident, timed, write_result

from megatron_embed.bridge.parallel import Layout, parallel_world, select_device
from megatron_embed.recipes.config.schema import DataSource, LossSection, OptimizerSection
from megatron_embed.recipes.datasets.pairs import PairDataset
from megatron_embed.recipes.datasets.sampler import GlobalBatchSampler
from megatron_embed.recipes.datasets.tokenization import TextTokenizer
from megatron_embed.recipes.encoding.micro_batches import BatchingPlan, MicroBatch
from megatron_embed.recipes.encoding.source import ModelSource
from megatron_embed.recipes.planning.flops import model_flops
from megatron_embed.recipes.training.loss import ContrastiveLoss
from megatron_embed.recipes.training.optimizer import set_up_training
from megatron_embed.recipes.training.rank_batch import BatchBuilder, RankBatch, micro_batches
from megatron_embed.recipes.training.step import contrastive_step

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def builder_of(folder: Path, dataset: PairDataset, batch: int, length: int) -> BatchBuilder:
    """Return the builder of the batches that both sides train on."""
    tokenizer = TextTokenizer.from_folder(
        folder,
        query_prompt="query: ",
        passage_prompt="passage: ",
        query_max_length=length,
        passage_max_length=length,
    )
    return BatchBuilder(dataset, GlobalBatchSampler(dataset, batch, 0), tokenizer, 0, LossSection(), 0, 1)


class Ours:
    """A training step of this project on a single rank.

    Args:
        kept: the share of the micro-batches whose graphs a cached step keeps.
    """

    def __init__(self, folder: Path, builder: BatchBuilder, dtype: torch.dtype, mode: str, kept: float = 0.0):
        from megatron_embed.bridge.encoder import build_stages, transformer_config

        source = ModelSource.open(folder)
        stages = build_stages(source.config, transformer_config(source.config, Layout(), dtype=dtype))
        source.fill(stages, tp_rank=0, tp_size=1)
        self.mode, self.kept, self.config = mode, kept, source.config
        self.state = set_up_training(stages, OptimizerSection(lr=1e-5, distributed=False), train_iters=10_000)
        self.builder, self.loss = builder, ContrastiveLoss(LossSection())
        tokens = 16384 if mode == "direct" else 4096
        self.plan = BatchingPlan(pad_id=11, packed=True, max_tokens=tokens)

    def step(self, number: int) -> Any:
        batch = self.builder.build(number)
        self.compute(batch, micro_batches(self.plan, batch, mode=self.mode))
        return batch

    def compute(self, batch: RankBatch, groups: list[MicroBatch]) -> None:
        for stage in self.state.stages:
            stage.zero_grad_buffer()
        self.state.optimizer.zero_grad()
        kept = round(self.kept * len(groups))
        contrastive_step(self.state.stages, groups, batch.targets, self.loss, mode=self.mode, kept=kept)  # type: ignore[arg-type]
        self.state.optimizer.step()
        self.state.scheduler.step(increment=1)


class Theirs:
    """The same step by sentence-transformers' loss in the textbook loop."""

    def __init__(self, folder: Path, builder: BatchBuilder, dtype: torch.dtype, form: str, mini_batch: int | None):
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss

        self.model = SentenceTransformer(str(folder), device="cpu")
        self.model.max_seq_length = builder.tokenizer.max_lengths["passage"]
        if form == "16-bit weights":
            self.model = self.model.to(dtype)
        self.autocast = form == "autocast"
        self.dtype = dtype
        if mini_batch is None:
            self.loss: Any = MultipleNegativesRankingLoss(self.model, scale=50.0)
        else:
            self.loss = CachedMultipleNegativesRankingLoss(self.model, scale=50.0, mini_batch_size=mini_batch)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.builder = builder

    def step(self, number: int) -> None:
        examples = [self.builder.dataset[i] for i in self.builder.sampler.batch(number)]
        columns = [["query: " + e.query for e in examples], ["passage: " + e.positive for e in examples]]
        self.model.train()
        with torch.autocast("cpu", self.dtype, enabled=self.autocast):
            loss = self.loss([self.model.preprocess(column) for column in columns], None)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def of_halves(path: Path, folder: Path, words: int = 80) -> DataSource:
    """Make pairs whose texts are all longer than the limit: two consecutive stretches of each long paragraph."""
    made = folder / "halves.jsonl"
    with path.open(encoding="utf-8") as file, made.open("w", encoding="utf-8") as out:
        for line in file:
            found = json.loads(line)["positive"].split()
            if len(found) >= 2 * words:
                pair = {"query": " ".join(found[:words]), "positive": " ".join(found[words : 2 * words])}
                out.write(json.dumps(pair) + "\n")
    return DataSource(path=str(made))


def compare(folder: Path, data: PairDataset, args: dict[str, Any], matmul: float) -> str:
    """Measure both sides; return one row of the table."""
    dtype = DTYPES[args["dtype"]]
    builder = builder_of(folder, data, args["batch"], args["length"])
    ours = Ours(folder, builder, dtype, args["mode"])
    forms = ["fp32"] if dtype == torch.float32 else ["autocast", "16-bit weights"]
    sizes = [None] if args["mode"] == "direct" else [32, 64]
    rivals = {
        f"{form}{f', mini-batch {size}' if size else ''}": Theirs(folder, builder, dtype, form, size)
        for form in forms
        for size in sizes
    }
    seconds: dict[str, list[float]] = {name: [] for name in ("ours", *rivals)}
    tokens, squares, padded = 0, 0, 0
    for number in range(args["warmup"] + args["steps"]):
        batches: list[Any] = []
        took = {"ours": timed(lambda n=number, found=batches: found.append(ours.step(n)))}
        for name, rival in rivals.items():
            took[name] = timed(lambda n=number, rival=rival: rival.step(n))
        if number < args["warmup"]:
            if number == args["warmup"] - 1 and len(rivals) > 1:  # after the warm-up, only their best setting goes on
                best = min(rivals, key=lambda name: took[name])
                rivals = {best: rivals[best]}
            continue
        (batch,) = batches
        lengths = [len(ids) for ids in batch.sequences]
        half = len(lengths) // 2
        tokens += sum(lengths)
        squares += sum(n * n for n in lengths)
        padded += half * (max(lengths[:half]) + max(lengths[half:]))
        for name in ("ours", *rivals):
            seconds[name].append(took[name])
    (best,) = rivals
    args["best"] = best
    a, b = statistics.median(seconds["ours"]), statistics.median(seconds[best])
    per_step = tokens / args["steps"]
    flops = model_flops(ours.config, tokens=tokens // args["steps"], squared_lengths=squares // args["steps"])
    return (
        f"| {args['name']} | {args['dtype']} | {args['batch']} | {args['length']} | {per_step:.0f} | "
        f"{padded / tokens:.2f} | {per_step / a:,.0f} | {per_step / b:,.0f} ({best}) | **{b / a:.2f}×** | "
        f"{flops / a / matmul:.0%} | {flops / b / matmul:.0%} |"
    )


def cached_over_direct(folder: Path, data: PairDataset, dtype: torch.dtype, steps: int) -> float:
    """Return the ratio of a cached step's seconds to a direct one's, on equal batches (64 pairs, up to 256 tokens)."""
    builder = builder_of(folder, data, 64, 256)
    sides = {mode: Ours(folder, builder, dtype, mode) for mode in ("direct", "cached")}
    seconds: dict[str, list[float]] = {mode: [] for mode in sides}
    for number in range(2 + steps):
        for mode, side in sides.items():
            seconds[mode].append(timed(lambda n=number, side=side: side.step(n)))
    return statistics.median(seconds["cached"][2:]) / statistics.median(seconds["direct"][2:])


def peak_memory(folder: Path, data: Path, side: str, dtype: str, threads: int) -> float:
    """Return the peak resident GiB of two cached steps of 1024 pairs by one side, alone in this process.

    Args:
        side: ``ours``, or the name of one of their settings.
    """
    torch.set_num_threads(threads)
    select_device("cpu")
    builder = builder_of(folder, PairDataset([DataSource(path=str(data))]), 1024, 128)
    with parallel_world(Layout()):
        if side == "ours":
            model: Any = Ours(folder, builder, DTYPES[dtype], "cached")
        else:
            form, _, size = side.partition(", mini-batch ")
            model = Theirs(folder, builder, DTYPES[dtype], form, int(size))
        for number in range(2):
            model.step(number)
    return resident("VmHWM") / 2**30


def peak_memories(folder: Path, data: Path, args: dict[str, Any], threads: int) -> str:
    """Return a sentence with both sides' peak memory, each measured in a separate process."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        ours, theirs = (
            pool.submit(peak_memory, folder, data, side, args["dtype"], threads).result()
            for side in ("ours", args["best"])
        )
    return (
        f"* {args['name']}, {args['dtype']}: peak resident memory of a process, ours {ours:.2f} GiB, "
        f"theirs {theirs:.2f} GiB ({args['best']})."
    )


def benchmark_rows(sentence_pairs: Path, paragraph_pairs: Path, scratch: Path) -> list[dict[str, Any]]:
    """Return the settings of each row of the table."""
    sentences, paragraphs, halves = (
        PairDataset([source])
        for source in (
            DataSource(path=str(sentence_pairs)),
            DataSource(path=str(paragraph_pairs)),
            of_halves(paragraph_pairs, scratch),
        )
    )
    return [
        {"name": "question/sentence", "data": sentences, "batch": 64, "length": 128},
        {"name": "question/paragraph", "data": paragraphs, "batch": 64, "length": 256},
        {"name": "all of 64 tokens", "data": halves, "batch": 64, "length": 64},
        {"name": "all of 8 tokens", "data": paragraphs, "batch": 64, "length": 8},
        {
            "name": "cached, batch 1024",
            "data": sentences,
            "batch": 1024,
            "length": 128,
            "mode": "cached",
            "steps": 2,
            "warmup": 1,
            "dtypes": ["fp32"],  # only one dtype, because a step takes minutes
        },
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument(
        "--data", type=Path, nargs=2, required=True, help="question/sentence and question/paragraph pairs"
    )
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name contains one of these")
    parser.add_argument("--result", default="train-step", help="name of the result file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    select_device("cpu")
    table = [
        "| data | dtype | batch | length | tokens | padding | ours, tokens/s | theirs | ratio | of matmul | theirs |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    beside: list[str] = []
    with tempfile.TemporaryDirectory() as temporary, parallel_world(Layout()):
        scratch = Path(temporary)
        rows = benchmark_rows(*options.data, scratch)
        folder = make_embedder(scratch / "model", options.tokenizer)
        for dtype in DTYPES:
            matmul = matmul_flops(DTYPES[dtype])
            for row in rows:
                if not any(part in row["name"] for part in options.only) or dtype not in row.get("dtypes", DTYPES):
                    continue
                args = {"mode": "direct", "steps": options.steps, "warmup": 2, **row, "dtype": dtype}
                table.append(compare(folder, args.pop("data"), args, matmul))
                print(table[-1], flush=True)
                if args["mode"] == "cached":
                    beside.append(peak_memories(folder, options.data[0], args, options.threads))
                    print(beside[-1], flush=True)
            paragraphs = rows[1]["data"]
            if any(part in "cached over direct" for part in options.only):
                ratio = cached_over_direct(folder, paragraphs, DTYPES[dtype], options.steps)
                beside.append(f"* Cached over direct, {dtype}: {ratio:.2f} of its time (in theory 1.33).")
                print(beside[-1], flush=True)
    settings = {
        "rows": options.only,
        "model": SMALL,
        "steps measured": options.steps,
        "threads": options.threads,
        "temperature": 0.02,
    }
    write_result(
        options.result, "Training steps beside sentence-transformers", "\n".join([*table, "", *beside]), settings
    )


if __name__ == "__main__":
    main()
