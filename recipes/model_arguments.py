"""The options by which a command line says which layout its model runs under, and the encoder that they ask for."""

from __future__ import annotations

import argparse

from megatron_embed.bridge import parallel
from megatron_embed.bridge.errors import UserError
from megatron_embed.bridge.layout import Layout
from megatron_embed.conversion.declared_attention import HELP
from megatron_embed.recipes.encode import Encoder


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """How a model is laid out and run."""
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks of a model replica")
    parser.add_argument("--pp", type=int, default=1, help="pipeline stages of a model replica")
    parser.add_argument("--max-tokens", type=int, help="tokens of a micro-batch (default: 16384, on a CPU less)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--bidirectional", action="store_true", help=HELP)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def open_encoder(args: argparse.Namespace, *, scores: bool = False) -> Encoder:
    """The encoder that :func:`add_model_arguments` ask for; ``scores`` as in :meth:`Encoder.from_pretrained`."""
    if args.tp < 1 or args.pp < 1 or (args.max_tokens is not None and args.max_tokens < 1):
        wrong = f"--tp {args.tp} --pp {args.pp} --max-tokens {args.max_tokens}"
        raise UserError(f"{wrong}: wanted numbers from 1 up")
    layout = Layout(tp=args.tp, pp=args.pp)
    if parallel.world_size() % layout.model_parallel_size:
        raise UserError(f"--tp {args.tp} --pp {args.pp}: their product does not divide {parallel.world_size()} ranks")
    return Encoder.from_pretrained(
        args.model,
        device=args.device,
        layout=layout,
        max_tokens=args.max_tokens,
        bidirectional=args.bidirectional,
        scores=scores,
    )
