"""Keep examples that share a query or a positive in different batches.

In one batch the positive of one example would be a negative of the other, or would be masked and teach nothing.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np


def repeats(ids: np.ndarray) -> np.ndarray:
    """Return, in ascending order, the positions of integers in ``ids`` (``[n]``) that occurred earlier."""
    order = np.argsort(ids, kind="stable")
    return np.sort(order[1:][ids[order][1:] == ids[order][:-1]])


#: number of batches ahead and behind that are searched for another place for an example
REACH = 16
#: examples processed at a time, which bounds the memory for intermediate values
_BLOCK = 1 << 16


class TextIds:
    """Identities of a source's queries and positives; takes 16 bytes for each example while the source is read."""

    def __init__(self) -> None:
        self._columns = [array("Q"), array("Q")]

    def add(self, query: int, positive: int) -> None:
        """Add the identities of the next example's query and positive."""
        self._columns[0].append(query)
        self._columns[1].append(positive)

    def groups(self) -> np.ndarray | None:
        """Return ``[2, n]`` int32: group numbers of examples with the same query, and of those with the same positive.

        The number is −1 if no other example has the text. Return None if no text is repeated, so that such sources
        store nothing. The call discards the identities.
        """
        found = []
        while self._columns:  # process one column at a time and free it at once
            found.append(_groups(np.frombuffer(self._columns.pop(0), dtype=np.uint64)))
        return np.stack(found) if any((groups >= 0).any() for groups in found) else None


def repeated_pairs(groups: np.ndarray) -> np.ndarray:
    """Return, in order, the examples that repeat both query and positive of one earlier example."""
    shared = np.flatnonzero((groups >= 0).all(axis=0))
    pairs = groups[0, shared].astype(np.int64) << 32 | groups[1, shared]
    return np.delete(shared, np.unique(pairs, return_index=True)[1])


def _groups(ids: np.ndarray) -> np.ndarray:
    groups = np.full(len(ids), -1, dtype=np.int32)
    ordered = np.sort(ids)
    again = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    del ordered
    if not len(again):
        return groups
    for first in range(0, len(ids), _BLOCK):
        block = ids[first : first + _BLOCK]
        at = np.searchsorted(again, block)
        at[at == len(again)] = 0  # an id above the last one differs from any, so compare it with the first
        groups[first : first + _BLOCK] = np.where(again[at] == block, at, -1)
    return groups


