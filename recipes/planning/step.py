"""One training step under a layout: its micro-batches, the traffic between ranks, and the pipeline's bubble.

The plan reads no data and gives every text its maximal length. Volumes are the bytes that the busiest rank sends with
ring collectives over ``n`` ranks: ``V (n - 1) / n`` for an all-gather to ``V`` bytes or a reduce-scatter from ``V``
bytes, and twice that for an all-reduce.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache

from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.layout import Layout
from megatron_embed.recipes.config.checks import loss_mode
from megatron_embed.recipes.config.schema import LossSection, RecipeConfig
from megatron_embed.recipes.encoding.micro_batches import BatchingPlan
from megatron_embed.recipes.planning.activations import Shape
from megatron_embed.recipes.planning.state import FP32, WIDTHS, ModelChunk

#: bytes of the scores of one chunk of the loss's rows, in all directions together
CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class Step:
    """The work of a data-parallel replica in a step.

    Attributes:
        mode: ``direct`` or ``cached``.
        queries: queries of the replica.
        slots: passage slots of a query.
        kept: micro-batches whose graphs pass 1 keeps; ``auto`` counts as none, because it takes what a plan leaves.
    """

    mode: str
    micro_batches: tuple[Shape, ...]
    queries: int
    slots: int
    kept: int

    @property
    def texts(self) -> int:
        return self.queries * (1 + self.slots)

    @property
    def tokens(self) -> int:
        """Tokens of all micro-batches, padding included."""
        return sum(shape.tokens for shape in self.micro_batches)

    @property
    def squared_lengths(self) -> int:
        """Σ length² in tokens²; the cost of attention is proportional to it."""
        return sum(n * n for shape in self.micro_batches for n in shape.lengths)

    @property
    def forwards(self) -> float:
        """Number of forward passes without recomputation; there is one backward pass."""
        return 2 - self.kept / len(self.micro_batches) if self.mode == "cached" else 1

    @property
    def largest(self) -> Shape:
        return max(self.micro_batches, key=lambda shape: (shape.tokens, len(shape.lengths)))


class _Shapes(BatchingPlan):
    """A plan that groups texts as training does, without building their tensors."""

    def _make(self, sequences: Sequence[Sequence[int]], texts: list[int]) -> Shape:  # type: ignore[override]
        lengths = tuple(len(ids) for ids in sequences)
        columns = sum(lengths) if self.packed else max(lengths)
        # Real texts differ in length, so a padded micro-batch of several texts has a mask.
        masked = not self.packed and len(lengths) > 1
        return Shape(lengths, -(-columns // self.multiple_of) * self.multiple_of, self.packed, masked)


def step_of(cfg: RecipeConfig, layout: Layout, replicas: int) -> Step:
    """Return the step of a replica.

    Raises:
        UserError: ``loss.mode=direct``, and the batch does not fit into one micro-batch.
    """
    data, train = cfg.data, cfg.train
    return _step(
        train.global_batch_size // replicas,
        1 + data.negatives_per_query,
        (data.query_max_length, data.passage_max_length),
        cfg.loss.mode,
        0 if cfg.loss.kept_micro_batches == "auto" else cfg.loss.kept_micro_batches,
        layout.pp,
        _Shapes(
            pad_id=0,
            packed=data.packing,
            max_tokens=train.micro_batch_tokens,
            max_texts=train.micro_batch_size,
            multiple_of=layout.tp * layout.cp,
            count_multiple_of=layout.pp if layout.vpp else 1,
        ),
    )


@lru_cache(maxsize=512)  # many layouts have the same step: only DP, TP × CP and (interleaved) PP matter
def _step(queries: int, slots: int, lengths: tuple[int, int], wanted: str, kept: int, pp: int, plan: _Shapes) -> Step:
    query, passage = lengths
    texts = [range(query)] * queries + [range(passage)] * (queries * slots)
    mode = loss_mode(wanted, pp)
    if mode == "auto":
        mode = "direct" if plan.holds(texts) else "cached"
    shapes: list[Shape] = (plan.join if mode == "direct" else plan.split)(texts)  # type: ignore[assignment]
    return Step(mode, tuple(shapes), queries, slots, min(kept, len(shapes)) if mode == "cached" else 0)


def loss_bytes(loss: LossSection, config: EncoderConfig, step: Step, replicas: int) -> int:
    """Estimate the bytes that the loss holds at its peak on the last stage, in fp32.

    It holds the replica's embeddings with their gradient, the passage slots, the gathered candidates with their
    gradient, and the scores of a chunk of rows with their gradient.
    """
    slots = step.queries * step.slots
    candidates, queries = slots, 0
    if loss.in_batch_negatives:
        everywhere = replicas if loss.cross_rank_negatives else 1
        candidates = everywhere * slots
        queries = everywhere * step.queries if loss.symmetric or loss.query_query_negatives else 0
    directions = 1 + loss.symmetric + loss.query_query_negatives + loss.passage_passage_negatives
    width = 3 * directions * candidates
    rows = min(step.queries, max(1, CHUNK_BYTES // (width * FP32)))
    scores = 2 * rows * width if loss.in_batch_negatives else 2 * slots
    values = 3 * step.texts * config.hidden_size
    for dim in loss.widths(config.hidden_size):
        values += 2 * dim * (slots + candidates + queries)
    return FP32 * (values + scores)


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in a step, for each kind of parallelism and for the loss."""

    tensor: int = 0
    pipeline: int = 0
    context: int = 0
    data: int = 0
    loss: int = 0

    @property
    def total(self) -> int:
        return sum(astuple(self))


