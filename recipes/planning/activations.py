"""Bytes of activations: the tensors that autograd keeps between the forward and the backward of a micro-batch.

The terms follow Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models"). They are
adapted to these layers: no dropout masks, no attention matrix (the kernels keep one log-sum-exp for each head and row),
a gated MLP, grouped KV heads, rope, and keys and values over context-parallel ranks.

The CPU terms describe megatron-core's own layers; tests compare them with the tensors that autograd saves. The CUDA
terms describe the fused kernels (RMSNorm, SwiGLU, attention in 16 bits); Transformer Engine may keep somewhat more or
less.

Legend: ``T`` tokens of a context-parallel slice, ``h`` hidden size, ``q`` and ``kv`` widths of the queries and of the
keys on a tensor-parallel rank, ``f`` width of the MLP on that rank, ``w`` bytes of an activation.
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
    """The shape of a micro-batch: its text lengths and its padded rows."""

    lengths: tuple[int, ...]
    columns: int
    packed: bool
    masked: bool

    @classmethod
    def of(cls, batch: TokenBatch) -> Shape:
        """Return the shape of a real micro-batch."""
        return cls(batch.lengths, batch.input_ids.shape[1], batch.packed, batch.mask is not None)

    @property
    def rows(self) -> int:
        return 1 if self.packed else len(self.lengths)

    @property
    def tokens(self) -> int:
        """Number of tokens, padding included."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Activations:
    """The activations that a pipeline stage keeps, under one layout and precision.

    Attributes:
        device: ``cpu`` or ``cuda``; their kernels keep different tensors.
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
        """Width of the queries that are a copy of the fused projection's; 0 with one KV head a rank (then a view)."""
        return 0 if self.config.num_key_value_heads == self.layout.tp else self._q

    @property
    def _casts(self) -> bool:
        """Whether attention computes in a wider dtype than the layer."""
        return self._cpu and self.width < FP32

    def _values_are_views(self, shape: Shape) -> bool:
        """Return whether attention's values are views of the fused projection, so that the whole projection is kept."""
        return not (self.layout.cp > 1 or self._casts or (shape.masked and self._cpu))

    def _outside(self, shape: Shape) -> int:
        """Return the tokens a rank holds outside the matrix products, where sequence parallelism divides them."""
        return shape.tokens // self.layout.cp // (self.layout.tp if self.sequence_parallel else 1)

    def chunk(self, chunk: ModelChunk, shape: Shape, recompute: str) -> int:
        """Return the bytes that a (virtual) stage keeps for a micro-batch."""
        config, local = self.config, shape.tokens // self.layout.cp
        total = chunk.layers * self.layer(shape, recompute)
        if recompute == "none":
            total += self._tables(shape)
        if chunk.first:  # token ids are kept as a view of the whole row, or as a masked copy with its mask
            total += shape.tokens * 8 if self.layout.tp == 1 else local * 9
        if chunk.last:
            # The norm keeps its input. Pooling keeps its weights, not the states.
            total += self._outside(shape) * (config.hidden_size * self.width + FP32)
            total += shape.tokens * FP32 * (len(shape.lengths) if shape.packed else 1)
            if config.normalize:  # keeps the pooled vectors, their norms, and where the norms were clamped
                total += len(shape.lengths) * (FP32 * config.hidden_size + 2 * FP32)
        elif self.layout.vpp:  # only interleaved stages keep their output after they send it, see `transformer_config`
            total += self._outside(shape) * config.hidden_size * self.width
        return total

    def layer(self, shape: Shape, recompute: str) -> int:
        """Return the bytes that a layer keeps for a micro-batch."""
        hidden = self._outside(shape) * self.config.hidden_size * self.width
        if recompute == "full":
            return hidden
        attention = self._core_attention_input(shape) if recompute == "selective" else self._attention(shape)
        return 2 * self._norm(shape) + attention + self._of_family(shape, recompute) + self._mlp(shape)

    def recomputed(self, shape: Shape, recompute: str) -> int:
        """Return the bytes that one recomputed layer adds for a while during backward."""
        if recompute == "none":
            return 0
        return max(0, self.layer(shape, "none") - self.layer(shape, recompute))

    def _norm(self, shape: Shape) -> int:
        """Return ``T h 2w + 4 T`` bytes: input, output (kept by the linear layer), and one factor for each token."""
        return self._outside(shape) * (self.config.hidden_size * 2 * self.width + FP32)

    def _of_family(self, shape: Shape, recompute: str) -> int:
        """Return the bytes that the layers of the model's family add to the common ones."""
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
        """Return ``T f 3w`` bytes: gate, up and ``silu(gate) · up``."""
        f = self.config.intermediate_size // self.layout.tp
        return shape.tokens // self.layout.cp * f * 3 * self.width

    def _core_attention_input(self, shape: Shape) -> int:
        """Return the bytes of attention that selective recomputation keeps.

        ``T w (q + 2 kv)`` for the fused projection, of which keys and values are views, ``T w q`` for the output, and
        another ``T w q`` where the queries are a copy.
        """
        return shape.tokens // self.layout.cp * self.width * (2 * self._q + 2 * self._kv + self._copied_queries)

    def _attention(self, shape: Shape) -> int:
        """Return the bytes of rotated queries and keys, values, output, log-sum-exp and the next projection's input."""
        local = shape.tokens // self.layout.cp
        # On a CPU, attention computes in fp32.
        width = FP32 if self._cpu else self.width
        output = 2 * local * self._q * width + local * FP32 * self.config.num_attention_heads // self.layout.tp
        if self._cpu and (shape.packed or self.width < FP32):
            # Joining the outputs of packed texts, or casting them back, makes another copy.
            output += local * self._q * self.width
        return output + self._keys_and_values(shape, local, width)

    def _keys_and_values(self, shape: Shape, local: int, width: int) -> int:
        if shape.masked and self._cpu:  # each KV head is repeated for its queries, and the mask becomes a bias
            return 2 * shape.tokens * self._q * width + shape.tokens * FP32
        mask = shape.tokens if shape.masked else 0
        if self.layout.cp > 1:  # whole rows are gathered; a cast copies only the columns that are attended to
            tokens = self._key_columns(shape) * shape.rows if self._casts else shape.tokens
            return 2 * tokens * self._kv * width + mask
        if self._casts:
            return 2 * local * self._kv * width + mask
        # The keys are rotated copies. The values are a view of the fused projection, which is kept whole.
        return local * self.width * (self._kv + self._q + 2 * self._kv) + mask

    def _key_columns(self, shape: Shape) -> int:
        """Return the most key columns that the queries of any one context-parallel slice attend to."""
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
        """Return the bytes of a row's cosines, sines and (where it acts) Llama-4 scale; the layers share them."""
        config, rope = self.config, self.config.rope_parameters
        scaled = FAMILIES[config.family].query_scale and "llama_4_scaling_beta" in rope
        scaled = scaled and max(shape.lengths) > rope.get("original_max_position_embeddings", float("inf"))
        return shape.columns // self.layout.cp * self.width * (2 * config.head_dim + scaled)


def in_flight(chunks: Sequence[int], pp: int, pp_rank: int, micro_batches: int) -> int:
    """Return the most bytes of activations that a pipeline rank keeps at a time.

    1F1B (Narayanan et al. 2021) starts backward once the pipe is full: ``min(PP - rank, m)`` micro-batches. Interleaved
    stages take micro-batches in groups of PP; they run forward through the rounds and backward in the reverse order.
    megatron-core runs ``2 (PP - rank - 1) + (VPP - 1) PP`` of them forward before the first backward.

    Args:
        chunks: bytes that each (virtual) stage of the rank keeps for a micro-batch.
    """
    rounds = len(chunks)
    if rounds == 1:
        return chunks[0] * min(pp - pp_rank, micro_batches)
    total = micro_batches * rounds
    warm_up = min(2 * (pp - pp_rank - 1) + (rounds - 1) * pp, total)
    now = most = 0
    # The steady state repeats itself every pp × rounds forward steps.
    for number in range(min(total, warm_up + 2 * pp * rounds)):
        now += chunks[number % (pp * rounds) // pp]
        most = max(most, now)
        if number >= warm_up:
            now -= chunks[rounds - 1 - (number - warm_up) % (pp * rounds) // pp]
    return most
