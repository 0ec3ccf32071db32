"""Every form of training data: the same ten examples in each are the same examples, and damage is named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.places import ROOT
from support.runs import read_metrics, recipe
from support.tiny_models import save_model, save_vlm

from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes import train
from megatron_embed.recipes.config.schema import DataSource
from megatron_embed.recipes.data import main
from megatron_embed.recipes.datasets.inspection import look_through
from megatron_embed.recipes.datasets.pairs import PairDataset
from megatron_embed.recipes.training.rank_batch import BatchBuilder, RankBatch

#: (query, positives, negatives)
ROWS = [(f"query {i} “ü”", [f"title {i} passage {i}"], [f"wrong {i}.{j}" for j in range(i % 3)]) for i in range(10)]


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def documents() -> dict[str, str]:
    """Text → id."""
    texts = [text for _, positives, negatives in ROWS for text in (*positives, *negatives)]
    return {text: f"d{number}" for number, text in enumerate(texts)}


def parquet(path: Path, rows: list[Any]) -> Path:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def tevatron_v2(folder: Path) -> Path:
    ids = documents()
    lines(folder / "corpus.jsonl", [{"docid": id_, "text": text} for text, id_ in ids.items()])
    rows = [
        {
            "query_id": str(n),
            "query_text": query,
            "positive_document_ids": [ids[text] for text in positives],
            "negative_document_ids": [ids[text] for text in negatives],
        }
        for n, (query, positives, negatives) in enumerate(ROWS)
    ]
    return lines(folder / "train.jsonl", rows)


def tevatron_v2_parquet_corpus(folder: Path) -> Path:
    path = tevatron_v2(folder)
    (folder / "corpus").mkdir()
    rows = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]
    parquet(folder / "corpus" / "part-0.parquet", rows[:7])
    parquet(folder / "corpus" / "part-1.parquet", rows[7:])
    (folder / "corpus.jsonl").unlink()
    return path


def tevatron_legacy(folder: Path) -> Path:
    def passage(text: str) -> dict[str, str]:
        title, _, rest = text.rpartition(" passage")
        return {"docid": "0", "title": title, "text": f"passage{rest}" if title else text}

    rows = [
        {
            "query_id": "1",
            "query": query,
            "positive_passages": [passage(text) for text in positives],
            "negative_passages": [passage(text) for text in negatives],
        }
        for query, positives, negatives in ROWS
    ]
    return lines(folder / "train.jsonl", rows)


def flag_embedding(folder: Path) -> Path:
    return lines(folder / "train.jsonl", [{"query": q, "pos": p, "neg": n, "type": "normal"} for q, p, n in ROWS])


def columns(folder: Path) -> Path:
    rows = [
        {"anchor": q, "positive": p[0], "negative_1": (n or [None])[0], "negative_2": n[1] if len(n) > 1 else None}
        for q, p, n in ROWS
    ]
    return parquet(folder / "train.parquet", rows)


def own_with_negative_columns(folder: Path) -> Path:
    rows = [
        {"query": q, "positive": p[0], **{f"negative_{10 - 3 * j}": n[-1 - j] for j in range(len(n))}}
        for q, p, n in ROWS
    ]
    return lines(folder / "train.jsonl", rows)


def automodel_inline(folder: Path) -> Path:
    rows = [{("query", "question")[i % 2]: q, "pos_doc": p[0], "neg_doc": n} for i, (q, p, n) in enumerate(ROWS)]
    return lines(folder / "train.jsonl", rows)


def automodel_corpus(folder: Path, indent: int | None = 2) -> Path:
    ids = documents()
    data = [
        {
            "question_id": str(number),
            "question": query,
            "corpus_id": ("even", "odd")[number % 2],
            "pos_doc": [{"id": ids[text]} for text in positives],
            "neg_doc": [{"id": ids[text]} for text in negatives],
        }
        for number, (query, positives, negatives) in enumerate(ROWS)
    ]
    for name in ("even", "odd"):
        (folder / name).mkdir()
        (folder / name / "merlin_metadata.json").write_text(json.dumps({"corpus_id": name, "class": "TextQADataset"}))
        # under the other's ids stand other texts: whoever mixes the corpora up, shows
        parity = ("even", "odd").index(name)
        own = {ids[t] for n, (_, p, negatives) in enumerate(ROWS) if n % 2 == parity for t in (*p, *negatives)}
        rows = [{"id": id_, "text": text if id_ in own else "other"} for text, id_ in ids.items()]
        parquet(folder / name / "train.parquet", rows)
    path = folder / "train.json"
    path.write_text(json.dumps({"corpus": [{"path": "./even/"}, {"path": "odd"}], "data": data}, indent=indent))
    return path


def automodel_corpus_on_one_line(folder: Path) -> Path:
    return automodel_corpus(folder, indent=None)


FORMS: dict[Callable[[Path], Path], str] = {
    tevatron_v2: "Tevatron, documents by id",
    tevatron_v2_parquet_corpus: "Tevatron, documents by id",
    tevatron_legacy: "Tevatron, passages in the rows",
    flag_embedding: "FlagEmbedding",
    columns: "sentence-transformers columns",
    own_with_negative_columns: "query, positive, negatives",
    automodel_inline: "AutoModel",
    automodel_corpus: "AutoModel",
    automodel_corpus_on_one_line: "AutoModel",
}


@pytest.mark.parametrize("write", FORMS, ids=lambda write: write.__name__)
def test_every_form_gives_the_same_examples(write: Callable[[Path], Path], tmp_path: Path) -> None:
    path = write(tmp_path)
    data = PairDataset([DataSource(path=str(path), query_prompt="q: ")])
    assert [(e.query, e.positives, e.negatives) for e in (data[i] for i in range(len(data)))] == ROWS
    texts = path.read_bytes().split(b"\n")
    begins = {
        automodel_corpus: [line for line, text in enumerate(texts, start=1) if text == b"    {" and line > 9],
        automodel_corpus_on_one_line: [1] * 10,
    }
    assert [(e.positive, e.line, e.query_prompt) for e in (data[i] for i in range(len(data)))] == [
        (positives[0], line, "q: ")
        for line, (_, positives, _) in zip(begins.get(write, range(1, 11)), ROWS, strict=True)
    ]
    found = look_through(str(path))
    assert found.form.endswith(FORMS[write])
    assert not found.problems


def own(path: Path) -> Path:
    return lines(path, [{"query": q, "positive": p, "negatives": n} for q, p, n in ROWS])


def own_array(folder: Path) -> Path:
    path = folder / "train.json"
    path.write_text(json.dumps([{"query": q, "positive": p, "negatives": n} for q, p, n in ROWS], indent=1))
    return path


def beir(folder: Path) -> Path:
    """A BEIR folder has no negatives."""
    ids = documents()
    rows = [{"_id": id_, "text": text} for text, id_ in ids.items()]
    for row in rows[::2]:
        row["title"], row["text"] = row["text"].split(" ", 1)
    lines(folder / "corpus.jsonl", rows[::-1])
    lines(folder / "queries.jsonl", [{"_id": f"q{n}", "text": query} for n, (query, _, _) in enumerate(ROWS)][::-1])
    (folder / "qrels").mkdir()
    judged = [f"q{n}\t{ids[text]}\t1" for n, (_, positives, _) in enumerate(ROWS) for text in positives]
    lines(folder / "qrels" / "train.tsv", ["query-id\tcorpus-id\tscore", *judged])
    return folder


@pytest.fixture
def batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Trains two steps of five queries: of each its token ids, the identities of its texts, loss and gradient norm."""
    save_vlm(tmp_path / "model")
    build = BatchBuilder.build
    built: list[Any] = []

    def recorded(builder: BatchBuilder, step: int) -> RankBatch:
        batch = build(builder, step)
        ids = [getattr(batch.targets, name) for name in ("valid", "query_ids", "passage_ids", "known_ids")]
        built.append([batch.sequences, [values if values is None else values.tolist() for values in ids]])
        return batch

    monkeypatch.setattr(BatchBuilder, "build", recorded)

    def run(name: str, path: str | Path, *settings: str) -> list[Any]:
        built.clear()
        common = ["train.train_iters=2", "train.global_batch_size=5", f"data.train={path}", "device=cpu"]
        train(recipe(tmp_path, f"run-{name}", *common, *settings))
        steps = read_metrics(tmp_path / f"run-{name}")
        assert len(built) == len(steps) == 2
        return [[*batch, step["loss"], step["grad_norm"]] for batch, step in zip(built, steps, strict=True)]

    return run


