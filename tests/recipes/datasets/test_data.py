"""Training pairs: every form gives the same examples, every bad row is named, the order is a function of the step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import save_model

from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes.config.schema import DataSection, DataSource
from megatron_embed.recipes.datasets import table
from megatron_embed.recipes.datasets.beir import load_beir
from megatron_embed.recipes.datasets.beir_rows import BeirRows
from megatron_embed.recipes.datasets.inspection import look_through
from megatron_embed.recipes.datasets.pairs import PairDataset
from megatron_embed.recipes.datasets.sampler import GlobalBatchSampler

ROWS: list[dict[str, Any]] = [
    {"query": f"query {i} “ü”", "positive": f"passage {i}", "negatives": [f"wrong {i}.{j}" for j in range(i % 3)]}
    for i in range(10)
]


def dataset(*paths: str | Path, **source: Any) -> PairDataset:
    return PairDataset(
        [DataSource(path=str(path), query_prompt="q: ", passage_prompt="p: ", **source) for path in paths]
    )


def write_lines(path: Path, rows: list[Any], *, end: str = "\n") -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + end for row in rows), newline="")
    return path


def write_array(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[Any]) -> Path:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def write_beir(folder: Path, rows: list[Any], split: str = "train") -> Path:
    (folder / "qrels").mkdir(parents=True)
    write_lines(folder / "corpus.jsonl", [{"_id": f"d{i}", "text": row["positive"]} for i, row in enumerate(rows)])
    write_lines(folder / "queries.jsonl", [{"_id": f"q{i}", "text": row["query"]} for i, row in enumerate(rows)])
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(len(rows)))]
    (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("form", ["jsonl", "jsonl, no last line break", "crlf", "bom", "json", "parquet"])
def test_every_form_gives_the_same_examples(form: str, tmp_path: Path) -> None:
    path = tmp_path / "data"  # the form is recognised by what the file holds, not by its name
    match form:
        case "jsonl":
            write_lines(path, ROWS)
        case "jsonl, no last line break":
            write_lines(path, ROWS)
            path.write_bytes(path.read_bytes().rstrip(b"\n"))
        case "crlf":
            write_lines(path, ROWS, end="\r\n")
        case "bom":
            write_lines(path, ROWS)
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        case "json":
            write_array(path, ROWS)
        case "parquet":
            write_parquet(path, ROWS)
    data = dataset(path)
    assert len(data) == 10
    begins = [line for line, text in enumerate(path.read_bytes().split(b"\n"), start=1) if text == b"  {"]
    for i, row in enumerate(ROWS):
        example = data[i]
        assert (example.query, example.positive, example.negatives) == (row["query"], row["positive"], row["negatives"])
        assert (example.source, example.line) == (str(path), begins[i] if form == "json" else i + 1)
        assert (example.query_prompt, example.passage_prompt) == ("q: ", "p: ")
        assert example.positives == [row["positive"]]


def test_beir_folder_with_a_train_split(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "b", ROWS[:3])
    with (folder / "qrels" / "train.tsv").open("a") as file:
        file.write("q0\td2\t2\nq1\td0\t0\n")
    data = dataset(folder)
    assert [(e.query[:7], e.positive, e.line) for e in (data[i] for i in range(len(data)))] == [
        ("query 0", "passage 0", 2),
        ("query 0", "passage 2", 2),
        ("query 1", "passage 1", 3),
        ("query 2", "passage 2", 4),
    ]
    assert data[0].positives == ["passage 0", "passage 2"]


def test_of_judgements_of_one_pair_the_last_counts_as_in_an_evaluation(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "b", ROWS[:4])
    for name in ("train", "test"):
        with (folder / "qrels" / f"{name}.tsv").open("w") as file:
            for query, document, grade in ((3, 0, 0), (0, 2, 1), (0, 0, 1), (1, 1, 1), (0, 0, 0), (3, 0, 2), (0, 2, 3)):
                file.write(f"q{query}\td{document}\t{grade}\n")
            file.write("q1\td1\t-1\nq0\td3\t1\n")
    data, collection = dataset(folder), load_beir(folder)
    trained = {data[i].query: data[i].positives for i in range(len(data))}
    assert trained == {
        collection.queries[query]: [collection.corpus[document] for document, grade in grades.items() if grade > 0]
        for query, grades in collection.qrels.items()
    }
    assert [(e.query[:7], e.positive) for e in (data[i] for i in range(len(data)))] == [
        ("query 3", "passage 0"),
        ("query 0", "passage 2"),
        ("query 0", "passage 3"),
    ]


@pytest.mark.slow
def test_a_beir_corpus_takes_little_memory_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "LEAST_BYTES", 0)
    folder, count = write_beir(tmp_path / "b", ROWS[:4]), 60_000
    documents = (f'{{"_id": "d{i}", "text": "passage {i}"}}\n' for i in range(count))
    (folder / "corpus.jsonl").write_text("".join(documents))
    tracemalloc.start()
    try:
        found = [value["positive"][0].number for _, value, _ in BeirRows(str(folder)).scan()]
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == [0, 1, 2, 3]
    assert most < 80 * count, most / count  # with a dict of the ids more than 200


def test_blank_lines_are_skipped_and_lines_still_counted(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [ROWS[0], "", "", ROWS[1], "\r", ROWS[2], ""])
    data = dataset(path)
    assert [data[i].line for i in range(len(data))] == [1, 4, 6]
    assert [data[i].query for i in range(3)] == [row["query"] for row in ROWS[:3]]


def test_a_row_with_several_positives_is_several_examples(tmp_path: Path) -> None:
    rows = [{"query": "a", "positive": ["1", "2"]}, {"query": "b", "positive": "3"}, {"query": "c", "positive": ["4"]}]
    data = dataset(write_lines(tmp_path / "a.jsonl", rows))
    assert [(data[i].query, data[i].positive) for i in range(len(data))] == [
        ("a", "1"),
        ("a", "2"),
        ("b", "3"),
        ("c", "4"),
    ]
    assert data[1].positives == ["1", "2"]
    assert data[1].negatives == []
    with pytest.raises(IndexError):
        data[4]


def test_control_tokens_and_white_space_stay_text(tmp_path: Path) -> None:
    row = {"query": " </s>[INST] \n", "positive": "a\tb \u2028 c\u0000", "negatives": None}
    data = dataset(write_lines(tmp_path / "a.jsonl", [row]))
    assert (data[0].query, data[0].positive) == (row["query"], row["positive"])


def test_several_sources_lie_end_to_end_with_their_own_prompts(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "a.jsonl", ROWS[:4])
    second = write_array(tmp_path / "b.json", ROWS[4:])
    section = DataSection(train=[DataSource(path=str(first), query_prompt=""), DataSource(path=str(second))])
    data = PairDataset(section.sources())
    assert data.sizes == [4, 6]
    assert [data[i].query for i in range(10)] == [row["query"] for row in ROWS]
    assert (data[3].query_prompt, data[4].query_prompt) == ("", "query: ")
    assert data[4].source == str(second)
    assert [source.max_negatives for source in data.sources] == [2, 2]


GOOD = json.dumps(ROWS[0])
ARRAY = b"[" + GOOD.encode() + b",\n%b]"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 2: not JSON: Expecting property name .* at column 2: '{not json'"),
        (GOOD + GOOD, "line 2: not JSON: Extra data"),
        ('"a text"', "line 2: found a text; wanted an object with query, positive"),
        ("[1]", "line 2: found a list; wanted an object"),
        ('{"positive": "p"}', "line 2: no 'query'; found keys: positive; wanted an object with query, positive"),
        ('{"query": "q", "text": "p"}', "line 2: no 'positive'; found keys: query, text"),
        (
            '{"query": "q", "pos": "p"}',
            r"line 2: a row of another form: FlagEmbedding \('pos'\), where line 1 is query",
        ),
        ('{"query": "q", "positive": []}', "line 2: 'positive' is empty; every query needs one"),
        ('{"query": "q", "positive": null}', "line 2: 'positive' is empty; every query needs one"),
        ('{"query": "", "positive": "p"}', "line 2: 'query' holds an empty text"),
        ('{"query": " \\n", "positive": "p"}', "line 2: 'query' holds an empty text"),
        ('{"query": "q", "positive": ["p", ""]}', "line 2: 'positive' holds an empty text"),
        ('{"query": "q", "positive": "p", "negatives": ["n", ""]}', "line 2: 'negatives' holds an empty text"),
        ('{"query": 5, "positive": "p"}', "line 2: 'query': found the number 5; wanted text"),
        ('{"query": null, "positive": "p"}', "line 2: 'query': found null; wanted text"),
        ('{"query": "q", "positive": {"text": "p"}}', "line 2: 'positive': found an object; wanted text"),
        ('{"query": "q", "positive": "p", "negatives": "n"}', "line 2: 'negatives': found a text; wanted a list"),
        ('{"query": "q", "positive": "p", "negatives": [1]}', "line 2: 'negatives': found the number 1; wanted text"),
        ('{"query": "\\ud83d", "positive": "p"}', "line 2: half a surrogate pair, .ud83d, is no text"),
        ('{"query": ' + "[" * 10**5 + "]" * 10**5 + "}", "line 2: not usable JSON: nested too deeply"),
        ('{"query": ' + "1" * 5000 + "}", "line 2: not usable JSON: a number of more than 4,300 digits"),
        ('{"query": "q", "positive": "p", "scores": [1%s]}' % ("0" * 400), "line 2: 'scores': wanted a list of finite"),
        ('{"query": "q", "positive": "p", "scores": [NaN]}', "line 2: 'scores': wanted a list of finite numbers"),
    ],
)
def test_bad_lines_are_named(line: str, message: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "bad.jsonl", [GOOD, line, GOOD])
    with pytest.raises(UserError, match=f"bad.jsonl, {message}"):
        dataset(path)


def test_the_first_bad_line_is_named_and_the_others_counted(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "bad.jsonl", [GOOD, "", "x", "y", GOOD, "{}"])
    with pytest.raises(UserError, match=r"bad.jsonl, line 3: not JSON: .*\(2 more cannot be used\)"):
        dataset(path)
    assert [problem.partition(":")[0] for problem in look_through(str(path)).problems] == ["line 3", "line 4", "line 6"]


def test_other_encodings_are_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + '{"query": "caf\u00e9", "positive": "p"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.jsonl, line 2: not UTF-8: byte 0xe9 at byte 15 of the line"):
        dataset(path)
    path = tmp_path / "array.json"
    path.write_bytes(f'[\n{GOOD}, {{\n\n"query": "caf\u00e9"}}]'.encode("latin-1"))
    with pytest.raises(UserError, match=r"array.json, line 2, entry 2: not UTF-8: byte 0xe9 on line 4; wanted"):
        dataset(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "data: holds no rows; wanted training pairs"),
        (b"\n\r\n\n", "data: holds no rows"),
        (b"[]", "data: holds no rows; wanted training pairs"),
        (b"[\n{},\n{]", "data, line 3: not JSON"),
        (b'[{"query": "q"}]', "data, line 1: no 'positive'"),
        (b'[{"query": "q", "positive": "\\ud83d"}]', "data, line 1: half a surrogate pair, .ud83d, is no text"),
        (ARRAY % (b"[" * 10**5 + b"]" * 10**5), "data, line 2: not usable JSON: nested too deeply"),
        (ARRAY % (b"1" * 5000), "data, line 2: not usable JSON: a number of more than 4,300 digits"),
        (b"PAR1 cut short", "data: not a readable Parquet file"),
        (b"\xef\xbb\xbf", "data: holds no rows"),
    ],
)
def test_unusable_files(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(content)
    with pytest.raises(UserError, match=message):
        dataset(tmp_path / "data")


def test_absent_sources(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.jsonl: no such file or folder"):
        dataset(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"a folder, but no BEIR folder; wanted corpus.jsonl"):
        dataset(tmp_path)
    with pytest.raises(UserError, match=r"wanted hf://org/name"):
        dataset("hf://name")
    with pytest.raises(UserError, match=r"data.train: missing"):
        PairDataset([])


def test_an_absent_hub_data_set_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        assert (args, kwargs) == (("org/name", "small"), {"split": "train"})
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"hf://org/name/small: cannot be loaded \(ConnectionError: offline\)"):
        dataset("hf://org/name/small")


def test_a_hub_data_set_gives_the_same_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(ROWS))
    data = dataset("hf://org/name")
    assert [data[i].query for i in range(10)] == [row["query"] for row in ROWS]
    assert data[7].negatives == ROWS[7]["negatives"]


def test_parquet_cut_short_and_of_other_columns(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a.parquet: not a readable Parquet file"):
        dataset(path)
    path = write_parquet(tmp_path / "b.parquet", [{"query": "q", "positive": 5}])
    with pytest.raises(UserError, match=r"b.parquet, line 1: 'positive': found the number 5; wanted text"):
        dataset(path)


def test_beir_train_split_that_names_what_is_not_there(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "b", ROWS[:2])
    with (folder / "qrels" / "train.tsv").open("a") as file:
        file.write("q0\td9\t1\n")
    with pytest.raises(UserError, match=r"train.tsv, line 4: 'd9' is not in corpus.jsonl"):
        dataset(folder)
    (folder / "qrels" / "train.tsv").write_text("q9\td9\t1\nq0\td9\t1\n")
    with pytest.raises(UserError, match=r"train.tsv, line 1: 'q9' is not in queries.jsonl"):
        dataset(folder)
    queries = (folder / "queries.jsonl").read_text()
    (folder / "queries.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"queries.jsonl: holds no rows; wanted an object with _id, text"):
        dataset(folder)
    (folder / "queries.jsonl").write_text(queries)
    (folder / "qrels" / "train.tsv").rename(folder / "qrels" / "test.tsv")
    with pytest.raises(UserError, match=r"train.tsv: no such split; present: test"):
        dataset(folder)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(4, 40), min_size=1, max_size=3),
    batch=st.integers(1, 4),
    seed=st.integers(0, 2**40),
)
def test_an_epoch_takes_every_source_through_once(sizes: list[int], batch: int, seed: int) -> None:
    sampler = GlobalBatchSampler(sizes, batch, seed)
    starts = np.cumsum([0, *sizes])
    epoch = sampler.steps_per_epoch
    assert epoch == sum(size // batch for size in sizes)
    for first in (0, epoch, 7 * epoch):
        batches = [sampler.batch(step) for step in range(first, first + epoch)]
        seen = Counter(index for chosen in batches for index in chosen)
        assert set(seen.values()) == {1}
        for chosen in batches:
            assert len(chosen) == batch
            assert len(set(np.searchsorted(starts, chosen, side="right"))) == 1
        for which, size in enumerate(sizes):
            mine = sum(starts[which] <= index < starts[which + 1] for index in seen)
            assert mine == size - size % batch  # only the tail is dropped


@pytest.mark.parametrize("weights", [None, [3.0, 1.0]])
def test_a_batch_is_a_function_of_seed_and_step_alone(weights: list[float] | None) -> None:
    steps = [0, 1, 30, 2500, 7, 2499, 0]
    whole = GlobalBatchSampler([64, 40], 8, 5, weights=weights)
    forward = {step: whole.batch(step) for step in range(2501)}
    assert all(whole.batch(step) == forward[step] for step in steps)
    assert all(GlobalBatchSampler([64, 40], 8, 5, weights=weights).batch(step) == forward[step] for step in steps)
    other = GlobalBatchSampler([64, 40], 8, 6, weights=weights)
    assert [other.batch(step) for step in range(5)] != [forward[step] for step in range(5)]


def test_epochs_are_shuffled_anew() -> None:
    sampler = GlobalBatchSampler([64], 64, 0)
    first, second = sampler.batch(0), sampler.batch(1)
    assert sorted(first) == sorted(second) == list(range(64))
    assert first != second
    assert first != list(range(64))


def test_the_order_does_not_change_between_versions() -> None:
    """A run resumed with a newer version must see the data that it would have seen."""
    assert GlobalBatchSampler([10], 4, 42).batch(3) == [8, 6, 1, 2]
    assert GlobalBatchSampler([10, 6], 3, 42, weights=[1, 1]).batch(5) == [11, 13, 15]


def test_weights_set_the_share_of_the_batches() -> None:
    sampler = GlobalBatchSampler([1000, 10, 100], 5, 3, weights=[1, 2, 1])
    drawn = Counter(int(np.searchsorted([1000, 1010], sampler.batch(step)[0], side="right")) for step in range(4000))
    assert [drawn[which] / 4000 for which in range(3)] == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    assert GlobalBatchSampler([30, 10], 5, 0).steps_per_epoch == 8


def test_weights_come_from_the_sources(tmp_path: Path) -> None:
    paths = [write_lines(tmp_path / f"{name}.jsonl", ROWS) for name in "ab"]
    data = PairDataset([DataSource(path=str(path), weight=weight) for path, weight in zip(paths, (9, 1), strict=True)])
    sampler = GlobalBatchSampler(data, 5, 0)
    first = sum(sampler.batch(step)[0] < 10 for step in range(400))
    assert first / 400 == pytest.approx(0.9, abs=0.05)


def test_a_source_smaller_than_a_batch_is_refused(tmp_path: Path) -> None:
    data = dataset(write_lines(tmp_path / "small.jsonl", ROWS))
    assert len(GlobalBatchSampler(data, 10, 0).batch(0)) == 10
    with pytest.raises(
        UserError, match=r"small.jsonl: 10 examples do not fill one batch of train.global_batch_size 11"
    ):
        GlobalBatchSampler(data, 11, 0)


def test_memory_does_not_grow_with_the_texts(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "big.jsonl", [{"query": f"q {i}", "positive": "word " * 400} for i in range(20_000)])
    code = (
        "import pyarrow\n"
        "from megatron_embed.recipes.config.schema import DataSource\n"
        "from megatron_embed.recipes.datasets.pairs import PairDataset\n"
        "from megatron_embed.recipes.datasets.sampler import GlobalBatchSampler\n"
        "def memory():  # what is mapped of the table is the page cache's\n"
        "    return next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('RssAnon'))\n"
        "pyarrow.array(['a'])  # imports pandas\n"
        "before = memory()\n"
        f"data = PairDataset([DataSource(path={str(path)!r})])\n"
        "batch = [data[i] for i in GlobalBatchSampler(data, 64, 0).batch(100)]\n"
        "print(1024 * (memory() - before))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert path.stat().st_size > 40e6
    assert int(done.stdout) < 24e6  # mostly the record batch that is being written


@pytest.mark.parametrize(("strict", "status"), [(False, 0), (True, 1)])
def test_the_inspector_shows_what_was_recognised(
    strict: bool, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_embed.recipes.data import main

    path = write_lines(tmp_path / "a.jsonl", [*ROWS, ROWS[0]])
    with pytest.raises(SystemExit) as ended:
        main([str(path), *(["--strict"] if strict else [])])
    out, err = capsys.readouterr()
    assert int(ended.value.code or 0) == status
    for text in ("JSON lines", "rows       11", "1 repeated pairs", "'query: query 0 “ü”'", "problems   none"):
        assert text in out
    assert "remarks    1 repeated pairs, first line 11" in out
    assert err == (f"error: {path}: 1 repeated pairs, first line 11\n" if strict else "")


def test_the_inspector_shows_what_a_recipe_makes_of_its_sources(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_embed.recipes.data import main

    model = save_model(tmp_path / "model")
    long = {"query": "q", "positive": "w1 " * 50, "query_prompt": "row's: "}
    files = [write_lines(tmp_path / "a.jsonl", ROWS), write_lines(tmp_path / "b.jsonl", [long, GOOD])]
    config = tmp_path / "run_config.yaml"
    sources = [{"path": str(files[0])}, {"path": str(files[1]), "query_prompt": "b: ", "passage_prompt": ""}]
    data = {"train": sources, "query_prompt": "ask: ", "passage_prompt": "find: ", "passage_max_length": 20}
    config.write_text(json.dumps({"data": data}))
    with pytest.raises(SystemExit) as ended:
        main(["--config", str(config), "--model", str(model)])
    assert not ended.value.code
    first, second = capsys.readouterr().out.split(str(files[1]))
    assert "ask: query 0" in first
    assert "+ '<s>find: " in first
    assert "row's: q" in second
    assert "'<s>b: " in second
    assert "+ '<s>w1 " in second
    assert "passage    tokens" in first
    assert "0.0% reach the maximal length of 20" in first
    assert "50.0% reach the maximal length of 20" in second
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "--config FILE.yaml" in capsys.readouterr().err


def test_the_inspector_lists_problems_by_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [GOOD, "x", GOOD, '{"query": "q"}'])
    done = subprocess.run(
        [sys.executable, "-m", "megatron_embed.recipes.data", str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "RANK": "0"},
    )
    assert done.returncode == 1
    assert "line 2: not JSON" in done.stdout
    assert "line 4: no 'positive'" in done.stdout
    assert done.stderr.startswith(f"error: {path}: 2 rows cannot be used, the first on line 2: not JSON: ")
    assert done.stderr.count("\n") == 1
