"""Mine hard negatives for training data from a corpus.

``torchrun … -m megatron_embed.recipes.mine --model M --data TRAIN --corpus BEIR_FOLDER_OR_JSONL --output OUT.jsonl``

The module imports torch only to mine, so ``--help`` and bad arguments do not wait for it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import NoReturn

from megatron_embed.conversion.arguments import filled, filled_path, positive
from megatron_embed.recipes.cli import FirstRankParser, run_program
from megatron_embed.recipes.datasets.corpus import Corpus
from megatron_embed.recipes.datasets.inputs import check_source
from megatron_embed.recipes.model_arguments import add_model_arguments, check_output_file, open_encoder
from megatron_embed.recipes.retrieval.mining import MiningRules
from megatron_embed.recipes.retrieval.mining_report import audit_as_text, beside


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with status 0, 1 (failed, with one message) or 2 (bad arguments)."""
    parser = FirstRankParser(prog="megatron_embed.recipes.mine", description="Mine hard negatives.")
    parser.add_argument("--model", type=filled, required=True, help="Hugging Face folder or Megatron checkpoint")
    parser.add_argument("--data", type=filled, required=True, help="training data, any form that training takes")
    parser.add_argument("--corpus", type=filled, required=True, help="BEIR folder, file of texts, or hf://org/name")
    parser.add_argument("--output", required=True, type=filled_path, metavar="OUT.jsonl")
    parser.add_argument(
        "--negatives", type=positive, metavar="N", default=4, help="of each query, at most (default: 4)"
    )
    parser.add_argument(
        "--max-score-ratio", type=float, default=0.95, help="of the positive's score (default: 0.95; inf: off)"
    )
    parser.add_argument("--margin", type=float, help="negatives score lower than the positive by this at least")
    parser.add_argument("--rank-range", type=_rank_range, default=(0, 100), metavar="A:B", help="default: 0:100")
    teacher = parser.add_mutually_exclusive_group()
    teacher.add_argument("--scores", action="store_true", help="write the model's scores, for distillation")
    teacher.add_argument("--cross-encoder", metavar="MODEL", help="write this cross-encoder's scores, for distillation")
    parser.add_argument(
        "--faiss", nargs="?", const="Flat", metavar="FACTORY", help="search a FAISS index (default: Flat)"
    )
    parser.add_argument(
        "--cache", type=filled_path, metavar="DIR", help="folder of vectors (default: beside OUT.jsonl)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.jsonl")
    parser.add_argument("--strict", action="store_true", help="rows that look odd are an error")
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    run_program(lambda: _run(args), debug=args.debug)


def _rank_range(text: str) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    if not colon or not (first or "0").isdecimal() or not last.isdecimal():
        raise argparse.ArgumentTypeError(f"found {text!r}; wanted A:B, two whole numbers")
    return int(first or "0"), int(last)


def _run(args: argparse.Namespace) -> None:
    rules = MiningRules(args.negatives, args.rank_range, args.max_score_ratio, args.margin)
    check_output_file(args.output, overwrite=args.overwrite)
    check_source(args.data)
    corpus = Corpus(args.corpus)
    from megatron_embed.recipes.retrieval.miner import mine

    with open_encoder(args, scores=True) as encoder:
        audit = mine(
            encoder,
            args.data,
            corpus,
            args.output,
            rules=rules,
            cache=args.cache or args.output.parent / "vectors",
            with_scores=args.scores,
            cross_encoder=args.cross_encoder,
            faiss=args.faiss,
            progress=True,
            strict=args.strict,
            overwrite=args.overwrite,
        )
        if os.environ.get("RANK", "0") == "0":
            print(audit_as_text(audit, rules))
            print(f"written to {args.output}; scores in {beside(args.output, '.scores.png')}")


if __name__ == "__main__":
    main()
