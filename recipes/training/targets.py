"""The roles of a batch's texts: slots, identities of texts and teachers' answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_embed.bridge.sequences import to_device
from megatron_embed.recipes.datasets.text_ids import text_id


@dataclass(frozen=True)
class Targets:
    """A rank's part of the batch: ``Q`` queries, then ``Q × K`` passage slots, some of them empty.

    Attributes:
        queries: Q, the same on every rank.
        valid: ``[Q, K]`` bool: False in empty slots, where a query has fewer hard negatives than slots.
        query_ids: ``[Q]`` :func:`text_id` of each query; None if no two texts are the same.
        passage_ids: ``[Q, K]`` :func:`text_id` of each passage, 0 in empty slots.
        known_ids: ``[Q, M]`` ids of all known positives of each query, padded with 0.
        teacher_scores: ``[Q, K]`` the teacher's score of each slot.
        teacher_embeddings: ``[texts, D]`` the teacher's vectors, in the order of the texts.
        has_teacher_embedding: ``[texts]`` bool: True where a text has a teacher's vector.
    """

    queries: int
    valid: Tensor
    query_ids: Tensor | None = None
    passage_ids: Tensor | None = None
    known_ids: Tensor | None = None
    teacher_scores: Tensor | None = None
    teacher_embeddings: Tensor | None = None
    has_teacher_embedding: Tensor | None = None

    @property
    def slots(self) -> int:
        return self.valid.shape[1]

    def to(self, device: torch.device) -> Targets:
        """Return these targets on another device."""
        moved = {name: to_device(x, device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)

    @property
    def most_known(self) -> int:
        """The columns of ``known_ids``."""
        return 0 if self.known_ids is None else self.known_ids.shape[1]

    def widened(self, columns: int) -> Targets:
        """Return these targets with ``known_ids`` of so many columns, which all ranks must agree on before a gather."""
        if self.known_ids is None or columns == self.most_known:
            return self
        return replace(self, known_ids=torch.nn.functional.pad(self.known_ids, (0, columns - self.most_known)))

    def gathered(self, group: dist.ProcessGroup | None) -> Targets:
        """Return the slots and identities of all ranks, in rank order; ``known_ids`` is equally wide on all of them."""
        if group is None:
            return self
        names = ("valid", "query_ids", "passage_ids", "known_ids")
        found = {name: _gather(x, group) for name in names if (x := getattr(self, name)) is not None}
        return Targets(queries=self.queries * group.size(), **found)  # type: ignore[arg-type]

    def false_negatives(self, of: Targets, rows: slice, own: Tensor) -> tuple[Tensor, Tensor]:
        """Return which of these (gathered) candidates are no negatives for some queries of a rank.

        Args:
            of: the rank's own targets.
            rows: the queries of ``of`` to check.
            own: ``[R]`` the indices of these queries among the gathered ones.

        Returns:
            ``[R, N]`` for passages and ``[R, G]`` for queries: True for the text of the positive, a known positive of
            the query, and the positive of another query with the same text. This includes the positive itself. Both are
            scalars (False) if texts have no identities.
        """
        if self.query_ids is None or self.passage_ids is None or of.passage_ids is None or of.query_ids is None:
            nothing = torch.zeros((), dtype=torch.bool, device=self.valid.device)
            return nothing, nothing
        positives = of.passage_ids[rows, :1]
        known_R = positives if of.known_ids is None else torch.cat((positives, of.known_ids[rows]), dim=1)
        same_query_RG = of.query_ids[rows, None] == self.query_ids
        passages_RN = _is_among(self.passage_ids.flatten(), known_R).view(len(own), self.queries, self.slots)
        passages_RN[:, :, 0] |= same_query_RG
        # Query j is no negative for passage p(i) if p(i) answers j.
        queries_RG = same_query_RG | _is_among(self.passage_ids[:, 0], known_R)
        if self.known_ids is not None:
            for column in self.known_ids.unbind(1):
                queries_RG |= positives == column
        return passages_RN.flatten(1), queries_RG

    def own_false_negatives(self) -> Tensor:
        """Return ``[Q, K]``: True where a query's own slot holds the text of its positive or of a known positive.

        This includes the positive itself. The result is a scalar (False) if texts have no identities.
        """
        if self.passage_ids is None:
            return torch.zeros((), dtype=torch.bool, device=self.valid.device)
        known_QM = self.passage_ids[:, :1]
        if self.known_ids is not None:
            known_QM = torch.cat((known_QM, self.known_ids), dim=1)
        found_QK = torch.zeros_like(self.valid)
        for column in known_QM.unbind(1):
            found_QK |= (column[:, None] == self.passage_ids) & (column[:, None] != 0)
        return found_QK


def _is_among(ids_N: Tensor, wanted_RM: Tensor) -> Tensor:
    """Return ``[R, N]``: whether each id is in a row of ``wanted_RM``; loop over M, as R × N × M values may not fit."""
    found = torch.zeros(wanted_RM.shape[0], ids_N.shape[0], dtype=torch.bool, device=ids_N.device)
    for column in wanted_RM.unbind(1):
        found |= (column[:, None] == ids_N) & (column[:, None] != 0)
    return found


def _gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x, group=group)
    return torch.cat(parts)


def identify(
    queries: Sequence[str], passages: Sequence[Sequence[str]], known: Sequence[Sequence[str]], slots: int
) -> dict[str, Tensor]:
    """Return the identity fields of :class:`Targets`, computed from the texts without prompts."""
    rows = [[text_id(text) for text in group] for group in passages]
    most = max(len(group) for group in known)
    return {
        "query_ids": torch.tensor([text_id(text) for text in queries]),
        "passage_ids": torch.tensor([row + [0] * (slots - len(row)) for row in rows]),
        "known_ids": torch.tensor([[text_id(t) for t in group] + [0] * (most - len(group)) for group in known]),
    }
