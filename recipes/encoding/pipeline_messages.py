"""Messages between pipeline stages whose shapes every rank knows beforehand.

Micro-batches differ in length, so megatron-core sends the shape of each message before it: another message, and a wait
for the GPU at both ends. But all stages of a replica have the same micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_embed.recipes.encoding.micro_batches import MicroBatch

Message = tuple[int, int, int]


class KnownShapes(P2PCommunicator):
    """megatron-core's messages for one run of a schedule, without the exchange of shapes.

    A stage receives the outputs of the stage before in the schedule's order of (micro-batch, interleaved stage), and
    the gradients in the same order of micro-batches. The first rank receives from the last rank only what goes on to a
    later interleaved stage, and the other way round for gradients.
    """

    def __init__(self, config: TransformerConfig, micro_batches: Sequence[MicroBatch], stages: int):
        group = parallel_state.get_pipeline_model_parallel_group()
        super().__init__(pp_group=group, config=config)
        shapes = [message_shape(micro_batch, config) for micro_batch in micro_batches]
        table = get_schedule_table(len(shapes), stages, group.size())
        whole = [shapes[number] for number, _ in table]
        around = [shapes[number] for number, stage in table if stage < stages - 1]
        self._outputs: Iterator[Message] = iter(around if group.rank() == 0 else whole)
        self._gradients: Iterator[Message] = iter(around if group.rank() == group.size() - 1 else whole)

    def _communicate_shapes(
        self, tensor_send_next: Any, tensor_send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[Any, Any]:
        return next(self._outputs) if recv_prev else None, next(self._gradients) if recv_next else None


def message_shape(micro_batch: MicroBatch, config: TransformerConfig) -> Message:
    """Return the shape ``[s, b, hidden]`` of the states that a rank sends; ``s`` is its own part of the columns."""
    rows, columns = micro_batch.tokens.input_ids.shape
    parts = config.context_parallel_size * (config.tensor_model_parallel_size if config.sequence_parallel else 1)
    return columns // parts, rows, config.hidden_size


def process_groups() -> ProcessGroupCollection:
    """Return the groups that the schedules take beside a communicator; they are those that they find themselves."""
    groups = ProcessGroupCollection()
    groups.tp = parallel_state.get_tensor_model_parallel_group()
    groups.cp = parallel_state.get_context_parallel_group()
    groups.pp = parallel_state.get_pipeline_model_parallel_group()
    groups.embd = parallel_state.get_embedding_group(check_initialized=False)
    groups.pos_embd = parallel_state.get_position_embedding_group(check_initialized=False)
    groups.dp_cp = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return groups


def messages(stages: Sequence[torch.nn.Module], micro_batches: Sequence[MicroBatch]) -> dict[str, Any]:
    """Return the schedule's arguments for messages of known shapes; none without pipeline stages."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return {}
    config: Any = stages[0].config
    return {
        "p2p_communicator": KnownShapes(config, micro_batches, len(stages)),
        "pg_collection": process_groups(),
    }
