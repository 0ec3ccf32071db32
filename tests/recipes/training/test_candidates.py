"""A query that is scored against its positive alone trains nothing, at a loss of 0: that is refused or told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.runs import read_metrics, recipe, write_pairs
from support.tiny_models import save_model

from megatron_embed.bridge.cpu import host
from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes import train
from megatron_embed.recipes.config.schema import LossSection
from megatron_embed.recipes.training import loss as loss_module
from megatron_embed.recipes.training.loss import ContrastiveLoss
from megatron_embed.recipes.training.targets import Targets


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
def test_data_with_negatives_trains(folder: Path, overrides: list[str], caplog: pytest.LogCaptureFixture) -> None:
    train(recipe(folder, overrides[0], "train.train_iters=1", *overrides))
    assert read_metrics(folder / overrides[0])[0]["loss"] > 0
    assert not told(caplog)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "no negative" in record.getMessage()]


@pytest.mark.parametrize("mode", ["direct", "cached"])
def test_a_run_whose_every_negative_is_masked_is_told_once(
    mode: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"query": "the same", "positive": f"w{number} w7"} for number in range(8)]
    (folder / "same.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = ("train.train_iters=2", "train.global_batch_size=4", f"loss.mode={mode}")
    train(recipe(folder, f"same-{mode}", f"data.train={folder / 'same.jsonl'}", *overrides))
    assert [record["loss"] for record in read_metrics(folder / f"same-{mode}")] == [0, 0]
    (message,) = told(caplog)
    assert message.startswith("step 1: 4 of 4 queries have no negative and train nothing: ")
    assert "give them hard negatives, raise train.global_batch_size, or leave them out" in message


def test_queries_without_hard_negatives_are_told_where_only_these_count(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_pairs(folder / "some.jsonl", 9, negatives=None)  # 0, 1, 2, 0, …
    overrides = ("loss.in_batch_negatives=false", "train.global_batch_size=9", "train.train_iters=2")
    train(recipe(folder, "some", f"data.train={folder / 'some.jsonl'}", *overrides))
    (message,) = told(caplog)
    assert message.startswith("step 1: 3 of 9 queries have no negative and train nothing: ")
    assert "set loss.in_batch_negatives=true" in message


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
@pytest.mark.parametrize("keys", [{}, {"symmetric": True}, {"in_batch_negatives": False}], ids=str)
def test_queries_without_a_negative_are_counted(
    keys: dict[str, bool], chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", chunk_bytes)
    counts = set()
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)

        def ids(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randint(1, 4, shape, generator=generator)

        queries, slots = 5, 2
        targets = Targets(queries, torch.ones(queries, slots, dtype=torch.bool), ids(queries), ids(queries, slots))
        known = targets.passage_ids[:, :1]  # type: ignore[index]
        targets = Targets(**{**vars(targets), "known_ids": torch.cat((known, ids(queries, 1)), dim=1)})
        vectors = torch.randn(queries * (1 + slots), 8, generator=generator, dtype=torch.float64).requires_grad_()
        loss = ContrastiveLoss(LossSection(false_negative_margin=0.5, **keys))
        value, alone = loss.with_alone(vectors, targets)
        value.backward()
        counts.add(int(alone))
        assert int(alone) == len(without_negative(vectors.detach(), targets, **keys))
    assert len(counts) > 1


def without_negative(
    vectors: torch.Tensor, targets: Targets, symmetric: bool = False, in_batch_negatives: bool = True
) -> list[int]:
    """Of each query's candidates one by one, by the definitions of the masks."""
    assert targets.query_ids is not None
    assert targets.passage_ids is not None
    assert targets.known_ids is not None
    count = targets.queries
    queries, passages = vectors[:count], vectors[count:].view(count, targets.slots, -1)
    texts, ids, known = targets.query_ids.tolist(), targets.passage_ids.tolist(), targets.known_ids.tolist()
    alone = []
    for i in range(count):
        limit = float(queries[i] @ passages[i, 0]) + 0.5
        negatives = [
            (j, k)
            for j in (range(count) if in_batch_negatives else [i])
            for k in range(targets.slots)
            if ids[j][k] not in known[i] and float(queries[i] @ passages[j, k]) <= limit
            if not (k == 0 and texts[i] == texts[j])
        ]
        if symmetric:
            negatives += [
                (j, -1)
                for j in range(count)
                if texts[i] != texts[j] and ids[j][0] not in known[i] and ids[i][0] not in known[j]
                if float(queries[j] @ passages[i, 0]) <= limit
            ]
        if not negatives:
            alone.append(i)
    return alone
