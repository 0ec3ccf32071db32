"""Bad and odd corpora, as the encoding program meets them: named by line, or counted and used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_models import save_model

from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes import Encoder, encode
from megatron_embed.recipes.config.schema import DataSource
from megatron_embed.recipes.datasets import odd_rows
from megatron_embed.recipes.datasets.beir import load_beir
from megatron_embed.recipes.datasets.corpus import BeirTexts, Corpus
from megatron_embed.recipes.datasets.inspection import look_through
from megatron_embed.recipes.datasets.pairs import PairDataset
from megatron_embed.recipes.retrieval import encode_corpus, miner
from megatron_embed.recipes.retrieval.mining import MiningRules
from megatron_embed.recipes.retrieval.vectors import VectorFolder

LONG = 100_000_000
ODD = ["plain", "a\0b", "</s> [INST] <pad> inside", "﻿ a BOM inside", "\u2028 line separators \u0085 stay"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def encoder(model: Path) -> Iterator[Encoder]:
    with Encoder.from_pretrained(model, device="cpu") as encoder:
        yield encoder


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def write_parquet(path: Path, rows: list[Any]) -> Path:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def empty_parquet(path: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    columns = {"_id": pyarrow.array([], pyarrow.string()), "text": pyarrow.array([], pyarrow.string())}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def documents(texts: list[str]) -> list[dict[str, Any]]:
    return [{"_id": str(i), "title": "", "text": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize(("strict", "status"), [(False, 0), (True, 1)])
def test_odd_texts_are_kept_counted_and_refused_only_by_strict(
    strict: bool, status: int, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "c.jsonl", documents([*ODD, " ", ""]))
    arguments = ["--model", str(model), "--input", str(path), "--output", str(tmp_path / "out"), "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        encode.main([*arguments, *(["--strict"] if strict else [])])
    err = capsys.readouterr().err
    assert int(ended.value.code or 0) == status, err
    assert f"{path}: 2 rows have no text; their vectors are the prompt's, first line 6" in err
    assert f"{path}: 1 rows hold NUL characters, first line 2" in err
    assert err.startswith("error: ") == strict
    assert (tmp_path / "out").exists() != strict


@pytest.mark.parametrize("first", ["version https://git-lfs.github.com/spec/v1", '["a", "b"]'])
def test_a_beir_folder_holds_no_plain_lines(first: str, tmp_path: Path) -> None:
    document = {"_id": "a", "text": "one"}
    write(tmp_path / "corpus.jsonl", [first, document])
    write(tmp_path / "queries.jsonl", [document])
    with pytest.raises(UserError, match=r"corpus.jsonl, line 1: "):
        len(Corpus(tmp_path))
    # in a file of any lines it may be meant
    assert Corpus(tmp_path / "corpus.jsonl").odd.counts() == {odd_rows.JSON_LOOKING: 1}


def test_control_tokens_and_nuls_are_encoded_as_text(encoder: Encoder, tmp_path: Path) -> None:
    corpus = Corpus(write(tmp_path / "c.jsonl", documents(ODD)))
    assert corpus.read(0, len(ODD))[1] == [text.strip() for text in ODD]
    ids = encoder.tokenizer.tokenize([text.strip() for text in ODD], "passage")
    assert all(not set(row[1:-1]) & set(range(14)) for row in ids), "a control token inside a text"
    folder = encode_corpus.encode_texts(encoder, corpus, tmp_path / "out")
    assert isinstance(folder, VectorFolder)
    wanted = encoder.encode([text.strip() for text in ODD], kind="passage")
    np.testing.assert_allclose(folder.rows(0, len(ODD)), wanted, atol=2e-6)


@pytest.mark.parametrize("id_", [None, True, 1.5, ["a"], {"$oid": "5"}])
def test_ids_of_another_type_are_named(id_: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "corpus.jsonl", [*documents(["a"]), {"_id": id_, "text": "b"}])
    message = r"corpus.jsonl, line 2: '_id': found .*; wanted text or a whole number"
    with pytest.raises(UserError, match=message):
        len(Corpus(path))
    with pytest.raises(UserError, match=message):
        len(BeirTexts(tmp_path, "corpus.jsonl"))
    assert Corpus(write(path, [{"_id": 7, "text": "a"}])).read(0, 1)[0] == ["7"]


def test_a_parquet_corpus_cut_short_or_of_other_columns(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "c.parquet", documents(["a", "b"]))
    assert Corpus(path).read(0, 2) == (["0", "1"], ["a", "b"])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"c.parquet: not a readable Parquet file"):
        Corpus(path)
    write_parquet(path, [{"_id": "a", "text": 5}])
    with pytest.raises(UserError, match=r"c.parquet, line 1: 'text': found the number 5; wanted text"):
        len(Corpus(path))
    write_parquet(path, [{"_id": "a", "body": "b"}])
    with pytest.raises(UserError, match=r"c.parquet, line 1: found _id, body; wanted an object with _id, text"):
        len(Corpus(path))


def beir_around(folder: Path) -> Path:
    """A BEIR folder of the corpus that lies there."""
    (folder / "qrels").mkdir()
    write(folder / "queries.jsonl", [{"_id": "q", "text": "q"}])
    (folder / "qrels" / "test.tsv").write_text("q\t1\t1\n")
    return folder


@pytest.mark.slow
def test_a_line_of_100_mb_is_read_and_a_bad_one_is_named_in_short(encoder: Encoder, tmp_path: Path) -> None:
    text = "word " * (LONG // 5)
    pairs = write(tmp_path / "pairs.jsonl", [{"query": "q", "positive": "p"}, {"query": "q", "positive": text}])
    assert len(PairDataset([DataSource(path=str(pairs))])[1].positive) == LONG
    assert look_through(str(pairs)).lengths["positive"] == {1: 1, LONG: 1}
    corpus = Corpus(write(tmp_path / "corpus.jsonl", documents(["a", text])))
    assert not corpus.odd.found
    assert len(corpus.read(1, 2)[1][0]) == LONG - 1  # stripped
    collection = load_beir(beir_around(tmp_path))
    assert [len(text) for text in collection.corpus.values()] == [1, LONG - 1]
    folder = encode_corpus.encode_texts(encoder, corpus, tmp_path / "out")  # of the text, only the beginning counts
    wanted = encoder.encode(["a", text[:10_000]], kind="passage")
    np.testing.assert_allclose(folder.rows(0, 2), wanted, atol=2e-6)
    for path in (pairs, tmp_path / "corpus.jsonl"):
        path.write_bytes(path.read_bytes()[: -LONG // 2])
    with pytest.raises(UserError, match=r"pairs.jsonl, line 2: not JSON: Unterminated string") as of_pairs:
        PairDataset([DataSource(path=str(pairs))])
    with pytest.raises(UserError, match=r"corpus.jsonl, line 2: not JSON: Unterminated string") as of_corpus:
        len(Corpus(tmp_path / "corpus.jsonl"))
    with pytest.raises(UserError, match=r"corpus.jsonl, line 2: not JSON: Unterminated string") as of_beir:
        load_beir(tmp_path)
    assert max(len(str(error.value)) for error in (of_pairs, of_corpus, of_beir)) < 400


EMPTY = {
    "empty": "",
    "blank": "\n\r\n",
    "array": "[]",
    "no text": '{"_id": "a", "text": ""}\n{"_id": "b", "text": " "}\n',
}


@pytest.mark.parametrize("kind", [*EMPTY, "parquet"])
def test_a_corpus_without_text_is_named_and_what_is_wanted_there(kind: str, encoder: Encoder, tmp_path: Path) -> None:
    """To encode, to mine from, to search: not "training pairs"."""
    path = tmp_path / "corpus.jsonl"
    if kind == "parquet":
        empty_parquet(path)
    else:
        path.write_text(EMPTY[kind])
    pairs = write(tmp_path / "pairs.jsonl", [{"query": "q", "positive": "p"}])
    message = r"corpus.jsonl: (holds no rows|no row has any text); wanted texts: an object with _id, text"
    with pytest.raises(UserError, match=message):
        len(Corpus(path))
    with pytest.raises(UserError, match=message):
        miner.mine(encoder, str(pairs), Corpus(path), tmp_path / "out", rules=MiningRules(), cache=tmp_path / "cache")
    assert not (tmp_path / "out").exists()
    if kind not in ("array", "parquet"):  # BEIR folders know JSON lines only
        write(tmp_path / "queries.jsonl", [{"_id": "q", "text": "q"}])
        message = r"corpus.jsonl: (holds no rows|no row has any text); wanted an object with _id, text"
        with pytest.raises(UserError, match=message):
            load_beir(tmp_path)
