"""Texts encoded a second, beside sentence-transformers' ``encode``: same weights, texts, dtype; one process.

    python benchmarks/encode.py --tokenizer DIR --data nfcorpus_proc

Both sides load the same folder, are warm, and take turns; the order of the turns alternates. Encoding includes
everything from texts to a numpy array. sentence-transformers is measured at several batch sizes, and its best one
counts.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import SMALL, make_embedder, timed, write_result

from megatron_embed.recipes import Encoder
from megatron_embed.recipes.datasets.corpus import Corpus

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPTS = {"query": "query", "passage": "document"}


def texts_of(folder: Path, kind: str, limit: int | None) -> list[str]:
    """Return a BEIR folder's queries or passages; if there are more than ``limit``, that many spread over the file."""
    corpus = Corpus(folder, kind)
    texts = corpus.read(0, len(corpus))[1]
    return texts if limit is None else texts[:: max(1, len(texts) // limit)][:limit]


def least_cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the least cosine between both sides' vectors of a text, in fp64."""
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    return float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


def compare(encoder: Encoder, model: Any, texts: list[str], kind: Any, repeats: int, sizes: Sequence[int]) -> list[str]:
    """Measure both sides; return the cells of a row of the table."""
    found: dict[str, np.ndarray] = {}

    def ours() -> None:
        found["ours"] = encoder.encode(texts, kind=kind)

    def theirs(size: int) -> None:
        # Ask for tensors, because numpy has no bf16.
        rows = model.encode(texts, prompt_name=PROMPTS[kind], batch_size=size, convert_to_tensor=True)
        found["theirs"] = rows.float().numpy()

    ours()  # warm
    took = {size: timed(lambda size=size: theirs(size)) for size in sizes}
    best = min(took, key=lambda size: took[size])
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for turn in range(repeats):
        sides = [("ours", ours), ("theirs", lambda: theirs(best))]
        for name, run in sides if turn % 2 == 0 else sides[::-1]:
            seconds[name].append(timed(run))
    a, b = statistics.median(seconds["ours"]), statistics.median(seconds["theirs"])
    ratios = sorted(y / x for x, y in zip(seconds["ours"], seconds["theirs"], strict=True))
    tokens = sum(map(len, encoder.tokenizer.tokenize(texts, kind)))
    cosine = least_cosine(found["ours"], found["theirs"])
    return [
        f"{len(texts):,}",
        f"{tokens:,}",
        f"{tokens / a:,.0f}",
        f"{tokens / b:,.0f} (batch {best})",
        f"**{b / a:.2f}×** ({ratios[0]:.2f} to {ratios[-1]:.2f})",
        f"{cosine:.8f}",
    ]


def main() -> None:
    from sentence_transformers import SentenceTransformer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--data", type=Path, required=True, help="BEIR folder")
    parser.add_argument("--limit", type=int, help="texts of each kind (default: all)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 32, 64], help="sentence-transformers'")
    parser.add_argument("--max-tokens", type=int, help="ours (default: the Encoder's own)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=SMALL["num_hidden_layers"])
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = [
        "| texts | dtype | count | tokens | ours, tokens/s | theirs, tokens/s | ratio (range) | least cosine |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_embedder(Path(temporary), options.tokenizer, num_hidden_layers=options.layers)
        for name, dtype in DTYPES.items():
            model: Any = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": dtype})
            with Encoder.from_pretrained(folder, device="cpu", dtype=dtype, max_tokens=options.max_tokens) as encoder:
                for kind in ("passage", "query"):
                    texts = texts_of(options.data, kind, options.limit)
                    cells = compare(encoder, model, texts, kind, options.repeats, options.batch_sizes)
                    table.append(f"| {kind} | {name} | {' | '.join(cells)} |")
                    print(table[-1], flush=True)
    settings = {"model": {**SMALL, "num_hidden_layers": options.layers}, "data": options.data.name, "max_length": 512}
    settings |= {key: getattr(options, key) for key in ("limit", "repeats", "batch_sizes", "max_tokens", "threads")}
    if not options.no_write:
        write_result("encode", "Encoding beside sentence-transformers", "\n".join(table), settings)


if __name__ == "__main__":
    main()
