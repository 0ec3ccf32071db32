"""A teacher's answers in mined data: a cross-encoder's are its own, and those in the data stay while they hold."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder
from support.hf_files import edit_tensors
from support.mining import read, run, save_cross_encoder, texts_of, write
from transformers import BertModel

from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes import Encoder, mine
from megatron_embed.recipes.config.schema import DataSource, LossSection
from megatron_embed.recipes.datasets.pair import Pair, Teacher, parse_pair
from megatron_embed.recipes.datasets.pairs import PairDataset
from megatron_embed.recipes.retrieval.mining import Audit, MiningRules, teacher_answers_for
from megatron_embed.recipes.retrieval.mining_report import audit_as_text
from megatron_embed.recipes.training.rank_batch import check_teachers

pytestmark = pytest.mark.usefixtures("small_parts")

FEW = MiningRules(negatives=2, ranks=(0, 60))  # some queries get none


def test_a_cross_encoders_scores_are_its_raw_logits(encoder: Encoder, folder: Path, tmp_path: Path) -> None:
    run(encoder, folder, tmp_path / "plain.jsonl", FEW)
    run(encoder, folder, tmp_path / "out.jsonl", FEW, cross_encoder=folder / "cross")
    rows = read(tmp_path / "out.jsonl")
    theirs = CrossEncoder(str(folder / "cross"), device="cpu")
    for row in rows:
        pairs = [(row["query"], text) for text in texts_of(row)]
        np.testing.assert_allclose(row["scores"], theirs.predict(pairs, activation_fn=torch.nn.Identity()), atol=1e-5)
    scores = [score for row in rows for score in row["scores"]]
    assert min(scores) < -0.1  # no sigmoid gives that
    assert np.std(scores) > 0.1
    assert {len(row["negatives"]) for row in rows} == {0, 2}
    data = PairDataset([DataSource(path=str(tmp_path / "out.jsonl"))])
    check_teachers(data, LossSection(score_distillation_weight=1.0), 48)
    assert [{key: row[key] for key in row if key != "scores"} for row in rows] == read(tmp_path / "plain.jsonl")


def test_a_cross_encoder_is_shown_no_prompt(encoder: Encoder, folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "corpus.jsonl", tmp_path)
    found = []
    for prompt in (None, "w7 w8 w9 "):
        write(tmp_path / "train.jsonl", [{"query": "w1 w2", "positive": "w3", "query_prompt": prompt}])
        run(encoder, tmp_path, tmp_path / "out.jsonl", cross_encoder=folder / "cross")
        found.append(read(tmp_path / "out.jsonl")[0])
    assert found[0]["scores"][0] == pytest.approx(found[1]["scores"][0], abs=1e-5)
    assert ["query_prompt" in row for row in found] == [False, True]


def not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors["classifier.bias"].fill_(float("nan"))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("absent", r"--cross-encoder .*/absent: cannot be loaded \(\w+: .*\); wanted a folder or hub name"),
        ("three labels", r"--cross-encoder .*/cross: gives 3 numbers for each pair; wanted a model with one label"),
        ("no head", r"--cross-encoder .*/cross: found BertModel, which has no trained head; wanted …ForSequence"),
        ("nan", r"--cross-encoder .*/cross: scores query 'query \d+' with 'w.*' as nan \(\d\d such pairs\); wanted"),
        ("not installed", r"--cross-encoder: sentence-transformers cannot be imported .*; pip install sentence-tr"),
        ("--scores too", r"--scores and --cross-encoder: both write 'scores'; give one of them"),
    ],
)
def test_cross_encoders_that_cannot_be_used(
    fault: str, message: str, encoder: Encoder, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"labels": 3} if fault == "three labels" else {"model_class": BertModel} if fault == "no head" else {}
    save_cross_encoder(tmp_path / "cross", **options)
    if fault == "nan":
        edit_tensors(tmp_path / "cross", not_a_number)
    if fault == "not installed":
        monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    cross = tmp_path / ("absent" if fault == "absent" else "cross")
    with pytest.raises(UserError, match=message):
        run(encoder, folder, tmp_path / "out.jsonl", cross_encoder=cross, with_scores=fault == "--scores too")
    assert not list(tmp_path.glob("out*"))


def test_the_command_line_takes_one_teacher(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    arguments = ["--model", str(folder / "model"), "--data", str(folder / "train.jsonl"), "--device", "cpu"]
    arguments += ["--corpus", str(folder / "corpus.jsonl"), "--output", str(out)]
    arguments += ["--cross-encoder", str(folder / "cross")]
    with pytest.raises(SystemExit) as ended:
        mine.main(arguments)
    assert not ended.value.code
    assert all(len(row["scores"]) == len(texts_of(row)) for row in read(out))
    with pytest.raises(SystemExit) as ended:
        mine.main([*arguments, "--scores"])
    assert ended.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err


PAIR = Pair("q", ["p"], ["a", "b", "c"], Teacher([1.0, 2.0, 3.0, 4.0], [0.0], [[1.0], [2.0], [3.0], [4.0]]))


@pytest.mark.parametrize(
    ("negatives", "scores"),
    [(["c", "a"], [1.0, 4.0, 2.0]), ([], [1.0]), (["a", "new"], None), (["new"], None)],
)
def test_what_a_teacher_still_says(negatives: list[str], scores: list[float] | None) -> None:
    found = teacher_answers_for(PAIR, negatives)
    assert found.scores == scores
    assert found.passages == (scores and [[score] for score in scores])
    assert found.query == (scores and [0.0])
    assert teacher_answers_for(Pair("q", ["p"], ["a"]), ["a"]) == Teacher()


def test_the_counts_of_all_ranks_are_added_up() -> None:
    names = [field.name for field in fields(Audit) if field.type == "int"]
    assert len(names) == 8
    one, total = Audit(**{name: number for number, name in enumerate(names, 1)}), Audit()
    one.dropped[2], one.histograms[1, 5] = 20, 30
    total.take(one.numbers() + one.numbers())
    assert [getattr(total, name) for name in names] == [2 * number for number in range(1, 9)]
    assert (total.dropped.sum(), total.dropped[2], total.histograms.sum(), total.histograms[1, 5]) == (40, 40, 60, 60)


def test_teachers_answers_in_the_data_stay_while_they_hold(encoder: Encoder, folder: Path, tmp_path: Path) -> None:
    run(encoder, folder, tmp_path / "first.jsonl")
    once = (row for row in read(tmp_path / "first.jsonl") if row["query"] != "query 0")
    rows = [row for row in once if len(row["negatives"]) > 2 and isinstance(row["positive"], str)][:4]
    mined = [row["negatives"] for row in rows]
    for number, row in enumerate(rows):
        # the first two rows knew all that is mined, in another order; the others knew one text less
        row["negatives"] = ["further", *reversed(row["negatives"])][: None if number < 2 else -1]
        answers: list[Any] = [float(i) for i in range(len(texts_of(row)))]
        if number % 2:
            vectors = [[answer, 1.0] for answer in answers]
            row.update(query_embedding=[9.0, 9.0], positive_embedding=vectors[0], negative_embeddings=vectors[1:])
        else:
            row["scores"] = answers
    shutil.copy(folder / "corpus.jsonl", tmp_path)
    write(tmp_path / "train.jsonl", rows)
    audit = run(encoder, tmp_path, tmp_path / "out.jsonl")
    found = read(tmp_path / "out.jsonl")
    assert [row["negatives"] for row in found] == mined
    teachers = [parse_pair(row).teacher for row in found]  # as training takes them
    wanted = [[0, *range(len(row["negatives"]) + 1, 1, -1)] for row in found]  # 1 was the answer to "further"
    assert teachers[0] == Teacher(scores=wanted[0])
    assert teachers[1] == Teacher(None, [9.0, 9.0], [[answer, 1.0] for answer in wanted[1]])
    assert teachers[2:] == [Teacher()] * 2
    assert (audit.scores_dropped, audit.vectors_dropped) == (1, 1)
    assert "scores of 1 rows, vectors of 1" in audit_as_text(audit, MiningRules())
    told = json.loads((tmp_path / "out.audit.json").read_text())
    assert told["rows_without_their_teachers_scores"] == told["rows_without_their_teachers_vectors"] == 1

    audit = run(encoder, tmp_path, tmp_path / "out.jsonl", with_scores=True)
    assert (audit.scores_dropped, audit.vectors_dropped) == (2, 1)  # new scores took the place of the first row's
    found = read(tmp_path / "out.jsonl")
    assert [len(row["scores"]) for row in found] == [len(texts_of(row)) for row in found]
    assert found[0]["scores"] != wanted[0]
    audit = run(encoder, tmp_path, tmp_path / "out.jsonl", cross_encoder=folder / "cross")
    assert (audit.scores_dropped, audit.vectors_dropped) == (2, 1)
