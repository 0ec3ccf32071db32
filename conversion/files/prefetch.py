"""Reading of one tensor while the previous one is written."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from megatron_embed.conversion.files.stored import Stored, Values

T = TypeVar("T")
_PAGE = 4096
_END = object()


def one_ahead(items: Iterable[T]) -> Generator[T, None, None]:
    """Yield the same items in the same order; a thread makes each while its predecessors are in use.

    At most three exist at a time: the one in use, the next, and the one being made. An error in the thread is raised
    here. A caller that stops early must close the iterator, which waits for the thread.
    """
    source = iter(items)
    thread = ThreadPoolExecutor(1, "one-ahead")
    try:
        ahead = deque(thread.submit(next, source, _END) for _ in range(2))
        while (item := ahead.popleft().result()) is not _END:
            ahead.append(thread.submit(next, source, _END))
            yield item  # type: ignore[misc]
            del item
    finally:
        thread.shutdown(cancel_futures=True)


def fault_in(values: Values) -> Values:
    """Touch every page of a tensor that may be a view of a mapped file, so that its bytes are in memory.

    Rows copied from file to file do not need this: the kernel reads ahead, and a thread only cost processor time.
    """
    if not isinstance(values, Stored) and values.numel() and values.is_contiguous():
        values.reshape(-1).view(torch.uint8)[::_PAGE].max()
    return values
