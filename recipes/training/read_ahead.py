"""Prepare the next steps in the background while a step is computed."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_AHEAD = 2  # steps; the margin hides a step that is slow to prepare, such as the first of an epoch


class ReadAhead(Generic[T]):
    """Steps in order, which one background thread prepares at most two steps ahead.

    Leaving the ``with`` block, for any reason, ends the thread and drops the prepared steps.

    Args:
        prepare: step → its input. It runs beside the training step, so it must not communicate with other ranks.
    """

    def __init__(self, prepare: Callable[[int], T], steps: Iterable[int]) -> None:
        self._prepare, self._steps = prepare, iter(steps)
        self._turn = threading.Lock()
        self._waiting: deque[Future[T]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")

    def __enter__(self) -> ReadAhead[T]:
        for step in islice(self._steps, _AHEAD):
            self._submit(step)
        return self

    def __exit__(self, *_: Any) -> None:
        self._thread.shutdown(cancel_futures=True)

    def take(self) -> T:
        """Wait for the next step's input and return it.

        Raises:
            Exception: the error that ``prepare`` raised for this step.
        """
        found = self._waiting.popleft()
        for step in islice(self._steps, 1):
            self._submit(step)
        return found.result()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pause the preparation: for a fork, or for code that uses the same tokenizer."""
        with self._turn:
            yield

    def _submit(self, step: int) -> None:
        self._waiting.append(self._thread.submit(self._in_turn, step))

    def _in_turn(self, step: int) -> T:
        with self._turn:
            return self._prepare(step)
