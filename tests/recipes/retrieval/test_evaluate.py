"""Ranking, metrics and BEIR folders, against numpy, pytrec_eval and sentence-transformers."""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytrec_eval
from support.full_disk import files_of_at_most
from support.tiny_models import save_model

from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes.datasets.beir import ABSENT, load_beir, load_collections
from megatron_embed.recipes.evaluate import main
from megatron_embed.recipes.retrieval.bm25 import bm25_run
from megatron_embed.recipes.retrieval.evaluation import evaluate, markdown_table, metrics, rank_passages, score
from megatron_embed.recipes.retrieval.vectors import write_file

WORDS = ["apple", "river", "stone", "cloud", "engine", "violin", "harbor", "lantern", "meadow", "copper"]
DOCUMENTS = [f"{a} {b}" for i, a in enumerate(WORDS) for b in WORDS[i + 1 :]]  # 45

LETTERS = "abcdefghilmnoprstu"


def write(folder: Path, name: str, lines: list[Any]) -> None:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Queries of two words; the document that holds both is graded 2, two that hold one of them 1, one other 0."""
    folder = tmp_path / "words"
    corpus = [{"_id": f"d{i}", "title": text.split()[0], "text": text.split()[1]} for i, text in enumerate(DOCUMENTS)]
    write(folder, "corpus.jsonl", corpus)
    write(folder, "queries.jsonl", [{"_id": f"q{i}", "text": DOCUMENTS[4 * i]} for i in range(11)])
    lines = ["query-id\tcorpus-id\tscore"]
    for i in range(11):
        lines += [f"q{i}\td{4 * i}\t2", f"q{i}\td{(4 * i + 1) % 45}\t1", f"q{i}\td{(4 * i + 9) % 45}\t0"]
    write(folder, "qrels/test.tsv", lines)
    return folder


def embed(texts: Any, kind: Any = "query") -> np.ndarray:
    """Bags of characters, and a little of their own so that none tie: good enough to rank, not perfect."""
    rows = [
        [text.count(c) + 0.05 * noise for c, noise in zip(LETTERS, own.normal(size=len(LETTERS)), strict=True)]
        for text, own in ((text, np.random.default_rng(zlib.crc32(text.encode()))) for text in texts)
    ]
    vectors = np.array(rows, dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("n", "k", "chunk", "query_chunk"), [(100, 7, 16, 3), (100, 100, 9, 1), (5, 20, 2, 64), (1, 1, 1, 1)]
)
def test_rank_is_exact_whatever_the_chunks(n: int, k: int, chunk: int, query_chunk: int) -> None:
    rng = np.random.default_rng(0)
    queries, passages = rng.normal(size=(11, 16)).astype(np.float32), rng.normal(size=(n, 16)).astype(np.float32)
    scores, indices = rank_passages(queries, passages, k, chunk=chunk, query_chunk=query_chunk)
    exact = queries.astype(np.float64) @ passages.T.astype(np.float64)
    np.testing.assert_array_equal(indices, np.argsort(-exact, axis=1)[:, :k])
    np.testing.assert_allclose(scores, np.sort(exact, axis=1)[:, ::-1][:, :k], atol=1e-5)


def test_metrics_equal_pytrec_evals() -> None:
    rng = np.random.default_rng(1)
    qrels = {f"q{q}": {f"d{d}": int(rng.integers(0, 4)) for d in rng.choice(300, 20)} for q in range(30)}
    run = {f"q{q}": {f"d{d}": round(rng.normal(), 1) for d in range(200)} for q in range(30)}  # many ties
    results = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.100", "recip_rank"}).evaluate(run)
    found = metrics(qrels, run)
    assert found["ndcg@10"] == pytest.approx(np.mean([r["ndcg_cut_10"] for r in results.values()]), abs=1e-12)
    assert found["recall@100"] == pytest.approx(np.mean([r["recall_100"] for r in results.values()]), abs=1e-12)
    reciprocal = [r["recip_rank"] if r["recip_rank"] >= 0.0999 else 0.0 for r in results.values()]
    assert found["mrr@10"] == pytest.approx(np.mean(reciprocal), abs=1e-12)


def test_mrr_stops_at_ten_and_a_query_without_results_counts() -> None:
    qrels = {"a": {"d10": 1}, "b": {"d9": 1}, "c": {"d0": 1}, "d": {"d0": 1}}
    ranked = {f"d{i}": 1.0 - i / 100 for i in range(50)}
    assert metrics(qrels, {"a": ranked, "b": ranked, "c": ranked})["mrr@10"] == pytest.approx((0 + 0.1 + 1 + 0) / 4)


def test_scores_equal_sentence_transformers(folder: Path) -> None:
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    collection = load_beir(folder)
    relevant = {q: {d for d, grade in grades.items() if grade > 0} for q, grades in collection.qrels.items()}
    theirs = InformationRetrievalEvaluator(
        collection.queries, collection.corpus, relevant, mrr_at_k=[10], ndcg_at_k=[10], precision_recall_at_k=[100]
    )
    vectors = [embed(texts.values()) for texts in (collection.queries, collection.corpus)]
    scores, indices = rank_passages(*vectors, 45)
    hits = [
        [{"corpus_id": f"d{i}", "score": s} for i, s in zip(row, values, strict=True)]
        for row, values in zip(indices.tolist(), scores.tolist(), strict=True)
    ]
    wanted = theirs.compute_metrics(hits)
    binary = {q: dict.fromkeys(documents, 1) for q, documents in relevant.items()}
    run = {q: {h["corpus_id"]: h["score"] for h in row} for q, row in zip(collection.queries, hits, strict=True)}
    found = metrics(binary, run)
    assert found["ndcg@10"] == pytest.approx(wanted["ndcg@k"][10], abs=1e-6)
    assert found["mrr@10"] == pytest.approx(wanted["mrr@k"][10], abs=1e-6)
    assert found["recall@100"] == pytest.approx(wanted["recall@k"][100], abs=1e-6)


def test_evaluate_encodes_titles_and_texts_by_kind(folder: Path) -> None:
    asked = []

    def encode(texts: Any, kind: Any) -> np.ndarray:
        asked.append((kind, texts[0], len(texts)))
        return embed(texts)

    collection = load_beir(folder)
    results = evaluate(encode, [collection], bm25=True)
    assert asked == [("query", "apple river", 11), ("passage", "apple river", 45)]
    assert set(results) == {"words"}
    assert (
        results["words"]["ndcg@10"]
        == score(collection, embed(collection.queries.values()), embed(collection.corpus.values()))["ndcg@10"]
    )
    assert results["words"]["bm25"] == metrics(collection.qrels, bm25_run(collection))
    assert "bm25" not in evaluate(encode, [collection])["words"]
    table = markdown_table(results)
    assert table.splitlines()[0] == "| collection | system | ndcg@10 | recall@100 | mrr@10 |"
    assert [line.split(" | ")[1] for line in table.splitlines()[2:]] == ["model", "BM25"]


def test_bm25_finds_the_document_with_both_words(folder: Path) -> None:
    collection = load_beir(folder)
    run = bm25_run(collection)
    assert all(max(run[f"q{i}"], key=lambda d: run[f"q{i}"][d]) == f"d{4 * i}" for i in range(11))
    assert metrics(collection.qrels, run)["mrr@10"] == 1.0


def test_queries_that_nothing_answers_are_left_out(folder: Path) -> None:
    with (folder / "qrels" / "test.tsv").open("a") as file:
        file.write("q10\td40\t0\nq10\td41\t-1\n\n")
    collection = load_beir(folder)
    assert list(collection.queries) == [f"q{i}" for i in range(10)]
    assert list(collection.qrels) == list(collection.queries)


def test_absent_documents_are_counted(folder: Path) -> None:
    with (folder / "qrels" / "test.tsv").open("a") as file:
        file.write("q0\td900\t1\nq1\td901\t1\n")
    assert load_beir(folder).odd[2].found == {ABSENT: (2, 35)}


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("qrels/test.tsv", ["query-id\tcorpus-id\tscore", "q0\tx\t1"], r"none of 1 judgements names a document"),
        ("qrels/test.tsv", ["query-id\tcorpus-id\tscore"], r"test.tsv: no judgements"),
        ("qrels/test.tsv", ["query-id\tcorpus-id\tscore", "q0\td0\t0"], r"no judgement has a grade above 0"),
        (
            "qrels/test.tsv",
            ["query-id\tcorpus-id\tscore", "q0 d0 1"],
            r"test.tsv, line 2: found 'q0 d0 1'; wanted query",
        ),
        ("qrels/test.tsv", ["query-id\tcorpus-id\tscore", "q0\td0\tyes"], r"test.tsv, line 2: found"),
        (
            "qrels/test.tsv",
            ["query-id\tcorpus-id\tscore", "q99\td0\t1"],
            r"line 2: query 'q99' is not in queries.jsonl",
        ),
        ("corpus.jsonl", [], r"corpus.jsonl: holds no rows; wanted an object with _id, text"),
        ("queries.jsonl", [{"_id": "q0", "text": ""}], r"queries.jsonl: no row has any text; wanted an object"),
        ("corpus.jsonl", [{"_id": "d0", "text": ""}, {"_id": "d1", "text": " "}], r"no row has any text"),
        ("corpus.jsonl", [{"_id": "d0", "text": "a"}, "{x"], r"corpus.jsonl, line 2: not JSON"),
        (
            "corpus.jsonl",
            [{"_id": "d0", "body": "a"}],
            r"corpus.jsonl, line 1: found _id, body; wanted an object with _id",
        ),
        ("corpus.jsonl", [{"_id": "d0", "text": "a"}] * 2, r"corpus.jsonl, line 2: _id 'd0' stands in the file twice"),
        ("queries.jsonl", [{"id": "q0", "text": "a"}], r"queries.jsonl, line 1: found id, text; wanted"),
    ],
)
def test_bad_folders(name: str, lines: list[Any], message: str, folder: Path) -> None:
    write(folder, name, lines)
    with pytest.raises(UserError, match=message):
        load_beir(folder)


def test_missing_parts(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dev.tsv: no such split; present: test"):
        load_beir(folder, "dev")
    with pytest.raises(UserError, match=r"none: no such folder; wanted a BEIR folder"):
        load_beir(tmp_path / "none")
    (folder / "queries.jsonl").unlink()
    with pytest.raises(UserError, match=r"queries.jsonl: no such file; wanted a BEIR folder with"):
        load_beir(folder)


def test_collections_are_told_apart_by_name(folder: Path) -> None:
    with pytest.raises(UserError, match="two BEIR folders are named 'words'"):
        load_collections([folder, folder])


def test_the_command_prints_a_table_and_writes_json(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "hf")
    output = tmp_path / "out" / "scores.json"
    argv = ["--model", str(tmp_path / "hf"), "--data", str(folder), "--output", str(output), "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        main(argv)
    out, _ = capsys.readouterr()
    assert not ended.value.code
    results = json.loads(output.read_text())
    assert set(results["words"]) == {"ndcg@10", "recall@100", "mrr@10", "bm25"}
    assert results["words"]["recall@100"] == 1.0
    assert markdown_table(results) in out
    before = output.read_bytes()

    def without_room(path: Path, write: Any) -> None:
        with files_of_at_most(20):
            write_file(path, write)

    monkeypatch.setattr(sys.modules[main.__module__], "write_file", without_room)
    with pytest.raises(SystemExit) as ended:
        main([*argv, "--overwrite"])
    assert ended.value.code == 1
    assert "scores.json: cannot be written (File too large)" in capsys.readouterr().err
    assert output.read_bytes() == before


def test_the_output_replaces_a_file_only_with_overwrite_and_never_the_model_or_data(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "hf")
    (tmp_path / "there.json").write_text("mine")
    (tmp_path / "link.json").symlink_to(tmp_path / "hf" / "config.json")
    for path, options, message in (
        (tmp_path / "there.json", [], "is there already; name another file, or --overwrite"),
        (tmp_path / "hf", ["--overwrite"], "holds the source"),
        (tmp_path / "hf" / "config.json", ["--overwrite"], "lies in the source"),
        (tmp_path / "hf" / "new" / "scores.json", [], "lies in the source"),
        (tmp_path / "link.json", ["--overwrite"], "lies in the source"),
        (folder / "scores.json", [], "lies in the source"),
    ):
        before = (tmp_path / "hf" / "config.json").read_bytes()
        with pytest.raises(SystemExit) as ended:
            main(["--model", str(tmp_path / "hf"), "--data", str(folder), "--output", str(path), *options])
        assert ended.value.code == 1
        err = capsys.readouterr().err
        assert str(path) in err
        assert message in err
        assert (tmp_path / "hf" / "config.json").read_bytes() == before
    assert (tmp_path / "there.json").read_text() == "mine"