@pytest.mark.slow
def test_every_form_gives_the_same_batches_and_losses(
    batches: Callable[..., list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the file to the loss, beside this project's own."""
    import datasets

    hub = datasets.Dataset.from_parquet(str(columns(tmp_path)))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: hub)
    paths: dict[str, str | Path] = {"hub": "hf://org/name"}
    for write in (*FORMS, own_array):
        (tmp_path / write.__name__).mkdir()
        paths[write.__name__] = write(tmp_path / write.__name__)
    wanted = batches("own", own(tmp_path / "own.jsonl"))
    assert {name: batches(name, path) for name, path in paths.items()} == dict.fromkeys(paths, wanted)
    (tmp_path / "beir").mkdir()
    without = batches("without", tmp_path / "own.jsonl", "data.negatives_per_query=0")
    assert batches("beir", beir(tmp_path / "beir")) == without != wanted


def test_flag_embedding_scores_and_prompt(tmp_path: Path) -> None:
    row = {"query": "q", "pos": ["a", "b"], "neg": ["c"], "pos_scores": [0.9, 0.8], "neg_scores": [0.1], "prompt": "Q:"}
    plain = {**row, "prompt": ""}
    data = PairDataset([DataSource(path=str(lines(tmp_path / "a.jsonl", [row, plain])), query_prompt="q: ")])
    assert [(e.positive, e.teacher.scores, e.query_prompt) for e in (data[i] for i in range(4))] == [
        ("a", [0.9, 0.1], "Q:"),
        ("b", [0.8, 0.1], "Q:"),
        ("a", [0.9, 0.1], "q: "),
        ("b", [0.8, 0.1], "q: "),
    ]
    assert data.sources[0].no_scores < 0


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            {"query": "q", "pos": ["p"]},
            {"anchor": "q", "positive": "p"},
            r"another form: sentence-transformers columns",
        ),
        (
            {"query": "q", "pos": ["p"]},
            {"query": "q"},
            r"no 'pos'; found keys: query; wanted an object with query, pos and, optiona",
        ),
        ({"query": "q", "pos": ["p"]}, {"query": "q", "pos": [""]}, r"'pos' holds an empty text"),
        ({"query": "q", "pos": ["p"]}, {"query": "q", "pos": []}, r"'pos' is empty; every query needs one"),
        ({"query": "q", "pos": ["p"]}, {"query": "q", "pos": ["p"], "prompt": 5}, r"'prompt': found the number 5"),
        (
            {"query": "q", "pos": ["p"]},
            {"query": "q", "pos": ["p"], "neg": ["n"], "pos_scores": [1.0]},
            r"'pos_scores, neg_scores': found 1; wanted 2, one for the positive and each negative",
        ),
        (
            {"query": "q", "pos": ["p"]},
            {"query": "q", "pos": ["p"], "neg": ["n"], "neg_scores": [1.0]},
            r"'neg_scores' without 'pos_scores'",
        ),
        (
            {"question": "q", "pos_doc": "p"},
            {"pos_doc": "p"},
            r"no 'question'; found keys: pos_doc; wanted an object with question",
        ),
        ({"question": "q", "pos_doc": "p"}, {"question": "q", "pos_doc": {"id": "d"}}, r"'pos_doc': found an object w"),
        (
            {"question": "q", "pos_doc": "p"},
            {"question": "q", "pos_doc": [{"id": "d"}], "corpus_id": "c"},
            r"'corpus_id': found 'c'; known: none: the file is no object with 'corpus' and 'data'",
        ),
        (
            {"query": "q", "positive_passages": [{"text": "p"}]},
            {"query": "q", "positive_passages": [{"docid": "p"}]},
            r"'positive_passages': found an object without text",
        ),
        (
            {"query": "q", "positive": "p"},
            {"query": "q", "positive": "p", "negative": "n", "negatives": ["m"]},
            r"both 'negatives' and 'negative'",
        ),
    ],
)
def test_rows_that_do_not_fit_are_named(first: Any, second: Any, message: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "bad.jsonl", [first, second, first])
    with pytest.raises(UserError, match=rf"bad.jsonl, line 2: .*{message}"):
        PairDataset([DataSource(path=str(path))])
    assert [problem[:7] for problem in look_through(str(path)).problems] == ["line 2:"]


