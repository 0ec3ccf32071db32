"""Show the library's log on stderr, from the first rank, above any progress bar."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

LOGGER = "megatron_embed"


class _AboveBars(logging.Handler):
    """A handler that writes each line above the progress bars and redraws them."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)
        sys.stderr.flush()


@contextmanager
def shown_log() -> Iterator[None]:
    """Show the records logged under ``megatron_embed`` while a command runs; other ranks show errors only.

    A program that imports the package sets up logging itself: ``logging.basicConfig(level=logging.INFO)`` shows the
    same records.
    """
    logger, handler = logging.getLogger(LOGGER), _AboveBars()
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    logger.propagate = False  # otherwise a root handler that another library set would repeat each record
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
