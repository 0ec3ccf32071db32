"""Write an HTML page about one or more runs: ``python -m megatron_embed.recipes.report RUN_DIR …``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_embed.conversion.arguments import filled_path
from megatron_embed.recipes.cli import FirstRankParser, run_program
from megatron_embed.recipes.training.run_report import read_run, write_report


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with status 0, 1 (failed, with one message) or 2 (bad arguments)."""
    parser = FirstRankParser(prog="megatron_embed.recipes.report", description="An HTML page about runs.")
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="folders of runs (train.save_dir)")
    parser.add_argument(
        "--output",
        type=filled_path,
        metavar="FILE.html",
        help="a new file, or an earlier report (default: report.html in the first run)",
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_args(argv)

    def body() -> None:
        runs = [read_run(folder) for folder in args.runs]
        print(write_report(args.output or Path(args.runs[0]) / "report.html", runs))

    run_program(body, debug=args.debug)


if __name__ == "__main__":
    main()
