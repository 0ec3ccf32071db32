"""Memory, communication and pipeline bubble of a recipe's layouts: ``python -m megatron_embed.recipes.plan RECIPE``.

The plan needs neither weights nor GPUs. It needs a model's ``config.json``, or the hub id of a recipe's model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megatron_embed.conversion.arguments import positive, whole
from megatron_embed.recipes import SIZES
from megatron_embed.recipes.cli import FirstRankParser, read_words, run_program
from megatron_embed.recipes.config.schema import LAYOUT_KEYS

if TYPE_CHECKING:
    from megatron_embed.recipes.planning.layouts import Plan


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line. Bad arguments end the program with status 2 and one message.

    Returns:
        The options, with the recipe as ``cfg``; ``given``: whether the overrides set the layout; ``recompute``: the
        overrides' value, or None if they set none, and the plan then takes the least that fits.
    """
    parser = FirstRankParser(
        prog="megatron_embed.recipes.plan",
        description="Memory, communication and bubble of a recipe's layouts: of the one that the keys "
        "model.*_parallel_size say, or of all that the world allows.",
        usage="%(prog)s RECIPE --world-size W [--gpu-memory GIB] [--json FILE] [section.key=value …]",
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", metavar="RECIPE | section.key=value", help="what to plan")
    parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="plan this run_config.yaml")
    parser.add_argument("--world-size", type=positive, required=True, metavar="W", help="ranks")
    parser.add_argument("--gpu-memory", type=_size, default=80.0, metavar="GIB", help="of each GPU (80)")
    parser.add_argument("--gpus-per-node", type=positive, default=8, metavar="N", help="with fast links (8)")
    parser.add_argument("--top", type=whole, default=25, metavar="N", help="layouts in the table (25); 0: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there too, in bytes")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_intermixed_args(argv)
    args.cfg, words = read_words(args)
    keys = {word.partition("=")[0] for word in words}
    args.given = not keys.isdisjoint(LAYOUT_KEYS)
    args.recompute = args.cfg.model.recompute if "model.recompute" in keys else None
    return args


def _size(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text!r}; wanted a number above 0")
    return size


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with status 0, 1 (failed, with one message) or 2 (bad arguments)."""
    args = parse_arguments(argv)
    run_program(lambda: _report(args), debug=args.debug)


def _report(args: argparse.Namespace) -> None:
    from rich.console import Console

    from megatron_embed.recipes.planning import tables as plan_tables
    from megatron_embed.recipes.planning.layouts import choose_recompute, plan_layout, plan_world
    from megatron_embed.recipes.planning.model_sizes import encoder_of

    config = encoder_of(args.cfg, SIZES)
    own: Plan | None = None
    if args.given:
        of_layout = plan_layout(args.cfg, config, args.world_size, gpus_per_node=args.gpus_per_node)
        own = choose_recompute(of_layout, args.gpu_memory, args.recompute)
    plans = plan_world(
        args.cfg,
        config,
        args.world_size,
        gpu_memory=args.gpu_memory,
        recompute=args.recompute,
        gpus_per_node=args.gpus_per_node,
    )
    console = Console()
    console.width = console.width if console.is_terminal else 200
    if own is not None:
        console.print(plan_tables.stage_table(own))
        console.print(plan_tables.traffic_table(own))
    else:
        shown = plans[: args.top] if args.top > 0 else plans
        console.print(plan_tables.memory_table(args.cfg.recipe, args.world_size, args.gpu_memory, shown))
        console.print(plan_tables.step_table(shown))
        if len(plans) > len(shown):
            console.print(f"{len(plans) - len(shown)} more layouts: --top 0 shows all", highlight=False)
    for line in plan_tables.notes(args.cfg, args.gpu_memory, plans, own):
        console.print(line, highlight=False, soft_wrap=True)
    if args.json is not None:
        values = plan_tables.as_json(args.cfg, args.world_size, args.gpu_memory, plans, own)
        args.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
