"""Mining: equal to a brute-force answer whatever the number of ranks; no positive ever comes back as a negative."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from support.mining import make_parts_small, read, run, texts_of, write
from support.runs import read_metrics, recipe
from support.tiny_models import save_model
from support.worlds import run_world

from megatron_embed.bridge.errors import UserError
from megatron_embed.bridge.layout import Layout
from megatron_embed.recipes import Encoder, mine, train
from megatron_embed.recipes.config.schema import DataSource
from megatron_embed.recipes.datasets.pairs import PairDataset
from megatron_embed.recipes.retrieval import encode_corpus, miner, mining_report
from megatron_embed.recipes.retrieval.mining import REASONS, MiningRules
from megatron_embed.recipes.retrieval.writer_lock import LOCK, writing

pytestmark = pytest.mark.usefixtures("small_parts")

RULES = {
    "default": MiningRules(),
    "all limits": MiningRules(negatives=3, ranks=(2, 40), max_score_ratio=0.99, margin=0.01),
    "no limits": MiningRules(negatives=60, ranks=(0, 1000), max_score_ratio=float("inf")),
}


def brute_force(encoder: Encoder, folder: Path, rules: MiningRules) -> list[list[str]]:
    """Everything in memory, one query after another, by the rules as the documentation has them."""
    documents = [(f"{d['title']} {d['text']}".strip(), d["text"]) for d in read(folder / "corpus.jsonl")]
    rows = read(folder / "train.jsonl")
    vectors = encoder.encode([full for full, _ in documents], kind="passage")
    answers = []
    for row in rows:
        positives = row["positive"] if isinstance(row["positive"], list) else [row["positive"]]
        known = set(positives)
        for other in rows:
            if other["query"] == row["query"]:
                known |= set(other["positive"] if isinstance(other["positive"], list) else [other["positive"]])
        query = encoder.encode([row["query"]], kind="query")[0]
        lowest = (encoder.encode(positives, kind="passage") @ query).min()
        scores = vectors @ query
        order = sorted(range(len(documents)), key=lambda i: (-scores[i], i))[rules.ranks[0] : rules.ranks[1]]
        taken: list[str] = []
        seen = set()
        for i in order:
            full, alone = documents[i]
            first = full not in seen
            seen.add(full)
            if full in known or alone in known or row["query"] in (full, alone) or not full or not first:
                continue
            limit = lowest - (1 - rules.max_score_ratio) * abs(lowest)
            if scores[i] <= limit and (rules.margin is None or scores[i] <= lowest - rules.margin):
                taken.append(full)
        answers.append(taken[: rules.negatives])
    return answers


@pytest.mark.parametrize("name", RULES)
def test_equals_a_brute_force_answer(name: str, encoder: Encoder, folder: Path, tmp_path: Path) -> None:
    run(encoder, folder, tmp_path / "out.jsonl", RULES[name])
    found, rows = read(tmp_path / "out.jsonl"), read(folder / "train.jsonl")
    wanted = brute_force(encoder, folder, RULES[name])
    assert [row["negatives"] for row in found] == wanted
    assert [(row["query"], row["positive"]) for row in found] == [(row["query"], row["positive"]) for row in rows]
    assert sum(map(len, wanted)) > 20


def test_no_known_positive_comes_back(encoder: Encoder, folder: Path, tmp_path: Path) -> None:
    audit = run(encoder, folder, tmp_path / "out.jsonl", RULES["no limits"])
    data = PairDataset([DataSource(path=str(tmp_path / "out.jsonl"))])
    known: dict[str, set[str]] = {}
    for i in range(len(data)):
        known.setdefault(data[i].query, set()).update(data[i].positives)
    assert len(known["query 0"]) == 2
    for i in range(len(data)):
        example = data[i]
        assert not set(example.negatives) & (known[example.query] | {example.query, ""})
        assert not {text.removeprefix("t ") for text in example.negatives} & known[example.query]
        assert len(set(example.negatives)) == len(example.negatives) > 0
    dropped = dict(zip(REASONS, audit.dropped.tolist(), strict=True))
    assert dropped["known positive"] >= 31
    assert dropped["same text as the query"] == 2
    assert dropped["no text"] == 2 * 30  # the third has a title
    assert dropped["above max-score-ratio"] == dropped["above margin"] == 0
    assert audit.candidates == 30 * 120 == audit.dropped.sum() + audit.kept + audit.spare


def test_scores_are_the_models_own(encoder: Encoder, folder: Path, tmp_path: Path) -> None:
    run(encoder, folder, tmp_path / "out.jsonl", with_scores=True)
    rows = read(tmp_path / "out.jsonl")
    assert [len(row["scores"]) - len(row["negatives"]) for row in rows] == [1] * 29 + [3]  # each positive's first
    for row in rows:
        query = encoder.encode([row["query"]], kind="query")[0]
        positives = row["positive"] if isinstance(row["positive"], list) else [row["positive"]]
        wanted = encoder.encode([*positives, *row["negatives"]], kind="passage") @ query
        np.testing.assert_allclose(row["scores"], wanted, atol=3e-6)
        of_negatives = row["scores"][len(positives) :]
        assert of_negatives == sorted(of_negatives, reverse=True)
    assert PairDataset([DataSource(path=str(tmp_path / "out.jsonl"))]).sources[0].no_scores < 0


def test_rows_that_another_run_wrote_meanwhile_are_left(encoder: Encoder, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("of another run")  # after the command looked, before it had the lock
    with pytest.raises(UserError, match=r"out\.jsonl: is there already; name another file, or --overwrite"):
        run(encoder, folder, tmp_path / "out.jsonl", overwrite=False)
    assert (tmp_path / "out.jsonl").read_text() == "of another run"
    run(encoder, folder, tmp_path / "out.jsonl", overwrite=True)


def test_rows_without_their_audit_are_not_there(
    encoder: Encoder, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(mining_report, "_draw", stop)
        with pytest.raises(KeyboardInterrupt):
            run(encoder, folder, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    run(encoder, folder, tmp_path / "out.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.audit.json", "out.jsonl", "out.scores.png"]


def test_rows_keep_their_own_prompts(encoder: Encoder, folder: Path, tmp_path: Path) -> None:
    row = {"query": "w1 w2", "pos": ["w3"], "prompt": "w7 w8 w9 "}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    shutil.copy(folder / "corpus.jsonl", tmp_path)
    run(encoder, tmp_path, tmp_path / "out.jsonl", with_scores=True)
    (found,) = read(tmp_path / "out.jsonl")
    assert found["query_prompt"] == "w7 w8 w9 "
    query = encoder.encode(["w1 w2"], kind="query", prompt="w7 w8 w9 ")[0]
    assert found["scores"][0] == pytest.approx(float(encoder.encode(["w3"], kind="passage")[0] @ query), abs=3e-6)


def test_a_second_run_encodes_nothing(
    encoder: Encoder, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(encoder, folder, tmp_path / "first.jsonl", cache=tmp_path / "cache")
    monkeypatch.setattr(encode_corpus, "encode_here", None)
    run(encoder, folder, tmp_path / "second.jsonl", RULES["all limits"], cache=tmp_path / "cache")
    assert len(read(tmp_path / "second.jsonl")) == 30


def test_the_cache_keeps_models_apart_and_refuses_anothers_vectors(
    encoder: Encoder, folder: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    run(encoder, folder, tmp_path / "a.jsonl", cache=cache)
    of_first = {path.name for path in cache.iterdir() if path.is_dir()}
    other = save_model(tmp_path / "other", seed=1)
    with Encoder.from_pretrained(other, device="cpu") as second:
        run(second, folder, tmp_path / "b.jsonl", cache=cache)
        of_second = {path.name for path in cache.iterdir() if path.is_dir()} - of_first
        assert len(of_first) == len(of_second) == 3  # documents, queries, and positives that are no documents
        assert read(tmp_path / "b.jsonl") != read(tmp_path / "a.jsonl")
        for name in of_second:  # the first model's vectors under the second's keys
            shutil.rmtree(cache / name)
            shutil.copytree(cache / sorted(of_first)[0], cache / name)
        with pytest.raises(UserError, match=r"vectors of another model, input or setting: weights_sha256"):
            run(second, folder, tmp_path / "c.jsonl", cache=cache)
    assert not (tmp_path / "c.jsonl").exists()


LAYOUTS = {
    2: {"dp": (1, 1), "tp": (2, 1), "pp": (1, 2)},
    4: {"dp4": (1, 1), "tp2dp2": (2, 1), "tp2pp2": (2, 2)},
}


def mine_and_encode(folder: str, layouts: dict[str, tuple[int, int]]) -> None:
    """In a world of several ranks: the same mining, and corpora encoded under every layout."""
    make_parts_small(setattr)
    root = Path(folder)
    for name, (tp, pp) in layouts.items():
        layout = Layout(tp=tp, pp=pp)
        with Encoder.from_pretrained(root / "model", device="cpu", layout=layout) as encoder:
            run(encoder, root, root / f"{name}.jsonl", cache=root / f"vectors-{name}")


def mine_in_other_ways(folder: str, layouts: dict[str, tuple[int, int]]) -> None:
    """The same, then by a FAISS index, with a cross-encoder's scores, and a step of training on these."""
    mine_and_encode(folder, layouts)
    root = Path(folder)
    with Encoder.from_pretrained(root / "model", device="cpu") as encoder:
        run(encoder, root, root / "cross.jsonl", cache=root / "vectors-dp", cross_encoder=root / "cross")
        run(encoder, root, root / "faiss.jsonl", cache=root / "vectors-dp", faiss="Flat")
        make_parts_small(setattr, shard_rows=1000)  # one shard: the second rank has none
        run(encoder, root, root / "one-shard.jsonl", cache=root / "vectors-one", faiss="Flat")
        run(encoder, root, root / "one-shard-exact.jsonl", cache=root / "vectors-one")
        with writing(root / "out", root / f".out{LOCK}"), pytest.raises(UserError) as refused:
            run(encoder, root, root / "out", cache=root / "vectors-one")
        (root / f"refused-{dist.get_rank()}.txt").write_text(str(refused.value))
    for weight in (0, 1):
        distilled = ("train.train_iters=1", f"loss.score_distillation_weight={weight}")
        train(recipe(root, f"weight-{weight}", f"data.train={root / 'cross.jsonl'}", *distilled))


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> Path:
    run_world(mine_in_other_ways, 2, str(folder), LAYOUTS[2])
    return folder


