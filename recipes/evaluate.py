"""Measure a model's retrieval quality on BEIR folders, and that of BM25.

``python -m megatron_embed.recipes.evaluate --model HF_FOLDER_OR_MEGATRON_CHECKPOINT --data BEIR_FOLDER …``
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_embed.bridge.errors import named
from megatron_embed.conversion.arguments import filled, filled_path
from megatron_embed.conversion.files.atomic import refuse_sources
from megatron_embed.conversion.hf.declared_attention import HELP
from megatron_embed.recipes.cli import FirstRankParser, run_program
from megatron_embed.recipes.datasets.beir import load_collections
from megatron_embed.recipes.datasets.odd_rows import report
from megatron_embed.recipes.model_arguments import check_output_file
from megatron_embed.recipes.retrieval.evaluation import evaluate, markdown_table
from megatron_embed.recipes.retrieval.vectors import write_file

if TYPE_CHECKING:
    import numpy as np


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with status 0, 1 (failed, with one message) or 2 (bad arguments)."""
    parser = FirstRankParser(prog="megatron_embed.recipes.evaluate", description="Evaluate on BEIR folders.")
    parser.add_argument("--model", type=filled, required=True, help="Hugging Face folder or Megatron checkpoint")
    parser.add_argument("--data", type=filled, required=True, nargs="+", metavar="BEIR_FOLDER", help="collections")
    parser.add_argument("--split", default="test", help="qrels/SPLIT.tsv (default: test)")
    parser.add_argument("--output", type=filled_path, metavar="FILE.json", help="write the numbers there too")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE.json")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--bidirectional", action="store_true", help=HELP)
    parser.add_argument("--no-bm25", action="store_true", help="leave BM25 out")
    parser.add_argument("--strict", action="store_true", help="rows and judgements that look odd are an error")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    run_program(lambda: _run(args), debug=args.debug)


def _run(args: argparse.Namespace) -> None:
    if args.output:
        with named("--output"):
            refuse_sources(args.output, map(Path, (args.model, *args.data)))
        check_output_file(args.output, overwrite=args.overwrite)
    first_rank = os.environ.get("RANK", "0") == "0"
    collections = load_collections(args.data, args.split)
    if first_rank or args.strict:  # with strict, all ranks must raise the error
        report([odd for collection in collections for odd in collection.odd], strict=args.strict)
    from megatron_embed.recipes.encoding.encoder import Encoder

    with Encoder.from_pretrained(
        args.model, device=args.device, bidirectional=args.bidirectional, scores=True
    ) as encoder:

        def encode(texts: Sequence[str], kind: Any) -> np.ndarray:
            return encoder.encode(texts, kind=kind, show_progress=sys.stderr.isatty())

        results = evaluate(encode, collections, bm25=not args.no_bm25)
    if not first_rank:
        return
    print(markdown_table(results))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(results, indent=2) + "\n"
        write_file(args.output, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()
