"""Examples that share a query or a positive are kept out of one another's batches.

In one batch the positive of one would be a negative of the other, or be masked and teach nothing.
"""

from __future__ import annotations

from array import array

import numpy as np

#: batches ahead and behind in which another place for an example is looked for
REACH = 16


class TextIds:
    """Identities of a source's queries and positives: 16 bytes an example while the source is read."""

    def __init__(self) -> None:
        self._queries, self._positives = array("Q"), array("Q")

    def add(self, query: int, positive: int) -> None:
        """The next example's."""
        self._queries.append(query)
        self._positives.append(positive)

    def groups(self) -> np.ndarray | None:
        """``[2, n]`` int32: which examples have the same query, and which the same positive; −1: no other has it.

        None where no text stands twice, so that such sources keep nothing.
        """
        found = [_groups(np.frombuffer(ids, dtype=np.uint64)) for ids in (self._queries, self._positives)]
        return np.stack(found) if any((groups >= 0).any() for groups in found) else None


def _groups(ids: np.ndarray) -> np.ndarray:
    order = np.argsort(ids, kind="stable")
    same = ids[order[1:]] == ids[order[:-1]]
    groups = np.full(len(ids), -1, dtype=np.int32)
    if not same.any():
        return groups
    numbers = np.concatenate([[0], np.cumsum(~same)])
    shared = np.concatenate([same, [False]]) | np.concatenate([[False], same])
    groups[order[shared]] = numbers[shared]
    return groups


def spread(order: np.ndarray, batch: int, groups: np.ndarray) -> np.ndarray:
    """An epoch's order in which no batch holds a text twice, as far as that can be had.

    The later of two examples that share a text changes places with an example of a following batch, or of the tail
    that fills none: the first that shares nothing with any, or else the first that fits. Near the end, with one of a
    batch before. Where none within :data:`REACH` batches fits (one query on too many rows), both stay. The set of all
    examples is the same; what the epoch drops may differ.

    Args:
        order: ``[n]`` examples, of which each ``batch`` in turn are a batch, and the rest is dropped.
        groups: of :meth:`TextIds.groups`.
    """
    order = order.copy()
    special: np.ndarray = np.any(groups[:, order] >= 0, axis=0)
    for first in range(0, len(order) - batch + 1, batch):
        places = np.flatnonzero(special[first : first + batch])
        if len(places) < 2:
            continue
        seen = _Seen(groups)
        end = first + (1 + REACH) * batch
        stuck = False
        for place in (first + places).tolist():
            if seen.fits(order[place]):
                seen.add(order[place])
                continue
            other = -1
            if not stuck:
                other = _later_that_fits(order, special, first + batch, end, seen)
            if other < 0 and end >= len(order):
                other = _earlier_that_fits(order, place, batch, groups)
            stuck = other < 0
            if not stuck:
                order[[place, other]] = order[[other, place]]
                special[[place, other]] = special[[other, place]]
                seen.add(order[place])
    return order


class _Seen:
    """The texts of a batch."""

    def __init__(self, groups: np.ndarray) -> None:
        self._groups = groups
        self._sets: tuple[set[int], set[int]] = (set(), set())

    def fits(self, example: int) -> bool:
        query, positive = self._groups[:, example].tolist()
        return query not in self._sets[0] and positive not in self._sets[1]

    def add(self, example: int) -> None:
        for texts, group in zip(self._sets, self._groups[:, example].tolist(), strict=True):
            if group >= 0:
                texts.add(group)


def _later_that_fits(order: np.ndarray, special: np.ndarray, first: int, last: int, seen: _Seen) -> int:
    free = np.flatnonzero(~special[first:last])
    return first + int(free[0]) if len(free) else _next_that_fits(order, first, min(last, len(order)), seen)


def _next_that_fits(order: np.ndarray, first: int, last: int, seen: _Seen) -> int:
    return next((place for place in range(first, last) if seen.fits(order[place])), -1)


def _earlier_that_fits(order: np.ndarray, place: int, batch: int, groups: np.ndarray) -> int:
    """A place in an earlier batch whose example and the one at ``place`` can change places."""
    start = place - place % batch
    others = np.delete(order[start : start + batch], place - start)
    rest = _Seen(groups)
    for example in others:
        rest.add(example)
    for first in range(start - batch, max(start - (1 + REACH) * batch, 0) - 1, -batch):
        held = groups[:, order[first : first + batch]]
        if ((held == groups[:, order[place], None]) & (held >= 0)).any():
            continue
        found = _next_that_fits(order, first, first + batch, rest)
        if found >= 0:
            return found
    return -1
