"""What can be used and looks odd: every command that reads it counts it and goes on, and with ``--strict`` does not."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.runs import recipe, write_pairs
from support.tiny_models import save_model, save_vlm

from megatron_embed.recipes import data, encode, evaluate, mine, train
from megatron_embed.recipes.datasets.corpus import Corpus
from megatron_embed.recipes.datasets.inspection import _percentiles, _repeats
from megatron_embed.recipes.retrieval.mining_input import odd_documents

DOCUMENTS = ["one", "a\0b", "", "one", " ", "caf\ufffd", "seven"]
ODD_CORPUS = {
    "rows have no text; their vectors are the prompt's": (2, 3),
    "rows hold NUL characters": (1, 2),
    "rows hold U+FFFD, what a wrong encoding leaves": (1, 6),
}
REPEATED = {"rows repeat the text of an earlier row, which alone can be a negative": (1, 4)}
PAIRS = [
    {"query": "q", "positive": "one"},
    {"query": "q", "positive": ["two", "one"]},
    {"query": "r\0", "positive": "seven", "negatives": ["seven"]},
]
ODD_PAIRS = {
    "repeated pairs": (1, 2),
    "rows hold NUL characters": (1, 3),
    "rows have a positive among their negatives": (1, 3),
}
JUDGEMENTS = ["q0\td0\t1", "q0\tgone\t1", "q0\td0\t2", "q1\td3\t0"]
ODD_JUDGEMENTS = {
    "judgements name documents that the corpus lacks; they count as never found": (1, 3),
    "judgements are of a query and document judged before; the last counts": (1, 4),
    "queries have no document of a grade above 0; they are left out": (1, 5),
}


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A BEIR folder and pairs."""
    folder = tmp_path / "words"
    (folder / "qrels").mkdir(parents=True)
    lines(folder / "corpus.jsonl", [{"_id": f"d{i}", "text": text} for i, text in enumerate(DOCUMENTS)])
    lines(folder / "queries.jsonl", [{"_id": "q0", "text": "one"}, {"_id": "q1", "text": ""}])
    lines(folder / "qrels" / "test.tsv", ["query-id\tcorpus-id\tscore", *JUDGEMENTS])
    lines(folder / "pairs.jsonl", PAIRS)
    return folder


def status_of(main: Callable[..., Any], *arguments: Any) -> int:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    return int(ended.value.code or 0)


def remarks(path: Path, odd: dict[str, tuple[int, int]]) -> set[str]:
    return {f"{path}: {count} {remark}, first line {line}" for remark, (count, line) in odd.items()}


def assert_told(err: str, wanted: set[str], *, strict: bool) -> None:
    """One remark a line, or all of them in one message."""
    assert err.startswith("error: ") == strict
    if strict:
        assert err.count("\n") == 1
        assert all(remark in err for remark in wanted), err
        assert err.count(", first line ") == len(wanted)
    else:
        assert set(err.splitlines()) == wanted


def without_bars(err: str) -> str:
    """What went to stderr, but for progress bars."""
    return "".join(f"{line}\n" for line in err.splitlines() if line and "encoding:" not in line)


