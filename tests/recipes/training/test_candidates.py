"""A batch in which a query is scored against its positive alone trains nothing, at a loss of 0: it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.runs import read_metrics, recipe, write_pairs
from support.tiny_models import save_model

from megatron_embed.bridge.cpu import host
from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    host.run_on_cpu()
    folder = tmp_path_factory.mktemp("candidates")
    save_model(folder / "model")
    write_pairs(folder / "train.jsonl", 8, negatives=1)
    write_pairs(folder / "without.jsonl", 8, negatives=0)
    return folder


ALONE = ["train.global_batch_size=1"], ["loss.in_batch_negatives=false", "train.global_batch_size=4"]


@pytest.mark.parametrize("overrides", ALONE, ids=["batch of 1", "own slots"])
@pytest.mark.parametrize("sources", ["without.jsonl", "train.jsonl without.jsonl"])
def test_data_without_negatives_is_refused_by_name(folder: Path, overrides: list[str], sources: str) -> None:
    paths = ",".join(str(folder / name) for name in sources.split())
    message = f"{folder / 'without.jsonl'}, which has no hard negatives, leaves nothing to tell a positive from"
    with pytest.raises(UserError, match=message) as refused:
        train(recipe(folder, "refused", f"data.train=[{paths}]", *overrides))
    assert str(refused.value).startswith(overrides[0].replace("=", ": "))
    assert not (folder / "refused").exists()


@pytest.mark.parametrize("overrides", ALONE, ids=["batch of 1", "own slots"])
def test_data_with_negatives_trains(folder: Path, overrides: list[str]) -> None:
    train(recipe(folder, overrides[0], "train.train_iters=1", *overrides))
    assert read_metrics(folder / overrides[0])[0]["loss"] > 0
