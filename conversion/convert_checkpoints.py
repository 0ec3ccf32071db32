"""Command line ``import``, ``export`` and ``verify``. It only parses arguments; the modules beside it do the work."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from megatron_embed.bridge import environment
from megatron_embed.conversion.arguments import Parser, filled, positive, run_command
from megatron_embed.conversion.files.page_cache import begin_reading

DTYPES = ("bfloat16", "float16", "float32")
BIDIRECTIONAL_HELP = "take a ready embedder with causal attention as a base model, to be trained bidirectionally"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0: done; 2: the command line is wrong in itself; 1: any other failure. 2 and 1 come with one line on stderr.
    """
    args = _parser().parse_args(argv)
    environment.set_defaults()
    with _quiet(args.debug):
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    def unexpected(error: BaseException) -> str:
        return traceback.format_exc() if args.debug else f"{type(error).__name__}: {error} (--debug shows where)"

    status, message = run_command(
        lambda: COMMANDS[args.command](args),
        debug=args.debug,
        interrupted=(1, "interrupted; nothing was written"),
        unexpected=unexpected,
    )
    if message:
        print(f"error: {message.strip()}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="convert-checkpoints", description="Embedding models' weights between Hugging Face and Megatron."
    )
    common = Parser(add_help=False)
    common.add_argument("--revision", type=filled, metavar="R", help="branch, tag or commit of a hub id")
    common.add_argument(
        "--trust-remote-code", action="store_true", help="refused for a model with code of its own: none is ever run"
    )
    common.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bar")
    common.add_argument("--debug", action="store_true", help="show tracebacks and library messages")
    commands = parser.add_subparsers(dest="command", required=True, metavar="import|export|verify")

    cmd = commands.add_parser("import", parents=[common], help="Hugging Face → Megatron checkpoint")
    cmd.add_argument("--hf-model", type=filled, required=True, metavar="DIR_OR_ID", help="the model to read")
    cmd.add_argument("--megatron-path", type=filled, required=True, metavar="OUT", help="the checkpoint folder to make")
    cmd.add_argument("--torch-dtype", choices=DTYPES, help="of the stored weights; default: the source's")
    cmd.add_argument("--tp", type=positive, default=1, metavar="N", help="tensor-parallel size to cut for")
    cmd.add_argument("--pp", type=positive, default=1, metavar="N", help="pipeline-parallel size to cut for")
    cmd.add_argument("--with-vision", action="store_true", help="keep the VLM's other tensors in the checkpoint")
    cmd.add_argument("--bidirectional", action="store_true", help=BIDIRECTIONAL_HELP)
    cmd.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is there")

    cmd = commands.add_parser("export", parents=[common], help="Megatron checkpoint → Hugging Face")
    cmd.add_argument(
        "--hf-model", type=filled, metavar="DIR_OR_ID", help="the source, where it is not the recorded one"
    )
    cmd.add_argument(
        "--megatron-path", type=filled, required=True, metavar="DIR", help="checkpoint, iter_… folder, or save_dir"
    )
    cmd.add_argument("--hf-path", type=filled, required=True, metavar="OUT", help="the model folder to make")
    cmd.add_argument("--target", choices=("embedder", "vlm"), default="embedder", help="what to write")
    cmd.add_argument("--torch-dtype", choices=DTYPES, help="of the written weights; default: the source's")
    cmd.add_argument("--max-shard-size", default="5GB", type=_size, metavar="SIZE", help="such as 5GB, the default")
    cmd.add_argument("--bidirectional", action="store_true", help=BIDIRECTIONAL_HELP)
    cmd.add_argument("--overwrite", action="store_true", help="replace a model folder that is there")

    cmd = commands.add_parser("verify", parents=[common], help="compare a model with its conversion")
    cmd.add_argument("--hf-model", type=filled, required=True, metavar="DIR_OR_ID", help="the source")
    other = cmd.add_mutually_exclusive_group(required=True)
    other.add_argument("--megatron-path", type=filled, metavar="DIR", help="compare with this checkpoint")
    other.add_argument("--hf-path", type=filled, metavar="DIR", help="compare with this folder")
    cmd.add_argument(
        "--bidirectional", action="store_true", help="the source, a causal embedder, was taken as a base model"
    )
    return parser


def _size(text: str) -> str:
    from megatron_embed.bridge.errors import UserError
    from megatron_embed.conversion.hf.safetensors_writer import parse_size

    try:
        parse_size(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--max-shard-size: ")) from None
    return text


def _import(args: argparse.Namespace) -> int:
    begin_reading(args.hf_model, "model*.safetensors")
    from megatron_embed.conversion.importing import import_hf

    done = import_hf(**_options(args))
    print("\n".join([*done.notes, f"Megatron checkpoint written to {done.path}"]))
    return 0


def _export(args: argparse.Namespace) -> int:
    begin_reading(args.megatron_path, "*.distcp")
    from megatron_embed.conversion.exporting import export_hf

    done = export_hf(**_options(args))
    print("\n".join([*done.notes, f"{args.target} written to {done.path}"]))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from megatron_embed.conversion.verify import verify
    from megatron_embed.conversion.verify_table import print_table, summarize

    outcome = verify(**_options(args))
    print_table(outcome)
    if not outcome:
        print(f"error: {summarize(outcome)}", file=sys.stderr)
        return 1
    return 0


COMMANDS = {"import": _import, "export": _export, "verify": _verify}


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of the command's function, which have the options' names."""
    return {name: value for name, value in vars(args).items() if name not in ("command", "debug")}


def _stop(*_: object) -> NoReturn:
    raise KeyboardInterrupt


@contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Silence libraries on stderr (they warn about things that users cannot change), and treat SIGTERM as Ctrl-C."""
    before = signal.signal(signal.SIGTERM, _stop)
    disabled = logging.root.manager.disable
    try:
        with warnings.catch_warnings():
            if not debug:
                os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
                warnings.simplefilter("ignore")
                logging.disable(logging.WARNING)
            yield
    finally:
        logging.disable(disabled)
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
