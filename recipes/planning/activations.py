"""Bytes of activations: what autograd keeps of a micro-batch between its forward and its backward.

The terms follow Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models"), adapted to
what these layers really keep: no dropout masks, no attention matrix (the kernels keep a log-sum-exp a head and row),
a gated MLP, grouped KV heads, rope and keys and values over context-parallel ranks.

The CPU terms are those of megatron-core's own layers, and are tested against what autograd saves. The CUDA terms are
those of the fused kernels (RMSNorm, SwiGLU, attention in 16 bits); Transformer Engine may keep somewhat more or less.

Legend: ``T`` tokens of a context-parallel slice, ``h`` hidden, ``q`` and ``kv`` the width of queries and of keys on a
tensor-parallel rank, ``f`` the MLP's width there, ``w`` bytes of an activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.families import FAMILIES, LayerSize
from megatron_embed.bridge.layout import Layout
from megatron_embed.bridge.sequences import TokenBatch
from megatron_embed.recipes.planning.state import FP32, WIDTHS, ModelChunk


@dataclass(frozen=True)
class Shape:
    """Form of a micro-batch."""

    lengths: tuple[int, ...]
    columns: int
    packed: bool
    masked: bool

    @classmethod
    def of(cls, batch: TokenBatch) -> Shape:
        """The form of a real one."""
        return cls(batch.lengths, batch.input_ids.shape[1], batch.packed, batch.mask is not None)

    @property
    def rows(self) -> int:
        return 1 if self.packed else len(self.lengths)

    @property
    def tokens(self) -> int:
        """Padding included."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Activations:
    """What a stage keeps, under one layout and precision.

    Attributes:
        device: ``cpu`` or ``cuda``: they differ in their kernels.
    """

    config: EncoderConfig
    layout: Layout
    precision: str
    sequence_parallel: bool
    device: str

    @property
    def width(self) -> int:
        return WIDTHS[self.precision]

    @property
    def _cpu(self) -> bool:
        return self.device == "cpu"

    @property
    def _q(self) -> int:
        return self.config.num_attention_heads * self.config.head_dim // self.layout.tp

    @property
    def _kv(self) -> int:
        return self.config.num_key_value_heads * self.config.head_dim // self.layout.tp

    @property
    def _copied_queries(self) -> int:
        """Width of the queries that are a copy of the fused projection's; one KV head a rank leaves them a view."""
        return 0 if self.config.num_key_value_heads == self.layout.tp else self._q

    @property
    def _casts(self) -> bool:
        """Whether attention computes in a wider dtype than the layer."""
        return self._cpu and self.width < FP32

    def _values_are_views(self, shape: Shape) -> bool:
        """Whether attention's values are views of the fused projection, which is kept whole with them."""
        return not (self.layout.cp > 1 or self._casts or (shape.masked and self._cpu))

    def _outside(self, shape: Shape) -> int:
        """Tokens outside the matrices, which sequence parallelism divides."""
        return shape.tokens // self.layout.cp // (self.layout.tp if self.sequence_parallel else 1)

    def chunk(self, chunk: ModelChunk, shape: Shape, recompute: str) -> int:
        """Bytes that a (virtual) stage keeps of a micro-batch."""
        config, local = self.config, shape.tokens // self.layout.cp
        total = chunk.layers * self.layer(shape, recompute)
        if recompute == "none":
            total += self._tables(shape)
        if chunk.first:  # ids: a view of the whole row, or a masked copy with its mask
            total += shape.tokens * 8 if self.layout.tp == 1 else local * 9
        if chunk.last:
            # the norm keeps its input; pooling keeps its weights, not the states
            total += self._outside(shape) * (config.hidden_size * self.width + FP32)
            total += shape.tokens * FP32 * (len(shape.lengths) if shape.packed else 1)
            if config.normalize:  # the pooled vectors, their norms, where these were clamped
                total += len(shape.lengths) * (FP32 * config.hidden_size + 2 * FP32)
        elif self.layout.vpp:  # its output: others free theirs as soon as it is sent, see `transformer_config`
            total += self._outside(shape) * config.hidden_size * self.width
        return total

    def layer(self, shape: Shape, recompute: str) -> int:
        """Bytes that a layer keeps of a micro-batch."""
        hidden = self._outside(shape) * self.config.hidden_size * self.width
        if recompute == "full":
            return hidden
        attention = self._core_attention_input(shape) if recompute == "selective" else self._attention(shape)
        return 2 * self._norm(shape) + attention + self._of_family(shape, recompute) + self._mlp(shape)

    def recomputed(self, shape: Shape, recompute: str) -> int:
        """Bytes that come back for a while in backward: those of the one layer that is computed again."""
        if recompute == "none":
            return 0
        return max(0, self.layer(shape, "none") - self.layer(shape, recompute))

    def _norm(self, shape: Shape) -> int:
        """Input and output (which the linear layer keeps), and a factor a token: ``T h 2w + 4 T``."""
        return self._outside(shape) * (self.config.hidden_size * 2 * self.width + FP32)

    def _of_family(self, shape: Shape, recompute: str) -> int:
        """What the family's layers add to the common form."""
        tokens, selective = shape.tokens // self.layout.cp, recompute == "selective"
        projected = 0 if selective or self._values_are_views(shape) else self._q + 2 * self._kv
        projected += 0 if selective else self._copied_queries
        size = LayerSize(
            tokens=tokens,
            queries=self._q,
            keys=self._kv,
            head_dim=self.config.head_dim,
            width=self.width,
            projected=tokens * projected * self.width,
            keeps_attention_input=selective,
        )
        return FAMILIES[self.config.family].layer_activations(size)

    def _mlp(self, shape: Shape) -> int:
        """``T f 3w``: gate, up and ``silu(gate) · up``."""
        f = self.config.intermediate_size // self.layout.tp
        return shape.tokens // self.layout.cp * f * 3 * self.width

    def _core_attention_input(self, shape: Shape) -> int:
        """``T w (q + 2 kv) + T w q``, and the output ``T w q``: keys and values are views of the fused projection."""
        return shape.tokens // self.layout.cp * self.width * (2 * self._q + 2 * self._kv + self._copied_queries)

    def _attention(self, shape: Shape) -> int:
        """Rotated queries and keys, values, output, log-sum-exp; the input of the projection behind it."""
        local = shape.tokens // self.layout.cp
        # on a CPU attention computes in fp32
        width = FP32 if self._cpu else self.width
        output = 2 * local * self._q * width + local * FP32 * self.config.num_attention_heads // self.layout.tp
        if self._cpu and (shape.packed or self.width < FP32):
            # runs are joined, or cast back: another copy
            output += local * self._q * self.width
        return output + self._keys_and_values(shape, local, width)

    def _keys_and_values(self, shape: Shape, local: int, width: int) -> int:
        if shape.masked and self._cpu:  # each KV head is repeated for its queries; the mask becomes a bias
            return 2 * shape.tokens * self._q * width + shape.tokens * FP32
        mask = shape.tokens if shape.masked else 0
        if self.layout.cp > 1:  # gathered whole; a cast copies the columns that are looked at
            tokens = self._key_columns(shape) * shape.rows if self._casts else shape.tokens
            return 2 * tokens * self._kv * width + mask
        if self._casts:
            return 2 * local * self._kv * width + mask
        # rotated keys; values are a view of the fused projection
        return local * self.width * (self._kv + self._q + 2 * self._kv) + mask

    def _key_columns(self, shape: Shape) -> int:
        """Columns of keys that the queries of a context-parallel slice look at, on the rank with most."""
        if not shape.packed:
            return shape.columns
        ends = [0, *accumulate(shape.lengths)]
        if ends[-1] < shape.columns:
            ends.append(shape.columns)
        step, widest = shape.columns // self.layout.cp, 0
        for low in range(0, shape.columns, step):
            start = max(end for end in ends if end <= low)
            widest = max(widest, min(end for end in ends if end >= low + step) - start)
        return widest

    def _tables(self, shape: Shape) -> int:
        """Cosines and sines of a row, and the Llama-4 scale where it acts; shared by the layers."""
        config, rope = self.config, self.config.rope_parameters
        scaled = FAMILIES[config.family].query_scale and "llama_4_scaling_beta" in rope
        scaled = scaled and max(shape.lengths) > rope.get("original_max_position_embeddings", float("inf"))
        return shape.columns // self.layout.cp * self.width * (2 * config.head_dim + scaled)


def in_flight(chunks: Sequence[int], pp: int, pp_rank: int, micro_batches: int) -> int:
    """Most bytes that a pipeline rank keeps at a time, from what each of its (virtual) stages keeps of a micro-batch.

    1F1B (Narayanan et al. 2021) starts backward once the pipe is full: ``min(PP - rank, m)`` micro-batches. Interleaved
    stages go through micro-batches in groups of PP, forward through the rounds and backward in the reverse order;
    megatron-core fills ``2 (PP - rank - 1) + (VPP - 1) PP`` of them before the first backward.
    """
    rounds = len(chunks)
    if rounds == 1:
        return chunks[0] * min(pp - pp_rank, micro_batches)
    total = micro_batches * rounds
    warm_up = min(2 * (pp - pp_rank - 1) + (rounds - 1) * pp, total)
    now = most = 0
    # the steady state repeats itself after pp × rounds
    for number in range(min(total, warm_up + 2 * pp * rounds)):
        now += chunks[number % (pp * rounds) // pp]
        most = max(most, now)
        if number >= warm_up:
            now -= chunks[rounds - 1 - (number - warm_up) % (pp * rounds) // pp]
    return most
