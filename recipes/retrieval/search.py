"""Exact search for the best documents among vectors on disk; the ranks share the work, one shard at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_embed.bridge.cpu import host
from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes.retrieval.top_k import nothing_found, top_k
from megatron_embed.recipes.retrieval.vectors import VectorFolder


class Searcher:
    """A search over a corpus. Each of n ranks scans every n-th shard, one at a time; all ranks get the merged results.

    The result does not depend on the number of ranks: a shard's scores are the same matrix product on any rank, and
    equal scores are ordered by row.

    Args:
        corpus: fp32 vectors.
        k: number of documents for a query, at most all.
        faiss: a factory string (``Flat``, ``HNSW32``, ``IVF1024,Flat``) of an index to search instead; it holds all
            vectors of the rank's shards in memory.

    Raises:
        UserError: ``faiss`` is given and FAISS is not installed or cannot build the index.
    """

    def __init__(self, corpus: VectorFolder, k: int, *, faiss: str | None = None) -> None:
        self.corpus, self.k = corpus, min(k, len(corpus))
        self._own = range(dist.get_rank(), len(corpus.manifest.shards), dist.get_world_size())
        self._index: Any = None
        self._index_rows = np.zeros(0, dtype=np.int64)
        if faiss:
            self._build_index(faiss)

    def search(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Find the best documents of each query. Every rank must call this with the same queries.

        Args:
            queries: ``[q, d]`` fp32.

        Returns:
            Scores and rows of the corpus, both ``[q, k]``, best first. Places that an approximate index leaves empty
            hold −inf and −1.
        """
        scores, rows = self._exact(queries) if self._index is None else self._approximate(queries)
        world = dist.get_world_size()
        if world > 1:
            scores, rows = (torch.cat(_gather(x, world), dim=1) for x in (scores, rows))
        found, where = scores.cpu().numpy(), rows.cpu().numpy()
        order = np.lexsort((where, -found), axis=1)[:, : self.k]
        return np.take_along_axis(found, order, axis=1), np.take_along_axis(where, order, axis=1)

    def _exact(self, queries: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        block = torch.from_numpy(np.ascontiguousarray(queries, dtype=np.float32)).to(host.device())
        shards = self.corpus.manifest.shards
        parts = (
            (shards[number].first, torch.from_numpy(np.array(self.corpus.shard(number))).to(host.device()))
            for number in self._own
        )
        return top_k(block, parts, self.k)

    def _approximate(self, queries: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        best, where = nothing_found(len(queries), self.k, host.device())
        if not len(self._index_rows):
            return best, where
        _, found = self._index.search(np.ascontiguousarray(queries, dtype=np.float32), self.k)
        rows = np.where(found >= 0, self._index_rows[found], -1)
        scores = self._exact_scores(queries, rows)  # an index that compresses vectors only estimates scores
        return torch.from_numpy(scores).to(best), torch.from_numpy(rows).to(where)

    def _exact_scores(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        scores = np.full(rows.shape, -np.inf, dtype=np.float32)
        for number in self._own:
            shard = self.corpus.manifest.shards[number]
            theirs, inside = self.corpus.shard(number), (rows >= shard.first) & (rows < shard.first + shard.rows)
            for asking in np.flatnonzero(inside.any(axis=1)):  # one by one, as all at once would copy GBs of vectors
                place = np.flatnonzero(inside[asking])
                scores[asking, place] = theirs[rows[asking, place] - shard.first] @ queries[asking]
        return scores

    def _build_index(self, factory: str) -> None:
        try:
            import faiss
        except ImportError:
            raise UserError("--faiss: FAISS is not installed; pip install faiss-cpu, or search without it") from None
        shards = [self.corpus.manifest.shards[number] for number in self._own]
        rows = [np.arange(shard.first, shard.first + shard.rows) for shard in shards]
        try:
            index = faiss.index_factory(self.corpus.manifest.dim, factory, faiss.METRIC_INNER_PRODUCT)
            if shards and not index.is_trained:
                index.train(np.concatenate([np.array(self.corpus.shard(number)) for number in self._own]))
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"--faiss {factory}: FAISS cannot build this index ({reason})") from None
        for number in self._own:
            index.add(np.array(self.corpus.shard(number)))
        self._index, self._index_rows = index, np.concatenate([self._index_rows, *rows])


def _gather(x: torch.Tensor, world: int) -> list[torch.Tensor]:
    parts = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(parts, x.contiguous())
    return parts
