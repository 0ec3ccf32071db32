"""What commands show of the library's log: on stderr, from the first rank, above any progress bar."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

LOGGER = "megatron_embed"


class _AboveBars(logging.Handler):
    """Write a line where no bar stands; bars below it are drawn again."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)
        sys.stderr.flush()


@contextmanager
def shown_log() -> Iterator[None]:
    """Show what is logged under ``megatron_embed`` for as long as a command runs; of other ranks errors alone.

    A program that imports the package decides for itself: ``logging.basicConfig(level=logging.INFO)`` shows the same.
    """
    logger, handler = logging.getLogger(LOGGER), _AboveBars()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    logger.propagate = False  # else a handler that some library gave the root would say it again
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
