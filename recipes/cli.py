"""The training command line, and the start and end that all programs of this package share."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_embed.bridge import environment, liveness
from megatron_embed.bridge.errors import UsageError, UserError, explain
from megatron_embed.conversion.arguments import Parser, positive, run_command
from megatron_embed.recipes import RECIPES
from megatron_embed.recipes.config.checks import layout_of
from megatron_embed.recipes.config.messages import nearest
from megatron_embed.recipes.config.overrides import apply_overrides
from megatron_embed.recipes.config.run_config import load_run_config
from megatron_embed.recipes.config.schema import RecipeConfig
from megatron_embed.recipes.logs import shown_log

if TYPE_CHECKING:
    from rich.table import Table


def parse_train_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read ``RECIPE [--config FILE.yaml] [--list] [--dry-run] [section.key=value …]``.

    Bad arguments (an unknown recipe, key or value) end the program with status 2 and one message. Under torchrun the
    first rank prints it.

    Returns:
        The options, with the recipe as ``cfg`` (not with ``--list``) and the number of ranks as ``world_size``.
    """
    args = _train_parser().parse_intermixed_args(argv)
    if args.list:
        return args
    args.cfg, _ = read_words(args)
    if "WORLD_SIZE" in os.environ:
        args.world_size = int(os.environ["WORLD_SIZE"])
    elif args.world_size is None:  # by default a dry run shows the smallest world that the layout fits
        args.world_size = layout_of(args.cfg).model_parallel_size if args.dry_run else 1
    return args


def read_words(args: argparse.Namespace) -> tuple[RecipeConfig, list[str]]:
    """Return (config, overrides) of ``[RECIPE] [--config FILE] [section.key=value …]``.

    Bad arguments end the program.
    """
    words = list(args.words)
    recipe = words.pop(0) if words and "=" not in words[0] else None
    try:
        return apply_overrides(_base(recipe, args.config), words), words
    except UserError as error:
        if args.debug:
            raise
        _exit_with(*explain(error))


def _train_parser() -> argparse.ArgumentParser:
    parser = FirstRankParser(
        prog="megatron_embed.recipes.train",
        description="Fine-tune an embedding model. Several processes: torchrun --nproc-per-node N -m …",
        usage="%(prog)s RECIPE [--config FILE.yaml] [--list] [--dry-run] [section.key=value …]",
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", metavar="RECIPE | section.key=value", help="what to train, and how")
    parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="run this run_config.yaml again")
    parser.add_argument("--list", action="store_true", help="every recipe with size, layout, batch")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and the layout, and stop")
    parser.add_argument("--world-size", type=positive, metavar="N", help="ranks, for --dry-run")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


class FirstRankParser(Parser):
    """An argument parser that ends on bad arguments with status 2 and one line from the first rank."""

    def end(self, message: str) -> NoReturn:
        _exit_with(2, message)


def _base(recipe: str | None, config: Path | None) -> RecipeConfig:
    if recipe is None and config is None:
        raise UsageError(f"no recipe; wanted one of {', '.join(RECIPES)}, or --config FILE.yaml")
    if recipe is not None and recipe not in RECIPES:
        match = nearest(recipe, RECIPES)
        hint = f"did you mean {match!r}?" if match else f"known: {', '.join(RECIPES)}"
        raise UsageError(f"unknown recipe {recipe!r}; {hint}")
    base = RECIPES[recipe]() if recipe is not None else None
    return base if config is None and base is not None else load_run_config(config or "", base=base, recipes=RECIPES)


def recipe_table() -> Table:
    """Return the table that ``--list`` prints: every recipe with size, layout and batch."""
    from rich.table import Table

    table = Table(title="Recipes")
    table.add_column("recipe", no_wrap=True)
    for column in ("size", "model", "TP × PP × CP", "queries a step", "lr", "lengths"):
        table.add_column(column, overflow="fold")
    for name, recipe in RECIPES.items():
        cfg = recipe()
        model, data = cfg.model, cfg.data
        sizes = (model.tensor_model_parallel_size, model.pipeline_model_parallel_size, model.context_parallel_size)
        table.add_row(
            name,
            (recipe.__doc__ or "").strip().partition(":")[0],
            model.hf_model or "model.hf_model=…",
            " × ".join(map(str, sizes)),
            str(cfg.train.global_batch_size),
            f"{cfg.optimizer.lr:g}",
            f"{data.query_max_length}, {data.passage_max_length}",
        )
    return table


def run_program(main: Callable[[], Any], *, debug: bool = False) -> NoReturn:
    """Run a program's body and exit with its status.

    The status is 0 for success, 2 for a wrong command line or config, and 1 for any other error. An error prints one
    readable line on stderr. A traceback follows with ``debug``, and for errors that no user can have caused. Of several
    torchrun ranks on a host only the first to fail prints its error, because it causes the errors of the others.
    """
    environment.set_defaults()
    if not debug:
        warnings.filterwarnings("ignore")  # other packages' warnings address their developers
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        liveness.watch(_exit_with)

    def unexpected(error: BaseException) -> str:
        if liveness.is_broken_connection(error):
            return liveness.explain_broken_connection(error) + (f"\n{traceback.format_exc()}" if debug else "")
        return f"this should not happen, please report it\n{traceback.format_exc()}"

    with shown_log(), _terminable():
        status, message = run_command(main, debug=debug, interrupted=(130, "interrupted"), unexpected=unexpected)
        if message:
            _exit_with(status, message)
    sys.exit(0)


@contextmanager
def _terminable() -> Iterator[None]:
    """End a program of one process on SIGTERM as on Ctrl-C, so that it says so and removes its unfinished files."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield  # liveness.watch takes the signal
        return
    own = os.getpid()

    def stop(*_: object) -> None:
        if os.getpid() != own:
            os._exit(128 + signal.SIGTERM)  # a forked child
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit_with(status: int, message: str) -> NoReturn:
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    if not alone:
        liveness.begin_end()
    liveness.say_end(message.strip())
    if _speaks_for_all():
        # On a terminal, the current line may hold another rank's progress bar.
        new_line = "\n" if not alone and sys.stderr.isatty() else ""
        print(f"{new_line}error: {message.strip()}", file=sys.stderr, flush=True)
    if not alone:
        # A collective's or a writer's thread that waits for another rank must not keep this process alive, and no
        # child process may outlive it.
        for child in multiprocessing.active_children():
            child.kill()
        liveness.end_lost()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _speaks_for_all() -> bool:
    """Return whether this rank is the first on its host to fail. The ranks agree through torchrun's shared folder."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file or not Path(error_file).parents[1].is_dir():
        return os.environ.get("RANK", "0") == "0"
    try:
        (Path(error_file).parents[1] / "megatron-embed-failed").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