@pytest.fixture(scope="module")
def four_ranks(folder: Path) -> Path:
    run_world(mine_and_encode, 4, str(folder), LAYOUTS[4])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["two_ranks", "four_ranks"])
def test_two_and_four_ranks_equal_one(
    ranks: str, request: pytest.FixtureRequest, encoder: Encoder, folder: Path, tmp_path: Path
) -> None:
    run(encoder, folder, tmp_path / "one.jsonl")
    request.getfixturevalue(ranks)
    one = read(tmp_path / "one.jsonl")
    for name, layout in LAYOUTS[2 if ranks == "two_ranks" else 4].items():
        assert read(folder / f"{name}.jsonl") == one
        vectors = list((folder / f"vectors-{name}").glob("*/vectors-*.npy"))
        assert len(vectors) == 8 + 2 + 1  # of documents, queries, and the one positive that is no document
        for path in vectors:
            found, wanted = np.load(path), np.load(folder / "vectors" / path.parent.name / path.name)
            # a layout adds up in another order; data parallelism alone changes nothing
            np.testing.assert_allclose(found, wanted, atol=0 if layout == (1, 1) else 2e-6)


def test_every_rank_hears_of_another_run(two_ranks: Path) -> None:
    first, second = (two_ranks / f"refused-{rank}.txt" for rank in range(2))
    assert first.read_text() == second.read_text()
    assert f"{two_ranks / 'out'}: is being written by process " in first.read_text()
    assert not (two_ranks / "out").exists()


