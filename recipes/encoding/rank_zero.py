"""Run a function on the first rank or on each rank, and share its result or error with all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_embed.bridge.errors import UserError

T = TypeVar("T")


def on_first_rank(function: Callable[[], T]) -> T:
    """Run ``function`` on rank 0; on every rank return its result or raise its :class:`UserError`."""
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = function()
        except UserError as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def on_every_rank(function: Callable[[], T]) -> list[T]:
    """Run ``function`` on every rank; return all results in rank order or raise the first rank's :class:`UserError`."""
    own: tuple[T | None, UserError | None]
    try:
        own = function(), None
    except UserError as error:
        own = None, error
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    if errors := [error for _, error in found if error is not None]:
        raise errors[0]
    return [result for result, _ in found]
