"""Attention by whole products against its definition in fp64, and when it is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_embed.bridge.attention import Run
from megatron_embed.bridge.cpu import attention as module
from megatron_embed.bridge.cpu.attention import attention_by_products, products_are_faster

#: [runs of one row]; the last is what a context-parallel slice sees, whose sequences reach over its edges
ROWS = {
    "short": [Run(2, 5, 5)],
    "mixed": [Run(1, 70, 70), Run(3, 200, 200), Run(1, 1, 1)],
    "long": [Run(1, 1100, 1100)],
    "slice": [Run(1, 60, 150), Run(2, 130, 130), Run(1, 40, 300)],
}
DTYPES = {torch.float32: 2e-6, torch.bfloat16: 4e-3}


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_definition(query: Tensor, key: Tensor, value: Tensor, runs: list[Run], scale: float) -> Tensor:
    query, key, value = query.double(), key.double(), value.double()
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    rows, q, k = [], 0, 0
    for queries, keys in [(run.queries, run.keys) for run in runs for _ in range(run.sequences)]:
        scores = torch.einsum("qhd,khd->hqk", query[q : q + queries], key[k : k + keys]) * scale
        rows.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[k : k + keys]))
        q, k = q + queries, k + keys
    return torch.cat(rows).flatten(1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("row", ROWS)
def test_equals_the_definition(
    row: str, heads: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = 50_000
    name = "_one_by_one" if dtype == torch.float32 else "_together"
    attend: Callable[..., Tensor] = getattr(module, name)

    def bounded(query: Tensor, key: Tensor, *rest: Any) -> Tensor:
        assert query.shape[0] * query.shape[1] * key.shape[1] <= largest
        return attend(query, key, *rest)

    # so that long sequences are computed part by part
    monkeypatch.setattr(module, "_SCORES", largest)
    monkeypatch.setattr(module, name, bounded)
    runs, (many, few) = ROWS[row], heads
    queries, keys = (sum(run.sequences * getattr(run, name) for run in runs) for name in ("queries", "keys"))
    query = random(queries, many, 32, dtype=dtype, seed=0)
    # as they come out of one projection: slices of a wider tensor
    key, value = random(keys, few, 64, dtype=dtype, seed=1).chunk(2, dim=-1)
    before = [x.clone() for x in (query, key, value)]
    wanted = by_definition(query, key, value, runs, 0.3)
    found = attention_by_products(query, key, value, runs, 0.3)
    assert found.dtype == dtype
    assert found.shape == wanted.shape
    assert (found.double() - wanted).norm() <= DTYPES[dtype] * wanted.norm()
    assert all(torch.equal(x, y) for x, y in zip((query, key, value), before, strict=True))
    by_default = attention_by_products(query, key, value, runs)
    assert torch.equal(by_default, attention_by_products(query, key, value, runs, 32**-0.5))
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"  # of others' products


def test_the_precision_setting_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Tensor:
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        raise RuntimeError("lost")

    monkeypatch.setattr(module, "_together", fails)
    x = torch.zeros(3, 2, 4, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="lost"):
        attention_by_products(x, x, x, [Run(1, 3, 3)])
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"


def test_when_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    query, long, short = (
        torch.zeros(8, 2, 4),
        [Run(1, 60, 60), Run(1, 132, 132)],
        [Run(1, 60, 60), Run(1, 131, 131)],
    )
    for faster in (True, False):
        monkeypatch.setattr(module, "onednn_is_faster", lambda faster=faster: faster)
        assert products_are_faster(query, long) == faster
        assert products_are_faster(query.bfloat16(), long) == faster
        assert not products_are_faster(query, short)
        assert products_are_faster(query, [Run(1, 4096, 4096)]) == faster
        assert not products_are_faster(query, [*long, Run(1, 4097, 4097)])
        assert products_are_faster(query.bfloat16(), [Run(1, 4097, 4097)]) == faster
        assert not products_are_faster(query.half(), long)
        assert not products_are_faster(query.double(), long)
