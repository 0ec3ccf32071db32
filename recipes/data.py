"""Describe a data file as training will read it: ``python -m megatron_embed.recipes.data FILE …``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.arguments import filled
from megatron_embed.recipes import RECIPES
from megatron_embed.recipes.cli import FirstRankParser, run_program
from megatron_embed.recipes.config.run_config import load_run_config
from megatron_embed.recipes.config.schema import DataSection, DataSource
from megatron_embed.recipes.datasets.inspection import findings_as_text, look_through
from megatron_embed.recipes.datasets.odd_rows import report


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    The status is 0 if all rows are usable, 1 if a row is unusable or a file unreadable, and 2 for bad arguments or a
    bad config.
    """
    parser = FirstRankParser(prog="megatron_embed.recipes.data", description="Look through training data.")
    parser.add_argument("files", nargs="*", metavar="FILE", help="JSONL, JSON or Parquet file, BEIR folder, hf://…")
    parser.add_argument("--config", metavar="FILE.yaml", help="a run_config.yaml: its sources, prompts and lengths")
    parser.add_argument(
        "--model", type=filled, help="Hugging Face folder or Megatron checkpoint: samples as its tokenizer has them"
    )
    parser.add_argument("--strict", action="store_true", help="end with status 1 where anything is to be remarked")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)
    if not args.files and not args.config:
        parser.error("nothing to look through: wanted a FILE, or --config FILE.yaml")
    run_program(lambda: _run(args), debug=args.debug)


def _run(args: Any) -> None:
    data, unusable = load_run_config(args.config, recipes=RECIPES).data if args.config else DataSection(), []
    if args.files:
        data = data.model_copy(update={"train": [DataSource(path=path) for path in args.files]})
    tokenizer = None
    if args.model:
        from megatron_embed.recipes.encoding.source import ModelSource

        # any attention is accepted, because none is computed here
        tokenizer = ModelSource.open(args.model, bidirectional=True).tokenizer(data)
    odd = []
    for source in data.sources():
        found = look_through(source.path, source.stated())
        print(findings_as_text(found, source, tokenizer))
        if found.unusable:
            unusable.append(f"{source.path}: {found.unusable:,} rows cannot be used, the first on {found.problems[0]}")
        odd.append(found.odd)
    if unusable:
        raise UserError("; ".join(unusable))
    if args.strict:
        report(odd, strict=True)


if __name__ == "__main__":
    main()
