"""Exact top-k scalar products of queries with vectors that arrive in parts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def top_k(queries: Tensor, parts: Iterable[tuple[int, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """Return each query's ``k`` highest scores and the rows that have them, best first, equal scores by row.

    Args:
        queries: ``[q, d]`` fp32.
        parts: (number of the first row, ``[n, d]`` fp32 on the queries' device), in ascending order of rows. Only one
            part is in memory at a time.

    Returns:
        Scores ``[q, k]`` fp32 and rows ``[q, k]`` int64; −inf and −1 fill the places beyond the number of rows.
    """
    best, where = nothing_found(len(queries), k, queries.device)
    for first, part in parts:
        new, position = (queries @ part.T).topk(min(k, len(part)), dim=1)
        position, order = position.sort(dim=1)
        # Earlier results come first, and new ones follow by row. A stable sort keeps ties in this order.
        best = torch.cat([best, new.gather(1, order)], dim=1)
        where = torch.cat([where, position + first], dim=1)
        best, order = best.sort(dim=1, descending=True, stable=True)
        best, where = best[:, :k], where.gather(1, order)[:, :k]
    return best, where


def nothing_found(queries: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the result of :func:`top_k` over no rows."""
    scores = torch.full((queries, k), -torch.inf, device=device)
    return scores, torch.full((queries, k), -1, dtype=torch.long, device=device)
