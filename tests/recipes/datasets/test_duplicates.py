"""No batch holds a text twice, and nothing else about the order changes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_embed.recipes.config.schema import DataSource
from megatron_embed.recipes.datasets.duplicates import REACH, TextIds, repeated_pairs, spread
from megatron_embed.recipes.datasets.pairs import PairDataset
from megatron_embed.recipes.datasets.sampler import GlobalBatchSampler


def groups_of(queries: list[int], positives: list[int]) -> np.ndarray | None:
    ids = TextIds()
    for query, positive in zip(queries, positives, strict=True):
        ids.add(query + 2**62, positive + 2**62)
    return ids.groups()


def repeats(order: list[int], batch: int, texts: list[list[int]]) -> int:
    """How many examples stand in a batch in which their query or positive stands already."""
    found = 0
    for first in range(0, len(order) - batch + 1, batch):
        chosen = order[first : first + batch]
        found += max(batch - len({column[i] for i in chosen}) for column in texts)
    return found


def test_groups() -> None:
    assert groups_of([1, 2, 3], [4, 5, 6]) is None
    assert groups_of([1, 2, 3], [1, 2, 3]) is None  # a query may be the same as its positive
    groups = groups_of([7, 1, 7, 2, 3, 2, 7], [1, 2, 3, 4, 5, 6, 6])
    assert groups is not None
    assert groups.dtype == np.int32
    queries, positives = groups.tolist()
    assert [group >= 0 for group in queries] == [True, False, True, True, False, True, True]
    assert queries[0] == queries[2] == queries[6] != queries[3] == queries[5]
    assert [group >= 0 for group in positives] == [False] * 5 + [True, True]
    assert positives[5] == positives[6]


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30))
def test_repeated_pairs(texts: list[tuple[int, int]]) -> None:
    groups = groups_of([query for query, _ in texts], [positive for _, positive in texts])
    found = [] if groups is None else repeated_pairs(groups).tolist()
    assert found == [i for i, pair in enumerate(texts) if pair in texts[:i]]


@settings(max_examples=200, deadline=None)
@given(
    size=st.integers(8, 120),
    batch=st.integers(2, 8),
    copies=st.integers(2, 3),
    share=st.floats(0, 0.5),
    seed=st.integers(0, 2**32),
)
def test_no_batch_holds_a_text_twice(size: int, batch: int, copies: int, share: float, seed: int) -> None:
    size = max(size, 12 * batch)  # with few batches there may be no answer
    generator = np.random.default_rng(seed)
    doubled = int(size * share) // copies
    texts = []
    for _ in range(2):
        column = [*np.repeat(np.arange(doubled), copies), *range(doubled, size - (copies - 1) * doubled)]
        texts.append(generator.permutation(column).tolist())
    order = generator.permutation(size)
    groups = groups_of(*texts)
    if groups is None:
        assert repeats(order.tolist(), batch, texts) == 0
        return
    found = spread(order, batch, groups)
    assert sorted(found) == list(range(size))  # the same examples: what an epoch leaves out is its tail
    assert repeats(found.tolist(), batch, texts) == 0


def test_what_shares_nothing_stays_where_it_is() -> None:
    queries = [0, 0, *range(10, 28)]
    groups = groups_of(queries, list(range(20)))
    assert groups is not None
    order = np.arange(20)
    assert spread(order, 4, groups).tolist() == [0, 4, 2, 3, 1, *range(5, 20)]
    assert order.tolist() == list(range(20))
    # in the last batch, where nothing follows, with one of the batch before
    last = np.array([*range(2, 18), 18, 0, 1, 19])
    assert spread(last, 4, groups).tolist() == [*range(2, 14), 1, 15, 16, 17, 18, 0, 14, 19]
    # with a tail, with one of the tail
    assert spread(last[4:], 5, groups).tolist() == [*range(6, 18), 18, 0, 19, 1]
    tail = np.array([2, 3, 0, 1, 4])
    assert spread(tail, 4, groups).tolist() == [2, 3, 0, 4, 1]


def spread_as_written(order: np.ndarray, batch: int, groups: np.ndarray) -> list[int]:
    """What :func:`spread` says, place by place: no sets kept, nothing passed over, nothing remembered."""
    found, count = order.tolist(), len(order)

    def clash(example: int, others: list[int]) -> bool:
        return any(((groups[:, example] == groups[:, x]) & (groups[:, x] >= 0)).any() for x in others)

    for place in range(count // batch * batch):
        first = place - place % batch
        if place == first:
            stays: set[int] = set()  # left where their batch holds the text already
        here = [x for at, x in enumerate(found[first:place], first) if at not in stays]
        if not clash(found[place], here):
            continue
        window = range(first + batch, min(first + batch * (1 + REACH), count))
        alone = [at for at in window if (groups[:, found[at]] < 0).all()]
        fit = alone or [at for at in window if not clash(found[at], here)]
        if not fit and first + batch * (1 + REACH) >= count:
            rest = [x for at, x in enumerate(found[first : first + batch], first) if at != place]
            for before in range(first - batch, max(first - batch * (1 + REACH), 0) - 1, -batch):
                if not clash(found[place], found[before : before + batch]):
                    fit = fit or [at for at in range(before, before + batch) if not clash(found[at], rest)]
        if fit:
            found[place], found[fit[0]] = found[fit[0]], found[place]
        else:
            stays.add(place)
    return found


@settings(max_examples=150, deadline=None)
@given(
    size=st.integers(2, 90),
    batch=st.integers(1, 9),
    kinds=st.tuples(st.integers(1, 120), st.integers(1, 120)),
    seed=st.integers(0, 2**32),
)
def test_the_order_is_the_one_described(size: int, batch: int, kinds: tuple[int, int], seed: int) -> None:
    """A run resumed with a newer version must see the data that it would have seen."""
    generator = np.random.default_rng(seed)
    groups = groups_of(*(generator.integers(0, kind, size).tolist() for kind in kinds))
    if groups is not None:
        order = generator.permutation(size)
        assert spread(order, batch, groups).tolist() == spread_as_written(order, batch, groups)


def test_a_text_on_too_many_rows_stays_and_does_not_take_for_ever() -> None:
    size, batch = 40_000, 256
    groups = groups_of([0] * (size // 2) + list(range(1, size // 2 + 1)), list(range(size)))
    assert groups is not None
    found = spread(np.random.default_rng(0).permutation(size), batch, groups)
    assert sorted(found) == list(range(size))


def test_batches_of_a_dataset(tmp_path: Path) -> None:
    rows = [{"query": f"query {i % 20}", "positive": [f"passage {i}", f"passage {i} too"]} for i in range(40)]
    rows += [{"query": f"other {i}", "positive": f"passage {i}"} for i in range(17)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = PairDataset([DataSource(path=str(path))])
    sampler = GlobalBatchSampler(data, 8, 3)
    taken: list[int] = []
    for step in range(2 * sampler.steps_per_epoch):
        batch = sampler.batch(step)
        examples = [data[i] for i in batch]
        assert len({e.query for e in examples}) == len({e.positive for e in examples}) == 8
        taken += batch
    first, second = taken[: len(taken) // 2], taken[len(taken) // 2 :]
    assert len(set(first)) == len(set(second)) == 96 == len(data) - 1
    assert first != second
    assert [GlobalBatchSampler(data, 8, 3).batch(step) for step in (17, 2)] == [sampler.batch(17), sampler.batch(2)]
    plain = GlobalBatchSampler([97], 8, 3)
    repeated = [len({data[i].query for i in plain.batch(step)}) < 8 for step in range(12)]
    assert any(repeated)


@pytest.mark.parametrize("batch", [4, 5])
def test_without_repeated_texts_the_order_is_the_plain_one(batch: int, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"query": f"q{i}", "positive": f"p{i}"}) + "\n" for i in range(20)))
    data = PairDataset([DataSource(path=str(path))])
    assert data.sources[0].groups is None
    plain = GlobalBatchSampler([20], batch, 7)
    assert all(GlobalBatchSampler(data, batch, 7).batch(step) == plain.batch(step) for step in range(12))