def test_documents_that_are_not_there_are_named(tmp_path: Path) -> None:
    path = tevatron_v2(tmp_path)
    row = {"query_text": "q", "positive_document_ids": ["d99"]}
    path.write_text(path.read_text() + json.dumps(row))
    with pytest.raises(UserError, match=r"train.jsonl, line 11: document 'd99' is not in .*corpus.jsonl"):
        PairDataset([DataSource(path=str(path))])
    with (tmp_path / "corpus.jsonl").open("a") as file:
        file.write('{"docid": "d3", "text": "again"}\n')
    with pytest.raises(UserError, match=r"corpus.jsonl, line 20: _id 'd3' stands in the file twice"):
        PairDataset([DataSource(path=str(path))])
    (tmp_path / "corpus.jsonl").unlink()
    with pytest.raises(UserError, match=r"train.jsonl: its rows name documents by id; wanted corpus.jsonl"):
        PairDataset([DataSource(path=str(path))])


def test_a_damaged_automodel_folder_is_named(tmp_path: Path) -> None:
    path = automodel_corpus(tmp_path)
    value = json.loads(path.read_text())
    value["data"][4]["corpus_id"] = "none"
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match=r"train.json, line 1, entry 5: 'corpus_id': found 'none'; known: even, odd"):
        PairDataset([DataSource(path=str(path))])
    file = tmp_path / "odd" / "train.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[:-30])
    with pytest.raises(UserError, match=r"odd/train.parquet: not a readable Parquet file"):
        PairDataset([DataSource(path=str(path))])
    file.unlink()
    with pytest.raises(UserError, match=r"odd: no \*.parquet or \*.jsonl"):
        PairDataset([DataSource(path=str(path))])
    (tmp_path / "odd" / "merlin_metadata.json").unlink()
    with pytest.raises(UserError, match=r"odd/merlin_metadata.json: no such file; wanted a corpus folder"):
        PairDataset([DataSource(path=str(path))])
    path.write_text('{"corpus": 5, "data": []}')
    with pytest.raises(UserError, match=r"train.json: holds no rows; wanted training pairs"):
        PairDataset([DataSource(path=str(path))])
    path.write_text('{"data": [{"question": "q", "pos_doc": []}]}')
    with pytest.raises(UserError, match=r"train.json: 'corpus': found null; wanted .*FOLDER"):
        PairDataset([DataSource(path=str(path))])
    path.write_text('{"data": [\n')
    with pytest.raises(UserError, match=r"train.json, line 2: not JSON"):
        PairDataset([DataSource(path=str(path))])


