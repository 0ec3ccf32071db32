"""The contrastive loss of a global batch that is spread over data-parallel ranks.

Every rank scores its own queries against the candidates of all ranks. The gather is differentiable (its backward is a
reduce-scatter) and detaches nothing, so passages receive their gradient from every rank's queries. Rows are scored in
chunks that backward recomputes, so the loss needs memory for one chunk and not for the whole score matrix.

Legend: ``Q`` queries of this rank, ``K`` passage slots of a query (the positive first), ``W`` ranks, ``G = W Q``
queries of all ranks, ``N = W Q K`` slots of all ranks, ``R`` rows of a chunk, ``D`` dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_embed.recipes.config.schema import LossSection
from megatron_embed.recipes.planning.step import CHUNK_BYTES
from megatron_embed.recipes.training.targets import Targets


@dataclass(frozen=True)
class ContrastiveLoss:
    """InfoNCE (van den Oord et al. 2018) with the recipe's negatives, masks and additional terms.

    ``L = -1/G Σ_i log( exp(s_i,p(i) / T) / Σ_j exp(s_ij / T) )``, where s are scalar products and j runs over every
    candidate that is not masked. Every rank calls it with its own part; the *sum* over ranks is the loss of the global
    batch.

    * ``symmetric``: the mean of L and the same loss over queries for each positive (Günther et al. 2023).
    * ``query_query_negatives``, ``passage_passage_negatives``: add candidates; all directions then share one softmax
      (Li et al. 2023, GTE).
    * ``in_batch_negatives=false``: j runs over the query's own slots. The masks are the same: a slot that holds the
      text of the positive, or of another known positive of the query, is no negative.
    * ``matryoshka_dims`` (Kusupati et al. 2022): ``L = 1/|W| Σ_w L_w`` over the widths W = {D} ∪ ``matryoshka_dims``.
      ``L_w`` is the loss of the vectors' first w numbers, normalised to length 1 again. W always contains the whole
      width D, and each width counts once.
    * ``score_distillation_weight``: adds KL(teacher ‖ student) over each query's own slots, with student temperature T.
      It is part of ``L_w``: every width learns the teacher's order, and the weight does not grow with their number.
    * ``embedding_distillation_weight``: adds the mean of 1 - cos(vector, teacher's vector) over texts with a teacher's
      vector. It applies to the whole width only, which is that of the teacher's vectors, and is added once to the mean.

    Attributes:
        normalize: True if the vectors have length 1; truncated vectors are then normalised again.
        group: the data-parallel group, or None for a single rank.
    """

    config: LossSection
    normalize: bool = True
    group: dist.ProcessGroup | None = None

    @property
    def world(self) -> int:
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank()

    def __call__(self, embeddings: Tensor, targets: Targets, temperature: Tensor | float | None = None) -> Tensor:
        """Return this rank's share of the loss; see :meth:`with_alone`."""
        return self.with_alone(embeddings, targets, temperature)[0]

    def with_alone(
        self, embeddings: Tensor, targets: Targets, temperature: Tensor | float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return this rank's share of the loss, and the number of its queries whose every negative is masked.

        The contrastive loss of such a query is constant, so it trains nothing.

        Args:
            embeddings: ``[texts, D]`` fp32 or wider: the queries, then the filled passage slots, query by query.
            targets: the queries, slots and teacher's answers that the texts belong to.
            temperature: replaces the config's temperature.
        """
        temperature = self.config.temperature if temperature is None else temperature
        queries_QD = embeddings[: targets.queries]
        # Empty slots become zero vectors and are masked; with fixed slots every rank gathers the same shape.
        passages = embeddings[targets.queries :]
        if len(passages) < targets.valid.numel():
            zeros = embeddings.new_zeros(targets.valid.numel(), embeddings.shape[1])
            passages = zeros.masked_scatter(targets.valid.reshape(-1, 1), passages)
        passages_QKD = passages.view(*targets.valid.shape, -1)
        total = embeddings.new_zeros(())
        alone_Q = torch.ones(targets.queries, dtype=torch.bool, device=embeddings.device)
        widths = self.config.widths(embeddings.shape[1])
        for width in widths:
            queries, slots = self._truncate(queries_QD, width), self._truncate(passages_QKD, width)
            info_nce, alone_at_width_Q = self._info_nce(queries, slots, targets, temperature)
            total, alone_Q = total + info_nce, alone_Q & alone_at_width_Q
            if self.config.score_distillation_weight:
                kl = _score_distillation(queries, slots, targets, temperature)
                total = total + self.config.score_distillation_weight * kl / self._global_queries(targets)
        total = total / len(widths)
        if self.config.embedding_distillation_weight:
            total = total + self.config.embedding_distillation_weight * self._embedding_distillation(
                embeddings, targets
            )
        return total, alone_Q.sum()

    def _global_queries(self, targets: Targets) -> int:
        return targets.queries * self.world

    def _truncate(self, x: Tensor, dim: int) -> Tensor:
        if dim == x.shape[-1]:
            return x
        x = x[..., :dim]
        return F.normalize(x, dim=-1) if self.normalize else x

    # ---- InfoNCE

    def _info_nce(
        self, queries: Tensor, slots: Tensor, targets: Targets, temperature: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """Return this rank's share of InfoNCE, and ``[Q]`` bool: True for queries without a negative."""
        if not self.config.in_batch_negatives:
            scores_QK = torch.einsum("qd,qkd->qk", queries, slots)
            masked = ~targets.valid | targets.own_false_negatives() | self._above_margin(scores_QK, scores_QK[:, :1])
            masked[:, 0] = False
            log_p = (scores_QK / temperature).masked_fill(masked, float("-inf")).log_softmax(dim=1)
            return -log_p[:, 0].sum() / self._global_queries(targets), masked[:, 1:].all(dim=1)
        pool = self._pool(queries, slots, targets)
        rows = max(1, CHUNK_BYTES // (pool.width * queries.element_size()))
        total, alone = queries.new_zeros(()), []
        for start in range(0, targets.queries, rows):
            chunk = slice(start, min(start + rows, targets.queries))
            # A view kept for recomputation would keep all slots in memory beside their gathered copy.
            positives = slots[chunk, 0].clone() if pool.needs_positives else None
            arguments = (queries[chunk], positives, pool, targets, chunk, temperature)
            if rows >= targets.queries:
                of_chunk, alone_R = self._rows(*arguments)
            else:
                of_chunk, alone_R = checkpoint(self._rows, *arguments, use_reentrant=False, preserve_rng_state=False)
            total = total + of_chunk
            alone.append(alone_R)
        return total / self._global_queries(targets), torch.cat(alone)

    def _pool(self, queries: Tensor, slots: Tensor, targets: Targets) -> _Pool:
        """Return the candidates that rows are scored against: those of all ranks, or of this rank."""
        group = self.group if self.config.cross_rank_negatives and self.world > 1 else None
        config = self.config
        needs_queries = config.symmetric or config.query_query_negatives
        first = self.rank * targets.queries if group is not None else 0
        gradient: list[Tensor] = []
        return _Pool(
            passages=_Collect.apply(_gather(slots.flatten(0, 1), group), gradient),
            gradient=gradient,
            queries=_gather(queries, group) if needs_queries else None,
            targets=targets.gathered(group),
            first=first,
            needs_positives=config.symmetric or config.passage_passage_negatives,
            directions=1 + config.symmetric + config.query_query_negatives + config.passage_passage_negatives,
        )

    def _rows(
        self,
        queries_RD: Tensor,
        positives_RD: Tensor | None,
        pool: _Pool,
        targets: Targets,
        chunk: slice,
        temperature: Tensor | float,
    ) -> tuple[Tensor, Tensor]:
        """Return Σ over the chunk's queries of -log softmax of the positive, and ``[R]``: has a query no negative."""
        config = self.config
        own = (
            torch.arange(chunk.start, chunk.stop, device=queries_RD.device) + pool.first
        )  # the pool's numbers of the chunk's queries
        same_RN, same_RG = pool.targets.false_negatives(targets, chunk, own)
        invalid = ~pool.targets.valid.flatten()
        scores_RN = pool.score(queries_RD)
        labels = own * targets.slots
        positive_R1 = scores_RN.gather(1, labels[:, None])
        doubtful = same_RN | invalid | self._above_margin(scores_RN, positive_R1)
        directions = [_mask(scores_RN / temperature, doubtful, labels[:, None], False)]
        if config.symmetric:
            scores_RG = positives_RD @ pool.queries.T  # type: ignore[operator, union-attr]
            doubtful = same_RG | self._above_margin(scores_RG, positive_R1)
            directions.append(_mask(scores_RG / temperature, doubtful, own[:, None], False))
        if config.query_query_negatives:
            scores_RG = queries_RD @ pool.queries.T  # type: ignore[union-attr]
            doubtful = same_RG | self._above_margin(scores_RG, positive_R1)
            directions.append(_mask(scores_RG / temperature, doubtful, own[:, None], True))
        if config.passage_passage_negatives:
            scores_RN = pool.score(positives_RD)  # type: ignore[arg-type]
            mine = labels[:, None] + torch.arange(targets.slots, device=labels.device)
            doubtful = same_RN | invalid | self._above_margin(scores_RN, positive_R1)
            directions.append(_mask(scores_RN / temperature, doubtful, mine, True))
        if config.query_query_negatives or config.passage_passage_negatives:
            log_z = torch.cat(directions, dim=1).logsumexp(dim=1)
        else:
            log_z = torch.stack([logits.logsumexp(dim=1) for logits in directions]).mean(dim=0)
        unmasked_R = sum((logits.detach() > float("-inf")).sum(dim=1) for logits in directions)
        # Symmetric losses score the positive in both directions.
        return (log_z - positive_R1[:, 0] / temperature).sum(), unmasked_R == 1 + config.symmetric

    def _above_margin(self, scores: Tensor, positive: Tensor) -> Tensor:
        """Return where a score is above the positive's by more than the margin; those are likely false negatives."""
        margin = self.config.false_negative_margin
        if margin is None:
            return torch.zeros((), dtype=torch.bool, device=scores.device)
        return scores.detach() > positive.detach() + margin

    # ---- embedding distillation

    def _embedding_distillation(self, embeddings: Tensor, targets: Targets) -> Tensor:
        vectors, has = targets.teacher_embeddings, targets.has_teacher_embedding
        count = embeddings.new_zeros(()) if has is None else has.sum().to(embeddings.dtype)
        if self.world > 1:
            dist.all_reduce(count, group=self.group)
        if vectors is None or has is None:
            return embeddings.sum() * 0
        # Texts without a vector count 0: to select those with one, the host would have to wait for their number.
        cosine = F.cosine_similarity(embeddings, vectors.to(embeddings.dtype), dim=1)
        return ((1 - cosine) * has).sum() / count.clamp(min=1)


@dataclass(frozen=True)
class _Pool:
    """The gathered candidates of a batch."""

    passages: Tensor
    #: the gradient of the passages, which the chunks of rows add up here
    gradient: list[Tensor]
    queries: Tensor | None
    targets: Targets
    #: index of this rank's first query in the pool
    first: int
    #: True if this rank's positives are scored too
    needs_positives: bool
    directions: int

    @property
    def width(self) -> int:
        """Values held for a row: its scores in all directions, times the three score matrices in memory at a time."""
        return 3 * self.directions * self.passages.shape[0]

    def score(self, rows_RD: Tensor) -> Tensor:
        """Return the scores ``[R, N]`` of rows against all passages."""
        return _Score.apply(rows_RD, self.passages, self.gradient)


class _Collect(torch.autograd.Function):
    """The identity function, whose gradient is the sum that :class:`_Score` accumulated.

    Autograd's own accumulation would hold three matrices of the passages' size: the old sum, a chunk's part and the
    new sum.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: list[Tensor]) -> Tensor:
        ctx.gradient = gradient
        ctx.set_materialize_grads(False)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        (other,) = grads
        found = ctx.gradient.pop() if ctx.gradient else None
        if other is None or found is None:
            return (found if other is None else other), None
        return found.add_(other), None


class _Score(torch.autograd.Function):
    """The product ``rows @ passages.T``; its backward accumulates the passages' gradient in place."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, passages: Tensor, gradient: list[Tensor]) -> Tensor:
        ctx.save_for_backward(rows, passages)
        ctx.gradient = gradient
        return rows @ passages.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (rows, passages), (grad,) = ctx.saved_tensors, grads
        if ctx.gradient:
            ctx.gradient[0].addmm_(grad.T, rows)
        else:
            ctx.gradient.append(grad.T @ rows)
        return grad @ passages, None, None


def _gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Gather all ranks' rows in rank order; backward sums the ranks' gradients and keeps this rank's rows."""
    if group is None:
        return x
    return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=group)


def _mask(logits: Tensor, doubtful: Tensor, own: Tensor, blocked: bool) -> Tensor:
    """Set logits to -inf where ``doubtful``; at the row's ``own`` columns set them only if ``blocked``."""
    return logits.masked_fill(doubtful.expand_as(logits).scatter(1, own, blocked), float("-inf"))


def _score_distillation(queries: Tensor, slots: Tensor, targets: Targets, temperature: Any) -> Tensor:
    """Return Σ over this rank's queries of KL(softmax(teacher's scores) ‖ softmax(scores / T)) over their own slots."""
    scores = targets.teacher_scores
    if scores is None:
        return queries.sum() * 0
    empty = ~targets.valid
    # -inf on both sides would give 0 · (-inf + inf), so the sum leaves out empty slots.
    log_p = (torch.einsum("qd,qkd->qk", queries, slots) / temperature).masked_fill(empty, float("-inf"))
    log_p = log_p.log_softmax(dim=1).masked_fill(empty, 0.0)
    teacher = scores.to(queries.dtype).masked_fill(empty, float("-inf")).softmax(dim=1)
    return F.kl_div(log_p, teacher, reduction="sum")
