"""The distributed optimizer's state in a checkpoint: each rank saves and loads its own values, and no others.

A data-parallel rank owns a contiguous range of each parameter's values. megatron-core's ``fully_reshardable`` form
gathers the whole state on every rank before a save, and every rank loads all of it: 12 bytes for each parameter on the
host, times the ranks of a node. A contiguous range of a matrix is at most three boxes, and a distributed checkpoint
takes boxes of any size. So a rank states its own values as boxes of the same tensors, under the same names. What is
saved either way loads either way, under any layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor


@contextmanager
def own_values_only() -> Iterator[None]:
    """Make megatron-core's ``fully_reshardable`` form save and load each rank's own values."""
    with (
        mock.patch.object(DistributedOptimizer, "sharded_param_state_fully_reshardable", _boxes_of_state),
        mock.patch.object(DistributedOptimizer, "load_parameter_state_from_fully_reshardable", _take_boxes),
    ):
        yield


@dataclass(frozen=True)
class Box:
    """A box of a tensor: its first index and its size along every axis."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]


def boxes(shape: tuple[int, ...], start: int, end: int) -> Iterator[Box]:
    """Cut the values ``start`` to ``end`` of a contiguous tensor of this shape into boxes, in the order of the values.

    A range of whole slices along the first axis is one box; what is left at its ends lies inside one slice each.
    """
    if start >= end:
        return
    if len(shape) <= 1:
        yield Box((start,) * len(shape), (end - start,) * len(shape))
        return
    size = math.prod(shape[1:])
    first, last = -(-start // size), end // size
    if first > last:  # inside a slice
        first = last = start // size
        yield from _within(shape, first, start - first * size, end - first * size)
        return
    if start < first * size:
        yield from _within(shape, first - 1, start - (first - 1) * size, size)
    if first < last:
        yield Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))
    if last * size < end:
        yield from _within(shape, last, 0, end - last * size)


def _within(shape: tuple[int, ...], index: int, start: int, end: int) -> Iterator[Box]:
    for box in boxes(shape[1:], start, end):
        yield Box((index, *box.offset), (1, *box.shape))


def _own_ranges(optimizer: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
    """Yield this rank's parameters, each with the range of its values that the rank owns."""
    for by_dtype in optimizer.gbuf_ranges:
        for buckets in by_dtype.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"].start, ranges["param"].end


def _states(optimizer: DistributedOptimizer, parameter: torch.nn.Parameter) -> dict[str, Tensor]:
    """Return the rank's values of a parameter's fp32 copy and moments, as megatron-core names them."""
    found: dict[str, Tensor] = optimizer._get_main_param_and_optimizer_states(parameter)
    return {name: value for name, value in found.items() if name != "step"}  # groups hold the number of steps


def _boxes_of_state(
    optimizer: DistributedOptimizer,
    model_sharded_state_dict: dict[str, Any],
    is_loading: bool = False,
    metadata: dict[str, Any] | None = None,
) -> dict[int, dict[str, list[ShardedTensor]]]:
    places = {id(each.data): each for each in nested_values(model_sharded_state_dict) if hasattr(each, "data")}
    state = {}
    for number, (parameter, start, end) in enumerate(_own_ranges(optimizer)):
        state[number] = {
            name: list(_sharded(places[id(parameter)], name, None if is_loading else values, values.dtype, start, end))
            for name, values in _states(optimizer, parameter).items()
        }
    return state


def _sharded(
    place: ShardedTensor | ShardedTensorFactory,
    name: str,
    values: Tensor | None,
    dtype: torch.dtype,
    start: int,
    end: int,
) -> Iterator[ShardedTensor]:
    """State a range of a parameter's values as boxes of the whole tensor.

    Args:
        place: where the parameter lies in the model's tensors. A factory cuts it along its first axis.
        values: the values of the range, or None to ask for them.
    """
    parts = nested_values(place.build()) if isinstance(place, ShardedTensorFactory) else [place]
    begin = 0  # of a part among the parameter's values
    for part in parts:
        size = math.prod(part.local_shape)
        low, high = max(start, begin), min(end, begin + size)
        leading = part.prepend_axis_num
        done = low
        for box in boxes(tuple(part.local_shape), low - begin, high - begin):
            count = math.prod(box.shape)
            own = part.global_offset[leading:]
            yield ShardedTensor(
                key=f"optimizer.state.{name}.{part.key}",
                data=None if values is None else values[done - start : done - start + count].view(_shape(leading, box)),
                dtype=dtype,
                local_shape=_shape(leading, box),
                global_shape=part.global_shape,
                global_offset=(
                    *part.global_offset[:leading],
                    *(mine + inner for mine, inner in zip(own, box.offset, strict=True)),
                ),
                axis_fragmentations=None,
                # Pipeline- and tensor-parallel replicas stay what they are; among data-parallel ranks only one owns it.
                replica_id=(*part.replica_id[:2], 0),
                allow_shape_mismatch=part.allow_shape_mismatch,  # TP pads the vocabulary
            )
            done += count
        begin += size


def _shape(leading: int, box: Box) -> tuple[int, ...]:
    return (*(1 for _ in range(leading)), *box.shape)


@torch.no_grad()
def _take_boxes(optimizer: DistributedOptimizer, state_dict: dict[int, dict[str, list[Tensor]]]) -> None:
    for number, (parameter, _, _) in enumerate(_own_ranges(optimizer)):
        found = {name: torch.cat([each.flatten() for each in parts]) for name, parts in state_dict[number].items()}
        optimizer._set_main_param_and_optimizer_states(parameter, found)