def traffic(
    cfg: RecipeConfig,
    config: EncoderConfig,
    layout: Layout,
    step: Step,
    chunks: Sequence[ModelChunk],
    *,
    replicas: int,
    recompute: str,
    parameters: int,
    gradients: int,
) -> Traffic:
    """Return the traffic of a pipeline rank.

    Args:
        chunks: the (virtual) stages of the rank.
        parameters, gradients: their bytes on the rank.
    """
    width, sequence_parallel = WIDTHS[cfg.model.precision], bool(cfg.model.sequence_parallel)
    hidden = step.tokens // layout.cp * config.hidden_size * width
    layers = sum(chunk.layers for chunk in chunks)
    first, last = any(chunk.first for chunk in chunks), any(chunk.last for chunk in chunks)

    tensor = 0.0
    if layout.tp > 1:
        # A layer's forward takes two all-gathers and two reduce-scatters, or two all-reduces. Its backward takes the
        # same, and under sequence parallelism gathers the inputs of the first matrices once more.
        forwards = step.forwards + (recompute == "full")
        tensor = layers * hidden * (4 * forwards + (6 if sequence_parallel else 4))
        if sequence_parallel:
            norms = (2 * layers + last) * config.hidden_size * FP32
            tensor += first * hidden * (step.forwards + 1) + last * hidden * step.forwards + 2 * norms
        else:
            tensor += first * hidden * 2 * step.forwards

    message = hidden // (layout.tp if sequence_parallel else 1)
    forward = sum(not chunk.last for chunk in chunks) * (2 if step.mode == "cached" else 1)
    # A kept micro-batch sends its messages in both passes.
    pipeline = message * (forward + sum(not chunk.first for chunk in chunks)) if layout.pp > 1 else 0

    context = 0.0
    if layout.cp > 1:
        # Keys and values take an all-gather in forward, a reduce-scatter in backward, and another all-gather where
        # attention is recomputed.
        kv = config.num_key_value_heads * config.head_dim // layout.tp
        keys_and_values = step.tokens * 2 * kv * width
        context = layers * keys_and_values * (step.forwards + (recompute != "none") + 1)
        context += last * 2 * step.texts * config.hidden_size * FP32 * step.forwards

    # Either gradients are reduce-scattered and parameters all-gathered, or gradients are all-reduced.
    reduced = gradients + parameters if cfg.optimizer.distributed else 2 * gradients
    return Traffic(
        _ring(tensor, layout.tp),
        pipeline,
        _ring(context, layout.cp),
        _ring(reduced, replicas * layout.cp),
        _loss_gather(cfg.loss, config, step, replicas) if last else 0,
    )


def _loss_gather(loss: LossSection, config: EncoderConfig, step: Step, replicas: int) -> int:
    """Return the bytes for the all-gather of the candidates' embeddings and the reduce-scatter of their gradients."""
    if not loss.in_batch_negatives or not loss.cross_rank_negatives:
        return 0
    vectors = step.queries * (step.slots + (loss.symmetric or loss.query_query_negatives))
    dims = sum(loss.widths(config.hidden_size))
    return _ring(2 * replicas * vectors * dims * FP32, replicas)


def _ring(volume: float, ranks: int) -> int:
    return int(volume) * (ranks - 1) // ranks


def bubble(layout: Layout, micro_batches: int) -> float:
    """Return the pipeline's idle time as a share of its computing time: ``(PP - 1) / (m VPP)``.

    The formula is that of Narayanan et al. 2021. Both passes of the cached step fill and drain the pipe, so both have
    this share.
    """
    return (layout.pp - 1) / (micro_batches * (layout.vpp or 1))