def test_two_corpus_folders_of_one_id_are_refused(tmp_path: Path) -> None:
    """The documents of one would stand for the other's."""
    path = automodel_corpus(tmp_path)
    (tmp_path / "odd" / "merlin_metadata.json").write_text('{"corpus_id": "even"}')
    both = f"{tmp_path}/even and {tmp_path}/odd both have corpus_id 'even'; rename one"
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: 'corpus': {re.escape(both)}$"):
        PairDataset([DataSource(path=str(path))])


def test_the_inspector_remarks_on_nuls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = lines(tmp_path / "a.jsonl", [{"query": "q\0", "positive": "p"}, {"query": "r", "positive": "\ufffd"}])
    for arguments, status in (([], 0), (["--strict"], 1)):
        with pytest.raises(SystemExit) as ended:
            main([str(path), *arguments])
        assert int(ended.value.code or 0) == status
        out, err = capsys.readouterr()
        assert "remarks    1 rows hold NUL characters, first line 1" in out
        assert "remarks    1 rows hold U+FFFD, what a wrong encoding leaves, first line 2" in out
    nul, damaged = (
        "1 rows hold NUL characters, first line 1",
        "1 rows hold U+FFFD, what a wrong encoding leaves, first line 2",
    )
    assert err == f"error: {path}: {nul}; {path}: {damaged}\n"


def test_samples_are_what_the_model_will_see(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "list " * 1000
    path = lines(tmp_path / "a.jsonl", [{"query": "what </s>?", "pos": [long], "neg": ["no"], "prompt": "Q: "}])
    save_model(tmp_path / "model", num_hidden_layers=1)
    for arguments in ([], ["--model", str(tmp_path / "model")]):
        with pytest.raises(SystemExit) as ended:
            main([str(path), *arguments])
        assert not ended.value.code
    plain, tokens = capsys.readouterr().out.split(f"{path}\n")[1:]
    assert "sample     'Q: what </s>?'\n" in plain
    assert "             + 'passage: list list" in plain
    assert re.search(r"sample     '<s>Q: what </s>\?</s>', \d+ tokens\n", tokens)
    assert re.search(r"             \+ '<s>passage: list .* list list</s>', 512 tokens\n", tokens)
    assert re.search(r"             - '<s>passage: no</s>', \d tokens\n", tokens)


def test_the_examples_of_the_documentation(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    blocks = [block.split("```")[0].strip() for block in text.split("```json\n")[1:]]
    lines(tmp_path / "corpus.jsonl", [{"docid": "d3", "text": "It was …"}, {"docid": "d7", "text": "no"}])
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "merlin_metadata.json").write_text('{"corpus_id": "books", "class": "TextQADataset"}')
    lines(tmp_path / "books" / "part.jsonl", [{"id": "d3", "text": "It was …"}, {"id": "d7", "text": "no"}])
    seen = set()
    for block in blocks:
        path = tmp_path / "train"
        path.write_text(block)
        data = PairDataset([DataSource(path=str(path))])
        assert all(data[i].query == "who wrote it?" and data[i].positive for i in range(len(data)))
        seen.add(data.sources[0].form)
    assert seen == {*FORMS.values()}
    (block,) = [block.split("```")[0] for block in text.split("```text\n")[1:]]
    for name, *rows in (part.splitlines() for part in block.split("# ")[1:]):
        (tmp_path / "beir" / name).parent.mkdir(parents=True, exist_ok=True)
        lines(tmp_path / "beir" / name, rows)
    data = PairDataset([DataSource(path=str(tmp_path / "beir"))])
    assert [(data[i].query, data[i].positives) for i in range(len(data))] == [
        ("who wrote it?", ["A book It was written by …"])
    ]
