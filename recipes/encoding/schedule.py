"""Run micro-batches through megatron-core's pipeline schedules, forward only or with a loss function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_embed.bridge.cpu import host
from megatron_embed.recipes.encoding.micro_batches import MicroBatch
from megatron_embed.recipes.encoding.pipeline_messages import messages

#: (micro-batch, output of the last stage) → the values that the schedule expects of a loss function
LossFunction = Callable[..., Any]
#: (stage, micro-batch) → the stage's output
Compute = Callable[[torch.nn.Module, MicroBatch], Tensor]


def _compute(stage: torch.nn.Module, micro_batch: MicroBatch) -> Tensor:
    return stage(micro_batch.tokens.to(host.device()))


def encode_micro_batches(
    stages: Sequence[torch.nn.Module], micro_batches: Sequence[MicroBatch], compute: Compute = _compute
) -> list[Tensor] | None:
    """Encode without a graph; return each micro-batch's ``[n, hidden]`` on the last stage and None on the others.

    Args:
        compute: replaces the stage's call, and may keep a graph of its own.
    """

    def collect(micro_batch: MicroBatch, output: Tensor, non_loss_data: bool = True) -> Tensor:
        return micro_batch.rows(output.detach())

    with torch.no_grad():  # the schedule itself would build a graph
        outputs = run_schedule(stages, micro_batches, collect, compute, forward_only=True, collect_non_loss_data=True)
    return outputs if parallel_state.is_pipeline_last_stage(ignore_virtual=True) else None


def share_last_stage(values: Tensor) -> Tensor:
    """Give every pipeline stage the last stage's values, in place."""
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(
            values,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return values


def run_schedule(
    stages: Sequence[torch.nn.Module],
    micro_batches: Sequence[MicroBatch],
    loss_function: LossFunction,
    compute: Compute = _compute,
    *,
    forward_only: bool,
    collect_non_loss_data: bool = False,
) -> list[Any]:
    """Run megatron-core's schedule for the current layout; return the loss function's reports on the last stage."""

    def forward_step(iterator: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
        micro_batch = next(iterator)
        return compute(model, micro_batch), partial(loss_function, micro_batch)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(micro_batches) for _ in stages],
        model=list(stages),
        num_microbatches=len(micro_batches),
        # The schedules require a number, but the communicator knows the lengths (variable_seq_lengths).
        seq_length=1,
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=collect_non_loss_data,
        **messages(stages, micro_batches),
    )
