"""Encode a corpus into a folder of vectors.

``torchrun … -m megatron_embed.recipes.encode --model M --input corpus.jsonl --output DIR``

The module imports torch only to encode, so ``--help`` and bad arguments do not wait for it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import NoReturn

from megatron_embed.bridge.errors import named
from megatron_embed.conversion.arguments import filled, filled_path, positive
from megatron_embed.conversion.files.disk_errors import check_writable
from megatron_embed.recipes.cli import FirstRankParser, run_program
from megatron_embed.recipes.datasets.corpus import Corpus
from megatron_embed.recipes.model_arguments import add_model_arguments, open_encoder
from megatron_embed.recipes.retrieval.vectors import DTYPES


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with status 0, 1 (failed, with one message) or 2 (bad arguments)."""
    parser = FirstRankParser(
        prog="megatron_embed.recipes.encode",
        description="Encode a corpus. Several processes: torchrun --nproc-per-node N -m …. Run again to resume.",
    )
    parser.add_argument("--model", type=filled, required=True, help="Hugging Face folder or Megatron checkpoint")
    parser.add_argument(
        "--input",
        type=filled,
        required=True,
        help="BEIR folder; JSONL, Parquet or hf://org/name with _id and text; plain lines",
    )
    parser.add_argument("--output", required=True, type=filled_path, metavar="DIR", help="folder of the vectors")
    parser.add_argument(
        "--kind",
        choices=("query", "passage", "text"),
        default="passage",
        help="which prompt and length; text: neither query nor passage, with the model's default prompt",
    )
    parser.add_argument("--prompt-name", metavar="NAME", help="this one of the model's prompts in the kind's place")
    parser.add_argument(
        "--dim", type=positive, metavar="DIM", help="keep the first DIM numbers of each vector (Matryoshka)"
    )
    parser.add_argument("--precision", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--strict", action="store_true", help="rows that look odd are an error")
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    run_program(lambda: _run(args), debug=args.debug)


def _run(args: argparse.Namespace) -> None:
    with named("--output"):
        check_writable(args.output)
    texts = Corpus(args.input, args.kind)
    from megatron_embed.recipes.retrieval.encode_corpus import encode_texts, report_oddities

    with open_encoder(args) as encoder:
        if args.prompt_name is not None:
            encoder.tokenizer.prompts[args.kind] = encoder.named_prompt(args.prompt_name)
        report_oddities(texts, strict=args.strict)
        found = encode_texts(
            encoder, texts, args.output, kind=args.kind, dim=args.dim, precision=args.precision, progress=True
        )
        if os.environ.get("RANK", "0") == "0":
            manifest = found.manifest
            print(
                f"{args.output}: {manifest.rows:,} vectors of {manifest.dim} × {manifest.precision} "
                f"in {len(manifest.shards)} shards"
            )


if __name__ == "__main__":
    main()
