"""Reading of one tensor while the previous one is written."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator, Iterable
from typing import TypeVar

import torch

from megatron_embed.conversion.files.stored import Stored, Values

T = TypeVar("T")
_PAGE = 4096


def one_ahead(items: Iterable[T]) -> Generator[T, None, None]:
    """Yield the same items in the same order; a thread makes each while its predecessor is in use.

    At most three exist at a time: the one in use, the next, and the one being made. An error in the thread is raised
    here. A caller that stops early must close the iterator, which waits for the thread.
    """
    ready: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(maxsize=1)
    wanted = True

    def put(entry: tuple[bool, T | BaseException | None]) -> None:
        while wanted:
            with contextlib.suppress(queue.Full):
                ready.put(entry, timeout=0.1)
                return

    def make() -> None:
        try:
            for item in items:
                put((True, item))
                if not wanted:
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    thread = threading.Thread(target=make, name="one-ahead", daemon=True)
    thread.start()
    try:
        while True:
            more, item = ready.get()
            if more:
                yield item  # type: ignore[misc]
                del item
            elif item is None:
                return
            else:
                raise item  # type: ignore[misc]
    finally:
        wanted = False
        thread.join()


def fault_in(values: Values) -> Values:
    """Touch every page of a tensor that may be a view of a mapped file, so that its bytes are in memory.

    Rows copied from file to file do not need this: the kernel reads ahead, and a thread only cost processor time.
    """
    if not isinstance(values, Stored) and values.numel() and values.is_contiguous():
        values.reshape(-1).view(torch.uint8)[::_PAGE].max()
    return values
