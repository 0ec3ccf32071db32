"""Command lines: a parser whose messages are one line, and types of arguments."""

from __future__ import annotations

import argparse
import difflib
import sys
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
