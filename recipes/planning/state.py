"""Bytes of a rank's parameters, gradients and optimizer state, equal to the bytes that training allocates.

Mixed precision keeps an fp32 gradient and three fp32 values of Adam (main parameter, both moments) for each 16-bit
parameter. The distributed optimizer divides those three over the data-parallel ranks (ZeRO stage 1, Rajbhandari et al.
2020). The figures are exact because they follow megatron-core's buffers: one buffer for each dtype and pipeline stage,
with the parameters in reverse order of registration. Under the distributed optimizer each parameter starts at a
multiple of 64 values, and the buffer's end is rounded up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.families import FAMILIES
from megatron_embed.bridge.layout import Layout, pipeline_split
from megatron_embed.bridge.mapping import weights
from megatron_embed.bridge.transforms import padded_vocab_size
from megatron_embed.recipes.planning.gradient_buckets import bucket_size

FP32 = 4
#: bytes of a parameter or an activation
WIDTHS = {"bf16": 2, "fp16": 2, "fp32": 4}
#: bytes of both moments of Adam; an fp32 main parameter adds 4
ADAM_BYTES = 8
#: Under the distributed optimizer, parameters start and buffers end at multiples of these numbers of values.
_PARAMETER_ALIGNMENT, _BUFFER_ALIGNMENT = 64, 128

#: A layer's weights in the order in which the modules register them. A family's own weights follow the QKV weight.
_LAYER_ORDER = (
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_proj.weight",
    "self_attention.linear_qkv.weight",
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
)


@dataclass(frozen=True)
class ModelChunk:
    """One (virtual) pipeline stage: its number of layers, and whether it holds the embedding or the final norm."""

    layers: int
    first: bool
    last: bool


@dataclass(frozen=True)
class State:
    """Bytes that a rank holds from the first step to the last."""

    parameters: int
    gradients: int
    optimizer: int


def chunks_of(config: EncoderConfig, layout: Layout, pp_rank: int) -> list[ModelChunk]:
    """Return the stages of a pipeline rank: one, or one for each round of interleaved stages."""
    stages = layout.pp * (layout.vpp or 1)
    split = pipeline_split(config.num_hidden_layers, stages)
    indices = range(pp_rank, stages, layout.pp)
    return [ModelChunk(split[i], first=i == 0, last=i == stages - 1) for i in indices]


def chunk_parameters(config: EncoderConfig, layout: Layout, chunk: ModelChunk) -> list[int]:
    """Return the number of values of each parameter on a tensor-parallel rank, in the order of registration."""
    numel = {}
    for weight in weights(config.replace(num_hidden_layers=1)):
        rows, *rest = weight.megatron_shape
        if weight.kind == "vocab":
            rows = padded_vocab_size(rows, world=layout.tp)
        name = weight.megatron.removeprefix("decoder.layers.0.")
        numel[name] = rows * math.prod(rest) // (1 if weight.tp_dim is None else layout.tp)
    embedding = [numel.pop("embedding.word_embeddings.weight")]
    final_norm = [numel.pop("decoder.final_layernorm.weight")]
    order = [*_LAYER_ORDER]
    own = (row.megatron.partition("{layer}.")[2] for row in FAMILIES[config.family].layer_rows)
    behind = order.index("self_attention.linear_qkv.weight") + 1
    order[behind:behind] = own
    assert set(numel) == set(order), "a weight of the layers has no place in the order"
    layer = [numel[name] for name in order]
    return embedding * chunk.first + layer * chunk.layers + final_norm * chunk.last


def states(
    config: EncoderConfig,
    layout: Layout,
    pp_rank: int,
    *,
    precision: str,
    distributed: bool,
    replicas: int,
    learn_temperature: bool = False,
    overlap: bool = False,
) -> list[State]:
    """Return the states of a pipeline rank, one for each rank of its gradient group (DP × CP), in the group's order.

    Args:
        overlap: reduce gradients in buckets during backward; each bucket is padded and sharded by itself.
    """
    group = replicas * layout.cp
    total = [State(0, 0, 0)] * group
    for number, chunk in enumerate(chunks_of(config, layout, pp_rank)):
        # megatron-core cuts only the stage whose backward comes last into buckets.
        bucket = bucket_size(replicas) if overlap and pp_rank == number == 0 else None
        parameters = chunk_parameters(config, layout, chunk)
        width = WIDTHS[precision]
        buffers = [(width, parameters)]
        if learn_temperature and chunk.last:  # the temperature is fp32 and is registered before the submodules
            buffers = [(width, [1, *parameters])] if width == FP32 else [(width, parameters), (FP32, [1])]
        for buffer_width, sizes in buffers:
            of_ranks = _buffer(sizes, buffer_width, distributed, group, bucket)
            total = [_add(a, b) for a, b in zip(total, of_ranks, strict=True)]
    return total


def _add(a: State, b: State) -> State:
    return State(a.parameters + b.parameters, a.gradients + b.gradients, a.optimizer + b.optimizer)


def _buffer(sizes: Sequence[int], width: int, distributed: bool, group: int, bucket: int | None) -> list[State]:
    """Return the states of a stage's parameters of one dtype, one for each rank of ``group``."""
    of_optimizer = ADAM_BYTES + (FP32 if width < FP32 else 0)
    if not distributed:
        values = sum(sizes)
        return [State(values * width, values * FP32, values * of_optimizer)] * group
    owned, first, end, ranges = [0] * group, 0, 0, []
    for number, size in enumerate(reversed(sizes), 1):  # backward finishes the parameters in this order
        start = _round_up(end, _PARAMETER_ALIGNMENT)
        end = start + size
        ranges.append((start, end))
        if number == len(sizes) or (bucket is not None and end - first >= bucket):
            end = _round_up(end, math.lcm(group, _BUFFER_ALIGNMENT))
            _share_out(ranges, first, (end - first) // group, owned)
            first, ranges = end, []
    return [State(end * width, end * FP32, count * of_optimizer) for count in owned]


def _share_out(ranges: Sequence[tuple[int, int]], first: int, shard: int, owned: list[int]) -> None:
    """Add each rank's values of a bucket to ``owned``; the bucket starts at ``first``, a rank owns ``shard`` values."""
    for start, end in ranges:
        for rank in range((start - first) // shard, (end - 1 - first) // shard + 1):
            low = first + rank * shard
            owned[rank] += min(end, low + shard) - max(start, low)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
