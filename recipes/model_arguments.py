"""Command-line options that several commands have: a model's layout and its encoder, and the output file."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_embed.bridge.errors import UsageError, UserError, named
from megatron_embed.bridge.layout import Layout
from megatron_embed.conversion.arguments import positive
from megatron_embed.conversion.files.disk_errors import check_writable
from megatron_embed.conversion.hf.declared_attention import HELP

if TYPE_CHECKING:
    from megatron_embed.recipes.encoding.encoder import Encoder


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that set how a model is laid out and run."""
    parser.add_argument("--tp", type=positive, default=1, metavar="N", help="tensor-parallel ranks of a model replica")
    parser.add_argument("--pp", type=positive, default=1, metavar="N", help="pipeline stages of a model replica")
    parser.add_argument(
        "--max-tokens", type=positive, metavar="N", help="tokens of a micro-batch (default: 16384, on a CPU less)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--bidirectional", action="store_true", help=HELP)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def check_output_file(output: Path, *, overwrite: bool) -> None:
    """Refuse an output file that is there already, is a folder, or cannot be written.

    Raises:
        UserError: the message names the file, or the option.
    """
    if output.exists() and not overwrite:
        raise UserError(f"{output}: is there already; name another file, or --overwrite")
    if output.is_dir():
        raise UserError(f"{output}: a folder; wanted a file's name")
    with named("--output"):
        check_writable(output.parent)


def open_encoder(args: argparse.Namespace, *, scores: bool = False) -> Encoder:
    """Return the encoder that the options of :func:`add_model_arguments` select.

    ``scores`` is that of :meth:`Encoder.from_pretrained`.
    """
    layout, world = Layout(tp=args.tp, pp=args.pp), int(os.environ.get("WORLD_SIZE", "1"))
    if world % layout.model_parallel_size:
        raise UsageError(
            f"--tp {args.tp} --pp {args.pp}: their product does not divide {world} ranks; change one of them, or start "
            f"so many processes with torchrun --nproc-per-node"
        )
    from megatron_embed.recipes.encoding.encoder import Encoder

    return Encoder.from_pretrained(
        args.model,
        device=args.device,
        layout=layout,
        max_tokens=args.max_tokens,
        bidirectional=args.bidirectional,
        scores=scores,
    )
