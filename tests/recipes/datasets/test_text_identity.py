"""What is the same text, in training as in mining: white space around it is none of it. Of ids it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_embed.recipes.config.schema import DataSource
from megatron_embed.recipes.datasets.corpus import Corpus
from megatron_embed.recipes.datasets.inspection import look_through
from megatron_embed.recipes.datasets.odd_rows import REPEATED_PAIRS
from megatron_embed.recipes.datasets.pairs import PairDataset
from megatron_embed.recipes.datasets.sampler import GlobalBatchSampler
from megatron_embed.recipes.retrieval.mining import KnownPositives
from megatron_embed.recipes.training.targets import identify


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def start(path: Path) -> PairDataset:
    return PairDataset([DataSource(path=str(path))])


def test_the_loss_and_mining_have_the_same_identities(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"query": "q", "positive": ["p", "other"]}])
    spaced = identify(["q\n"], [["\u3000p ", " n"]], [[" p", "other\t"]], 2)
    plain = identify(["q"], [["p", "n"]], [["p", "other"]], 2)
    assert all((spaced[name] == plain[name]).all() for name in plain)
    assert spaced["known_ids"][0].tolist() == KnownPositives(start(path).sources[0]).of(" q ").tolist()


def test_no_batch_holds_a_text_twice_in_other_white_space(tmp_path: Path) -> None:
    rows = [{"query": f"q{i % 20}{' ' * (i // 20)}", "positive": f"{' ' * (i % 2)}p{i % 23}"} for i in range(40)]
    data = start(write(tmp_path / "a.jsonl", rows))
    sampler = GlobalBatchSampler(data, 4, 1)
    for step in range(3 * sampler.steps_per_epoch):
        examples = [data[i] for i in sampler.batch(step)]
        assert len({example.query.strip() for example in examples}) == 4
        assert len({example.positive.strip() for example in examples}) == 4


def test_repeated_pairs_and_positives_among_negatives_are_counted(tmp_path: Path) -> None:
    rows = [
        {"query": "q", "positive": "p", "negatives": ["n"]},
        {"query": "q ", "positive": "\np", "negatives": ["n"]},
        {"query": "r", "positive": "p", "negatives": ["p "]},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    wanted = {REPEATED_PAIRS: (1, 2), "rows have a positive among their negatives": (1, 3)}
    assert start(path).sources[0].odd.found == wanted
    found = look_through(str(path))
    assert found.odd.found == wanted
    assert (found.duplicate_queries, found.duplicate_pairs) == (1, 1)


def test_ids_that_differ_in_white_space_are_two_documents(tmp_path: Path) -> None:
    corpus = [{"_id": "d", "docid": "d", "text": "one"}, {"_id": "d ", "docid": "d ", "text": "two"}]
    write(tmp_path / "corpus.jsonl", corpus)
    assert not Corpus(tmp_path / "corpus.jsonl").odd.found
    by_id = write(tmp_path / "a.jsonl", [{"query_text": "q", "positive_document_ids": ["d "]}])
    assert start(by_id)[0].positive == "two"
    write(tmp_path / "queries.jsonl", [{"_id": "q", "text": "q"}])
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq\td \t1\n")
    assert start(tmp_path)[0].positive == "two"
