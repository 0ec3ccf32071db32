"""Command lines: a parser whose messages are one line, types of arguments, and how a command ends."""

from __future__ import annotations

import argparse
import difflib
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Bad arguments end the program with status 2 and one line that names the nearest option, or ``--help``."""

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


def positive(text: str) -> int:
    """An argument that is a whole number from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}; wanted a whole number from 1 up")
    return int(text)


def whole(text: str) -> int:
    """An argument that is a whole number from 0 up."""
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
    """Run a command and say how it ended.

    Args:
        body: returns its exit status, or something else for 0.
        debug: show the traceback of a user's error in place of its message.
        interrupted: status and message after Ctrl-C.
        unexpected: makes the message about an error that is no user's; called while it is handled.

    Returns:
        the exit status, and what is to be said on stderr: nothing where the body came to its end.
    """
    from megatron_embed.bridge.errors import UserError, explain  # after what begins before slow imports

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