def spread(order: np.ndarray, batch: int, groups: np.ndarray) -> np.ndarray:
    """Return an epoch's order in which no batch holds a text twice, as far as possible.

    The later of two examples that share a text swaps places with an example of a following batch or of the tail, which
    fills no batch. The partner is the first example that shares no text with any other, or else the first that fits.
    Near the end the partner may come from an earlier batch. If no example within :data:`REACH` batches fits (one query
    on too many rows), both stay. The set of all examples is the same, but the epoch may drop others.

    Args:
        order: ``[n]`` examples; each run of ``batch`` examples is a batch, and the rest is dropped.
        groups: ``[2, n]``, see :meth:`TextIds.groups`.
    """
    epoch = _Epoch(order.copy(), batch, np.asarray(groups))
    for number in range(len(order) // batch):
        if epoch.repeats[number]:
            epoch.mend(number)
    return epoch.order


class _Epoch:
    """The order of an epoch, while :func:`spread` changes it.

    Attributes:
        order: ``[n]`` examples.
        repeats: ``[batches + 1]`` bool: True for batches that may hold a text twice; the others need no work. The last
            entry is for the tail.
    """

    def __init__(self, order: np.ndarray, batch: int, groups: np.ndarray) -> None:
        self.order, self._batch, self._groups = order, batch, groups
        #: ``[n]`` bool: True for places whose example shares a text with another
        self._special = np.concatenate([(groups[:, part] >= 0).any(axis=0) for part in _blocks(order)])
        self.repeats = np.zeros(len(order) // batch + 1, dtype=np.bool_)
        self._seen, self._rest = _Seen(groups), _Seen(groups)
        self._held: dict[int, tuple[set[int], set[int]]] = {}  # for batches near the end: first place → texts
        step = max(_BLOCK // batch, 1) * batch
        for first in range(0, len(order) - batch + 1, step):
            whole = order[first : min(first + step, len(order) // batch * batch)].reshape(-1, batch)
            number = first // batch
            for column in groups:
                self.repeats[number : number + len(whole)] |= _any_twice(column[whole])

    def mend(self, number: int) -> None:
        """Replace the examples whose texts the batch already holds."""
        first = number * self._batch
        following, reach = first + self._batch, first + (1 + REACH) * self._batch
        places = first + np.flatnonzero(self._special[first:following])
        texts = self._groups[:, self.order[places]].T.tolist()
        self._seen.clear()
        later = self._later_that_fit(following, reach)
        hopeless: set[tuple[int, int]] = set()  # texts for which no earlier batch has a place
        for place, (query, positive) in zip(places.tolist(), texts, strict=True):
            if self._seen.fits(query, positive):
                self._seen.add(query, positive)
                continue
            other = next(later, -1)
            if other < 0 and reach >= len(self.order) and (query, positive) not in hopeless:
                other = self._earlier_that_fits(place)
                if other < 0:
                    hopeless.add((query, positive))
                else:
                    hopeless.clear()  # an earlier batch has changed
            if other >= 0:
                self._swap(place, other)
                self._seen.add(*self._groups[:, self.order[place]].tolist())

    def _swap(self, place: int, other: int) -> None:
        for values in (self.order, self._special):
            values[place], values[other] = values[other], values[place]
        self.repeats[other // self._batch] = True
        for changed in (place, other):
            self._held.pop(changed - changed % self._batch, None)

    def _later_that_fit(self, first: int, last: int) -> Iterator[int]:
        """Yield places whose examples fit at that moment: first those that share no text with any other example.

        A batch only gains texts, so an example that did not fit never fits later, and no place is tried again.
        """
        yield from (first + np.flatnonzero(~self._special[first:last])).tolist()
        yield from self._that_fit(first, min(last, len(self.order)), self._seen)

    def _that_fit(self, first: int, last: int, seen: _Seen) -> Iterator[int]:
        step = 32
        while first < last:  # mostly one of the next few fits, so blocks start small and grow
            groups = self._groups[:, self.order[first : min(first + step, last)]]
            for at in np.flatnonzero(seen.fit(groups)).tolist():
                if seen.fits(*groups[:, at].tolist()):
                    yield first + at
            first, step = first + step, 2 * step

    def _earlier_that_fits(self, place: int) -> int:
        """Return a place in an earlier batch whose example can swap with the one at ``place``; −1 for none."""
        batch, start = self._batch, place - place % self._batch
        query, positive = self._groups[:, self.order[place]].tolist()
        self._rest.clear()
        for first in range(start - batch, max(start - (1 + REACH) * batch, 0) - 1, -batch):
            queries, positives = self._texts(first)
            if query in queries or positive in positives:
                continue
            if self._rest.empty:  # fill it on first use, as the other texts of the example's batch are seldom needed
                self._rest.add_all(self._groups[:, np.delete(self.order[start : start + batch], place - start)])
            found = next(self._that_fit(first, first + batch, self._rest), -1)
            if found >= 0:
                return found
        return -1

    def _texts(self, first: int) -> tuple[set[int], set[int]]:
        """Return the queries and positives in a batch that other examples share."""
        if first not in self._held:
            queries, positives = self._groups[:, self.order[first : first + self._batch]]
            self._held[first] = set(queries[queries >= 0].tolist()), set(positives[positives >= 0].tolist())
        return self._held[first]


class _Seen:
    """The texts of a batch as one flag for each group, with tests of one or many examples."""

    def __init__(self, groups: np.ndarray) -> None:
        # One additional flag at the end is never set; the group −1 reads it.
        self._flags = [bytearray(int(column.max()) + 2) for column in groups]
        self._arrays = [np.frombuffer(flags, dtype=np.bool_) for flags in self._flags]
        self._added: tuple[list[int], list[int]] = ([], [])

    def clear(self) -> None:
        for flags, added in zip(self._arrays, self._added, strict=True):
            flags[added] = False
            added.clear()

    @property
    def empty(self) -> bool:
        return not any(self._added)

    def fits(self, query: int, positive: int) -> bool:
        return not (self._flags[0][query] or self._flags[1][positive])

    def fit(self, groups: np.ndarray) -> np.ndarray:
        """Return :meth:`fits` of many examples: groups ``[2, n]`` → ``[n]`` bool."""
        return ~(self._arrays[0][groups[0]] | self._arrays[1][groups[1]])

    def add(self, query: int, positive: int) -> None:
        if query >= 0:
            self._flags[0][query] = True
            self._added[0].append(query)
        if positive >= 0:
            self._flags[1][positive] = True
            self._added[1].append(positive)

    def add_all(self, groups: np.ndarray) -> None:
        """Add many examples, whose groups are ``[2, n]``."""
        for flags, added, column in zip(self._arrays, self._added, groups, strict=True):
            flags[column[column >= 0]] = True
            added.extend(column[column >= 0].tolist())


def _blocks(order: np.ndarray) -> list[np.ndarray]:
    return np.split(order, range(_BLOCK, len(order), _BLOCK))


def _any_twice(groups: np.ndarray) -> np.ndarray:
    """Return ``[n]`` bool: whether each row of ``[n, batch]`` holds a group twice."""
    ordered = np.sort(groups, axis=1)
    return ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1)
