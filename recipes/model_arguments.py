"""Command-line options for a model's layout, and the encoder that they select."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from megatron_embed.bridge.errors import UsageError
from megatron_embed.bridge.layout import Layout
from megatron_embed.conversion.arguments import positive
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
