"""Evaluation every few steps, against sentence-transformers' evaluator on the exported model."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from support.runs import make_inputs, read_metrics, recipe

from megatron_embed.bridge.cpu import host
from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.exporting import export_hf
from megatron_embed.recipes.evaluate import main
from megatron_embed.recipes.training.loop import train


def write_collection(folder: Path, seed: int) -> dict[str, Any]:
    """150 documents of many lengths, with titles or without; 30 queries of words of some."""
    generator = random.Random(seed)

    def words(count: int) -> str:
        return " ".join(f"w{generator.randint(0, 400)}" for _ in range(count))

    documents = [{"_id": f"d{i}", "title": words(1) if i % 2 else "", "text": words(8)} for i in range(149)]
    documents.append({"_id": "long", "text": words(120)})
    queries = [{"_id": f"q{i}", "text": " ".join(str(documents[5 * i]["text"]).split()[2:5])} for i in range(30)]
    relevant = {f"q{i}": {f"d{5 * i}", f"d{(5 * i + 7) % 149}"} for i in range(30)}
    (folder / "qrels").mkdir(parents=True)
    for name, rows in {"corpus": documents, "queries": queries}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged = [f"{query}\t{document}\t1" for query, ids in relevant.items() for document in sorted(ids)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]) + "\n")
    return {
        "queries": {row["_id"]: row["text"] for row in queries},
        "corpus": {row["_id"]: f"{row.get('title', '')} {row['text']}".strip() for row in documents},
        "relevant_docs": relevant,
    }


def by_sentence_transformers(model: Path, collection: dict[str, Any]) -> dict[str, float]:
    evaluator = InformationRetrievalEvaluator(
        **collection,
        ndcg_at_k=[10],
        mrr_at_k=[10],
        precision_recall_at_k=[100],
        query_prompt_name="query",
        corpus_prompt_name="document",
        write_csv=False,
    )
    return {name.removeprefix("cosine_"): value for name, value in evaluator(SentenceTransformer(str(model))).items()}


def test_every_interval_and_at_the_end_every_collection(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    host.run_on_cpu()
    make_inputs(tmp_path)
    collections = {name: write_collection(tmp_path / name, seed) for seed, name in enumerate(("first", "second"))}
    train(
        recipe(
            tmp_path,
            "run",
            "train.train_iters=5",
            "train.eval_interval=2",
            "train.log_interval=100",
            "data.passage_max_length=512",
            "train.micro_batch_tokens=512",
            "data.query_prompt=ask: ",
            f"data.eval=[{tmp_path / 'first'},{tmp_path / 'second'}]",
        )
    )
    records = read_metrics(tmp_path / "run")
    assert [record["step"] for record in records] == [1, 2, 4, 5]
    records = records[1:]  # the first step is always logged
    assert all(list(record["eval"]) == ["first", "second"] for record in records)
    assert records[0]["eval"] != records[1]["eval"]
    export_hf(tmp_path / "run", tmp_path / "export", progress=False)
    output = tmp_path / "found.json"
    folders = [str(tmp_path / name) for name in collections]
    with pytest.raises(SystemExit) as ended:
        main(["--model", str(tmp_path / "export"), "--data", *folders, "--output", str(output), "--device", "cpu"])
    assert not ended.value.code
    alone = json.loads(output.read_text())
    for name, collection in collections.items():
        wanted = by_sentence_transformers(tmp_path / "export", collection)
        assert 0.01 < wanted["ndcg@10"] < 0.95
        for metric in ("ndcg@10", "recall@100", "mrr@10"):
            assert records[-1]["eval"][name][metric] == pytest.approx(wanted[metric], abs=1e-6)
            assert alone[name][metric] == pytest.approx(wanted[metric], abs=1e-6)
    printed = capsys.readouterr().out
    assert [line.split(" | ")[0] for line in printed.splitlines() if line.startswith("| ")][1:] == [
        *["| first"] * 2,
        *["| second"] * 2,
    ]


def test_two_collections_of_one_name(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    for parent in ("a", "b"):
        write_collection(tmp_path / parent / "same", 0)
    folders = f"data.eval=[{tmp_path / 'a' / 'same'},{tmp_path / 'b' / 'same'}]"
    with pytest.raises(UserError, match="two BEIR folders are named 'same'"):
        train(recipe(tmp_path, "run", folders))
    assert not (tmp_path / "run").exists()