@pytest.mark.parametrize("strict", [False, True])
def test_encode(strict: bool, model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", model, "--input", folder, "--output", tmp_path / "out", "--device", "cpu"]
    assert status_of(encode.main, *arguments, *["--strict"] * strict) == strict
    assert_told(without_bars(capsys.readouterr().err), remarks(folder / "corpus.jsonl", ODD_CORPUS), strict=strict)
    assert (tmp_path / "out").exists() != strict


@pytest.mark.parametrize("strict", [False, True])
def test_mine(strict: bool, model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, pairs, out = folder / "corpus.jsonl", folder / "pairs.jsonl", tmp_path / "out" / "mined.jsonl"
    arguments = ["--model", model, "--data", pairs, "--corpus", corpus, "--output", out, "--device", "cpu"]
    wanted = remarks(corpus, ODD_CORPUS | REPEATED) | remarks(pairs, ODD_PAIRS)
    for again in ([], ["--overwrite"]):  # what the first run found of the corpus, the second takes from its cache
        assert status_of(mine.main, *arguments, *again, *["--strict"] * strict) == strict
        captured = capsys.readouterr()
        assert_told(without_bars(captured.err), wanted, strict=strict)
        if strict:
            assert not out.exists()
            assert not list(tmp_path.glob("**/vectors-*.npy"))  # refused before anything is encoded
            continue
        assert wanted <= set(captured.out.splitlines())
        audit = json.loads(out.with_suffix(".audit.json").read_text())
        assert audit["odd_rows"] == {
            str(corpus): {remark: count for remark, (count, _) in (ODD_CORPUS | REPEATED).items()},
            str(pairs): {remark: count for remark, (count, _) in ODD_PAIRS.items()},
        }


@pytest.mark.parametrize("strict", [False, True])
def test_evaluate(strict: bool, model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scores.json"
    arguments = ["--model", model, "--data", folder, "--output", out, "--device", "cpu", "--no-bm25"]
    assert status_of(evaluate.main, *arguments, *["--strict"] * strict) == strict
    wanted = remarks(folder / "corpus.jsonl", ODD_CORPUS) | remarks(folder / "qrels" / "test.tsv", ODD_JUDGEMENTS)
    wanted |= remarks(folder / "queries.jsonl", {"rows have no text; their vectors are the prompt's": (1, 2)})
    assert_told(without_bars(capsys.readouterr().err), wanted, strict=strict)
    assert out.exists() != strict


@pytest.mark.parametrize("strict", [False, True])
def test_data(strict: bool, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(data.main, folder / "pairs.jsonl", *["--strict"] * strict) == strict
    out, err = capsys.readouterr()
    for remark, (count, line) in ODD_PAIRS.items():
        assert f"  remarks    {count} {remark}, first line {line}\n" in out
    if strict:
        assert_told(err, remarks(folder / "pairs.jsonl", ODD_PAIRS), strict=True)
    else:
        assert not err


def test_train(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_vlm(tmp_path / "model")
    odd = (folder / "pairs.jsonl").read_text()
    write_pairs(tmp_path / "train.jsonl", 20)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(odd)
    train(recipe(tmp_path, "run", "train.train_iters=1", f"data.eval={folder}", "device=cpu"))
    wanted = remarks(
        tmp_path / "train.jsonl", {remark: (count, 20 + line) for remark, (count, line) in ODD_PAIRS.items()}
    )
    wanted |= remarks(folder / "qrels" / "test.tsv", ODD_JUDGEMENTS)
    assert wanted <= {record.getMessage() for record in caplog.records if record.levelname == "WARNING"}


def test_nothing_odd_says_nothing(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = lines(tmp_path / "corpus.jsonl", [{"_id": "a", "text": "one"}, {"_id": "b", "text": "two"}])
    arguments = ["--model", model, "--input", path, "--output", tmp_path / "out", "--device", "cpu", "--strict"]
    assert status_of(encode.main, *arguments) == 0
    assert not without_bars(capsys.readouterr().err)


def test_white_space_on_a_plain_line_is_no_negative(tmp_path: Path) -> None:
    """Training refuses such a text: mining must not give it."""
    (tmp_path / "plain.txt").write_text("one\n\u3000\ntwo\n\u3000\u3000\n")
    corpus = Corpus(tmp_path / "plain.txt")
    ids = corpus.text_ids
    assert (ids[1] == ids[3]).all()
    path = lines(tmp_path / "corpus.jsonl", [{"_id": "a", "text": "one"}, {"_id": "b", "text": ""}])
    assert (ids[1] == Corpus(path).text_ids[1]).all()
    assert odd_documents(corpus).counts() == {"rows have no text; their vectors are the prompt's": 2}


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 30), min_size=1), hashes=st.lists(st.integers(-3, 3)))
def test_percentiles_and_repeats_without_keeping_the_texts(lengths: list[int], hashes: list[int]) -> None:
    wanted = np.percentile(lengths, [0, 5, 50, 95, 100], method="inverted_cdf")
    assert _percentiles(Counter(lengths), [0, 5, 50, 95, 100]) == wanted.tolist()
    again = [i for i, value in enumerate(hashes) if value in hashes[:i]]
    assert sorted(_repeats(array("q", hashes))) == again
