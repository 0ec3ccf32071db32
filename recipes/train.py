"""Fine-tune an embedding model: ``torchrun --nproc-per-node N -m megatron_embed.recipes.train RECIPE …``.

:mod:`megatron_embed.recipes.training.loop` holds the loop. This module is callable because importing it binds the
package's name ``train`` to it, and ``from megatron_embed.recipes import train; train(cfg)`` must work after any import.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

from megatron_embed.bridge import environment
from megatron_embed.recipes import RECIPES, SIZES
from megatron_embed.recipes.cli import parse_train_arguments, recipe_table, run_program
from megatron_embed.recipes.config.checks import validate
from megatron_embed.recipes.config.schema import RecipeConfig
from megatron_embed.recipes.datasets.inputs import check_inputs


class _CallableModule(ModuleType):
    def __call__(self, cfg: RecipeConfig) -> Any:
        """Run the training that ``cfg`` describes; see :func:`megatron_embed.recipes.training.loop.train`."""
        environment.set_defaults()
        from megatron_embed.recipes.training.loop import train

        return train(cfg, recipes=RECIPES)


sys.modules[__name__].__class__ = _CallableModule


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with status 0, 1 (failed) or 2 (wrong command line or config), with one message."""
    args = parse_train_arguments(argv)

    def body() -> None:
        if args.list:
            from rich.console import Console

            console = Console()
            console.width = console.width if console.is_terminal else 160
            console.print(recipe_table())
            return
        if args.dry_run:
            from megatron_embed.recipes.training.dry_run import describe_run

            print(describe_run(args.cfg, args.world_size, recipes=RECIPES, sizes=SIZES))
            return
        validate(args.cfg, args.world_size)  # both checks run before the imports, which take seconds
        check_inputs(args.cfg)
        from megatron_embed.recipes.training.loop import train

        train(args.cfg, recipes=RECIPES)

    run_program(body, debug=args.debug)


if __name__ == "__main__":
    main()