def test_a_cross_encoders_scores_are_the_same_on_two_ranks(two_ranks: Path, encoder: Encoder, tmp_path: Path) -> None:
    run(encoder, two_ranks, tmp_path / "one.jsonl", cross_encoder=two_ranks / "cross")
    assert (two_ranks / "cross.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


def test_training_distils_from_them(two_ranks: Path) -> None:
    plain, distilled = (read_metrics(two_ranks / f"weight-{weight}")[0]["loss"] for weight in (0, 1))
    assert distilled > plain + 0.01  # by a divergence


@pytest.mark.parametrize("name", ["faiss", "one-shard", "one-shard-exact"])
def test_a_flat_faiss_index_over_two_ranks_finds_the_same(
    name: str, two_ranks: Path, encoder: Encoder, tmp_path: Path
) -> None:
    run(encoder, two_ranks, tmp_path / "one.jsonl")
    assert (two_ranks / f"{name}.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    shards = {len(list(path.glob("vectors-*.npy"))) for path in (two_ranks / "vectors-one").iterdir() if path.is_dir()}
    assert shards == {1}


def test_faiss_that_is_not_installed_is_named(
    encoder: Encoder, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"--faiss: FAISS is not installed; pip install faiss-cpu"):
        run(encoder, folder, tmp_path / "out.jsonl", faiss="Flat")


def test_a_flat_faiss_index_finds_the_same(encoder: Encoder, folder: Path, tmp_path: Path) -> None:
    run(encoder, folder, tmp_path / "exact.jsonl", RULES["all limits"])
    run(encoder, folder, tmp_path / "faiss.jsonl", RULES["all limits"], faiss="Flat")
    assert read(tmp_path / "faiss.jsonl") == read(tmp_path / "exact.jsonl")
    with pytest.raises(UserError, match=r"--faiss Nonsense: FAISS cannot build this index"):
        run(encoder, folder, tmp_path / "out.jsonl", faiss="Nonsense")


@pytest.mark.parametrize("index", ["SQ4", "PCA8,Flat"])
def test_scores_of_an_index_that_compresses_are_exact(
    index: str, encoder: Encoder, folder: Path, tmp_path: Path
) -> None:
    """Else the limits would be asked of estimates, and a student taught these."""
    pytest.importorskip("faiss")
    run(encoder, folder, tmp_path / "out.jsonl", faiss=index, with_scores=True)
    for row in read(tmp_path / "out.jsonl"):
        exact = encoder.encode(texts_of(row), kind="passage") @ encoder.encode(row["query"], kind="query")
        np.testing.assert_allclose(row["scores"], exact, atol=2e-6)


def test_white_space_around_a_text_hides_no_positive(encoder: Encoder, folder: Path, tmp_path: Path) -> None:
    rows = [
        {"query": f"{row['query']} ", "positive": f"{row['positive']}\n"} for row in read(folder / "train.jsonl")[:20]
    ]
    write(tmp_path / "train.jsonl", rows)
    shutil.copy(folder / "corpus.jsonl", tmp_path / "corpus.jsonl")
    run(encoder, tmp_path, tmp_path / "out.jsonl", RULES["no limits"])
    for row in read(tmp_path / "out.jsonl"):
        assert {row["query"].strip(), row["positive"].strip()}.isdisjoint(row["negatives"])


def texts_encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts are encoded from now on, shard by shard."""
    counts: list[int] = []
    here = encode_corpus.encode_here

    def counted(stages: Any, plan: Any, sequences: Any, hidden: int) -> Any:
        counts.append(len(sequences))
        return here(stages, plan, sequences, hidden)

    monkeypatch.setattr(encode_corpus, "encode_here", counted)
    return counts


def test_positives_that_are_documents_are_not_encoded_again(
    encoder: Encoder, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output is, to the byte, that of encoding all positives; scores are, but for the rounding of a sum."""
    with monkeypatch.context() as patch:
        patch.setattr(miner, "find_documents", lambda source, corpus: np.full(len(source), -1))
        run(encoder, folder, tmp_path / "all.jsonl", cache=tmp_path / "all")
        run(encoder, folder, tmp_path / "all-scores.jsonl", with_scores=True, cache=tmp_path / "all")
    counts = texts_encoded(monkeypatch)
    run(encoder, folder, tmp_path / "found.jsonl", cache=tmp_path / "found")
    run(encoder, folder, tmp_path / "found-scores.jsonl", with_scores=True, cache=tmp_path / "found")
    # documents, queries, "not in the corpus", and three whose document has a title, which the model sees too
    assert sum(counts) == 120 + 30 + 1 + 3
    assert (tmp_path / "found.jsonl").read_bytes() == (tmp_path / "all.jsonl").read_bytes()
    for found, wanted in zip(read(tmp_path / "found-scores.jsonl"), read(tmp_path / "all-scores.jsonl"), strict=True):
        assert found.pop("scores") == pytest.approx(wanted.pop("scores"), abs=2e-6)
        assert found == wanted


def test_where_every_positive_is_a_document_no_positive_is_encoded(
    encoder: Encoder, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titled = {row["text"] for row in read(folder / "corpus.jsonl") if row["title"]}
    rows = [row for row in read(folder / "train.jsonl")[:29] if row["positive"] not in titled]
    write(tmp_path / "train.jsonl", rows)
    shutil.copy(folder / "corpus.jsonl", tmp_path)
    counts = texts_encoded(monkeypatch)
    run(encoder, tmp_path, tmp_path / "out.jsonl", with_scores=True)
    assert sum(counts) == 120 + len(rows)
    for row in read(tmp_path / "out.jsonl"):
        exact = encoder.encode(texts_of(row), kind="passage") @ encoder.encode(row["query"], kind="query")
        np.testing.assert_allclose(row["scores"], exact, atol=2e-6)


def test_a_positive_in_other_white_space_is_encoded_as_the_model_sees_it(
    encoder: Encoder, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read(folder / "train.jsonl")[:7]
    rows[3]["positive"] = f"  {rows[3]['positive']}"
    rows[5]["positive"] = [rows[5]["positive"], f"{rows[5]['positive']}\n\n"]
    write(tmp_path / "train.jsonl", rows)
    shutil.copy(folder / "corpus.jsonl", tmp_path)
    counts = texts_encoded(monkeypatch)
    run(encoder, tmp_path, tmp_path / "out.jsonl", with_scores=True)
    assert sum(counts) == 120 + 7 + 2
    for row in read(tmp_path / "out.jsonl"):
        exact = encoder.encode(texts_of(row), kind="passage") @ encoder.encode(row["query"], kind="query")
        np.testing.assert_allclose(row["scores"], exact, atol=2e-6)


@pytest.mark.parametrize("ranks", [(5, 5), (-1, 3)])
def test_rank_ranges_that_are_none(ranks: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=r"--rank-range: found .*; wanted A:B with 0 <= A < B"):
        MiningRules(ranks=ranks)


def test_limits_beside_a_negative_positive_score() -> None:
    rules = MiningRules(max_score_ratio=0.9)
    assert (rules.ratio_limit(0.5), rules.ratio_limit(-0.5), rules.ratio_limit(0.0)) == pytest.approx((0.45, -0.55, 0))
    assert MiningRules(max_score_ratio=float("inf")).ratio_limit(-0.5) == np.inf


def test_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    arguments = ["--model", str(folder / "model"), "--data", str(folder / "train.jsonl"), "--device", "cpu"]
    arguments += ["--corpus", str(folder / "corpus.jsonl"), "--rank-range", ":50", "--max-score-ratio", "inf"]
    with pytest.raises(SystemExit) as ended:
        mine.main([*arguments, "--output", str(tmp_path), "--overwrite"])
    assert ended.value.code == 1
    assert "a folder; wanted a file's name" in capsys.readouterr().err
    arguments += ["--output", str(out)]
    with pytest.raises(SystemExit) as ended:
        mine.main(arguments)
    assert not ended.value.code
    text = capsys.readouterr().out
    assert "30 queries, 1,500 candidates at ranks 0 to 49" in text
    assert "known positive" in text
    audit = json.loads((tmp_path / "out.audit.json").read_text(), parse_constant=pytest.fail)
    assert audit["kept"] == sum(len(row["negatives"]) for row in read(out))
    assert (tmp_path / "out.scores.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit) as ended:
        mine.main(arguments)
    assert ended.value.code == 1
    assert "out.jsonl: is there already; name another file, or --overwrite" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        mine.main([*arguments, "--rank-range", "5"])
    assert ended.value.code == 2
