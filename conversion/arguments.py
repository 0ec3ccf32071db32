"""Command lines: a parser with one-line messages, argument types, and the end of a command."""

from __future__ import annotations

import argparse
import difflib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Parser that ends the program on bad arguments: status 2 and one line with the nearest option or ``--help``."""

    def error(self, message: str) -> NoReturn:
        self.end(f"{message}; {self._way_out(message)}")

    def end(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)

    def _way_out(self, message: str) -> str:
        _, unknown, words = message.partition("unrecognized arguments: ")
        options = [option for action in self._actions for option in action.option_strings]
        near = difflib.get_close_matches(words.split("=")[0].split(" ")[0], options, n=1) if unknown else []
        return f"did you mean {near[0]}?" if near else f"{self.prog} --help shows the arguments"


def filled(text: str) -> str:
    """Parse a text that may not be empty, such as a folder's name or a hub id."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"found {text!r}; wanted a name or a path")
    return text


def filled_path(text: str) -> Path:
    """Parse a path; an empty one would mean the current folder."""
    return Path(filled(text))


def positive(text: str) -> int:
    """Parse a whole number from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; wanted a whole number from 1 up")
    return int(text)


def whole(text: str) -> int:
    """Parse a whole number from 0 up."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"found {text!r}; wanted a whole number from 0 up")
    return int(text)


def run_command(
    body: Callable[[], object],
    *,
    debug: bool,
    interrupted: tuple[int, str],
    unexpected: Callable[[BaseException], str],
) -> tuple[int, str]:
    """Run a command and return how it ended.

    Args:
        body: function that returns the exit status, or something else for 0.
        debug: show the traceback of a user's error in place of its message.
        interrupted: status and message after Ctrl-C.
        unexpected: function that makes the message for an error that is not the user's; called while it is handled.

    Returns:
        The exit status, and the message for stderr, which is empty where the body came to its end.
    """
    from megatron_embed.bridge.errors import UserError, explain  # here, after the work that precedes slow imports

    try:
        status = body()
    except SystemExit:
        raise
    except KeyboardInterrupt:
        return interrupted
    except (UserError, OSError) as error:
        failed, message = explain(error)
        return failed, traceback.format_exc() if debug else message
    except BaseException as error:  # torch's CheckpointException is no Exception
        return 1, unexpected(error)
    return (status if isinstance(status, int) else 0), ""
