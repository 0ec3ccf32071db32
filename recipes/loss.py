"""The contrastive loss of a global batch that is spread over data-parallel ranks.

Every rank scores its own queries against the passages of all ranks. The gather is differentiable (its backward is a
reduce-scatter), so passages receive their gradient from every rank's queries: nothing is detached.

Legend: ``Q`` queries of this rank, ``K`` passage slots a query (the positive first), ``W`` ranks, ``D`` hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_embed.recipes.config import LossSection


@dataclass(frozen=True)
class BatchShape:
    """How a rank's texts make up its part of the batch: ``Q`` queries, then ``Q × K`` passages of which some are empty.

    Attributes:
        queries: Q, the same on every rank.
        valid: ``[Q, K]`` bool: False where a query has fewer hard negatives than slots; those have no text.
    """

    queries: int
    valid: Tensor

    @property
    def slots(self) -> int:
        return self.valid.shape[1]

    @property
    def texts(self) -> int:
        """Texts of this rank: its queries and its filled slots."""
        return self.queries + int(self.valid.sum())


def gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All ranks' rows in rank order ``[W * n, …]``; backward sums the ranks' gradients and keeps the own rows."""
    if group is None or group.size() == 1:
        return x
    return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=group)


def contrastive_loss(
    embeddings: Tensor, shape: BatchShape, config: LossSection, group: dist.ProcessGroup | None = None
) -> Tensor:
    """InfoNCE (van den Oord et al. 2018) of this rank's queries, divided by the *global* number of queries.

    ``L = -1/(W Q) Σ_i log( exp(q_i·p_i / T) / Σ_j exp(q_i·p_j / T) )``, j over every passage of the global batch.
    The sum over ranks is the loss of the global batch.

    Args:
        embeddings: ``[texts, D]`` fp32 or wider: the queries, then the filled passage slots, query by query.
        shape: of this rank's part.
        group: the data-parallel group; None for a single rank.

    Returns:
        Scalar.
    """
    queries_QD = embeddings[: shape.queries]
    # empty slots become zero vectors and are masked; with fixed slots every rank gathers the same shape
    passages = embeddings.new_zeros(shape.valid.numel(), embeddings.shape[1])
    valid = shape.valid.flatten()
    passages = passages.masked_scatter(valid[:, None], embeddings[shape.queries :])
    world = 1 if group is None else group.size()
    rank = 0 if group is None else group.rank()
    positives = torch.arange(shape.queries, device=embeddings.device) * shape.slots

    if not config.in_batch_negatives:
        own_QKD = passages.view(shape.queries, shape.slots, -1)
        scores = torch.einsum("qd,qkd->qk", queries_QD, own_QKD)
        masked = ~shape.valid
        positives = torch.zeros_like(positives)
    else:
        if config.cross_rank_negatives:
            passages = gather(passages, group)
            if world > 1:
                flags = [torch.empty_like(valid) for _ in range(world)]
                dist.all_gather(flags, valid, group=group)
                valid = torch.cat(flags)
            positives = positives + rank * shape.valid.numel()
        scores = queries_QD @ passages.T
        masked = ~valid[None]
    logits = scores / config.temperature
    if bool(masked.any()):
        logits = logits.masked_fill(masked, float("-inf"))
    return F.cross_entropy(logits, positives, reduction="sum") / (shape.queries * world)
