"""Run a function on the first rank or on each rank, and share its result or error with all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_embed.bridge.errors import UserError

T = TypeVar("T")


def on_first_rank(function: Callable[[], T]) -> T:
    """Run ``function`` on rank 0; on every rank return its result or raise its :class:`UserError` or ``OSError``."""
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except (UserError, OSError) as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def on_every_rank(function: Callable[[], T]) -> T:
    """Run ``function`` on every rank and return its own result there; raise the first rank's error on every rank."""
    result, failure = None, None
    try:
        result = function()
    except (UserError, OSError) as error:
        failure = error
    if failures := [each for each in gathered(failure) if each is not None]:
        raise failures[0]
    return result  # type: ignore[return-value]


def gathered(value: T) -> list[T]:
    """Return every rank's value, in rank order."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
