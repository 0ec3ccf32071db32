"""What cannot be used is named with its file and line by every command that reads it, in one message."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import save_model

from megatron_embed.recipes import data, encode, evaluate, mine
from megatron_embed.recipes.train import main as train_main

pytestmark = pytest.mark.slow

PAIR = '{"query": "q", "positive": "p"}\n'
DOCUMENT = '{"_id": "a", "text": "one"}\n'


def parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def parquet_in_latin_1(**columns: list[bytes]) -> bytes:
    """Whoever writes Parquet is free to call any bytes text."""
    import pyarrow
    import pyarrow.parquet

    def text(values: list[bytes]) -> Any:
        array = pyarrow.array(values, pyarrow.binary())
        return pyarrow.StringArray.from_buffers(len(array), *array.buffers()[1:])

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({name: text(values) for name, values in columns.items()}), file)
    return file.getvalue()


def parquet_of_a_map() -> bytes:
    import pyarrow
    import pyarrow.parquet

    columns = {"query": ["q"], "positive": ["p"], "m": pyarrow.array([[("k", 1)]], pyarrow.map_("string", "int32"))}
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def damaged(whole: bytes) -> bytes:
    """With its end, where a Parquet file says what it holds, but not the beginning."""
    return whole[:4] + b"\xff" * 200 + whole[204:]


#: bytes of a file of pairs → what is said of it, behind its name
PAIRS: dict[str, tuple[bytes, str]] = {
    "of two forms": (
        (PAIR + '{"anchor": "q", "positive": "p"}').encode(),
        ", line 2: a row of another form: sentence-",
    ),
    "of JSON and plain lines": ((PAIR + "plain").encode(), ", line 2: not JSON: Expecting value at column 1: 'plain'"),
    "in Latin-1": (
        (PAIR + '{"query": "é"}').encode("latin-1"),
        ", line 2: not UTF-8: byte 0xe9 at byte 12 of the line",
    ),
    "in UTF-16": (PAIR.encode("utf-16"), ": found UTF-16 text; wanted UTF-8 text (JSON lines, a JSON list) or Parquet"),
    "with a BOM inside": (PAIR.encode() + b"\xef\xbb\xbf" + PAIR.encode(), ", line 2: not JSON: Unexpected UTF-8 BOM"),
    "with a bare NUL": ((PAIR + '{"query": "a\0"}').encode(), ", line 2: not JSON: Invalid control character at colu"),
    "cut short": ((PAIR + PAIR[:-3]).encode(), ", line 2: not JSON: Unterminated string starting at column 28"),
    "of another type": (
        (PAIR + '{"query": 5, "positive": "p"}').encode(),
        ", line 2: 'query': found the number 5; want",
    ),
    "Parquet cut short": (
        parquet([{"query": "q", "positive": "p"}])[:-9],
        ": not a readable Parquet file (Parquet magic",
    ),
    "Parquet damaged": (
        damaged(parquet([{"query": "q", "positive": "p"}] * 999)),
        ": not a readable Parquet file (Couldn",
    ),
    "Parquet of another type": (
        parquet([{"query": b"q", "positive": "p"}]),
        ", line 1: 'query': found bytes; wanted text",
    ),
    "Parquet in Latin-1": (
        parquet_in_latin_1(query=[b"a", b"b\xe9"], positive=[b"p", b"p"]),
        ", line 2: not UTF-8: byte 0xe9 in a column of text",
    ),
    "without rows": (b"\n \t\r\n", ": holds no rows; wanted training pairs"),
    "of vectors that are none": (
        PAIR.replace("}", ', "query_embedding": [1], "positive_embedding": [1], "negative_embeddings": 5}').encode(),
        ", line 1: 'negative_embeddings': found the number 5; wanted a list of vectors",
    ),
    "Parquet of a type that datasets has not": (
        parquet_of_a_map(),
        ": not a readable Parquet file (Arrow type map<string, int32",
    ),
}
CORPORA: dict[str, tuple[bytes, str]] = {
    "of JSON and plain lines": ((DOCUMENT + "plain").encode(), ", line 2: not JSON: Expecting value at column 1: 'pla"),
    "of documents and pairs": (
        (DOCUMENT + PAIR).encode(),
        ", line 2: found query, positive; wanted an object with _id, ",
    ),
    "in Latin-1": (
        (DOCUMENT + '{"_id": "é"}').encode("latin-1"),
        ", line 2: not UTF-8: byte 0xe9 at byte 10 of the line",
    ),
    "in UTF-16": (DOCUMENT.encode("utf-16"), ": found UTF-16 text; wanted UTF-8 text (JSON lines, a JSON list) or Par"),
    "with a bare NUL": ((DOCUMENT + '{"_id": "b\0"}').encode(), ", line 2: not JSON: Invalid control character at col"),
    "with an id twice": ((DOCUMENT * 2).encode(), ", line 2: _id 'a' stands in the file twice"),
    "with an id of another type": ((DOCUMENT + '{"_id": null, "text": ""}').encode(), ", line 2: '_id': found null; "),
    "of another type": (
        (DOCUMENT + '{"_id": "b", "text": 5}').encode(),
        ", line 2: 'text': found the number 5; wanted",
    ),
    "with a title of another type": (
        (DOCUMENT + '{"_id": "b", "text": "", "title": 5}').encode(),
        ", line 2: 'title': found the number 5; wanted text",
    ),
}
#: what a BEIR folder cannot be
TABLES: dict[str, tuple[bytes, str]] = {
    "Parquet in Latin-1": (
        parquet_in_latin_1(_id=[b"a", b"b"], text=[b"a", b"b\xe9"]),
        ", line 2: not UTF-8: byte 0xe9 in a column of text",
    ),
    "Parquet cut short": (
        parquet([{"_id": "a", "text": "p"}])[:-9],
        ": not a readable Parquet file (Parquet magic byt",
    ),
    "Parquet of another type": (
        parquet([{"_id": "a", "text": 5}]),
        ", line 1: 'text': found the number 5; wanted text",
    ),
}
QRELS: dict[str, tuple[bytes, str]] = {
    "in Latin-1": ("q\ta\t1\né\ta\t1\n".encode("latin-1"), ", line 2: not UTF-8: byte 0xe9 at byte 1 of the line; wan"),
    "with another number in its first line": (b"q\ta\t1.0\nq\ta\t1\n", ", line 1: found 'q\\ta\\t1.0'; wanted q"),
    "with spaces in its first line": (b"q a 1\nq\ta\t1\n", ", line 1: found 'q a 1'; wanted query-id, corpus-id, sco"),
    "with spaces": (b"q\ta\t1\nq a 1\n", ", line 2: found 'q a 1'; wanted query-id, corpus-id, score between tabs"),
    "of queries that are not there": (b"q\ta\t1\nr\ta\t1\n", ", line 2: "),
    "of no documents that are there": (b"q\tb\t1\n", ""),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def beir(tmp_path: Path) -> Path:
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text(DOCUMENT)
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "what?"}\n')
    for split in ("test", "train"):
        (folder / "qrels" / f"{split}.tsv").write_text("q\ta\t1\n")
    return folder


class Commands:
    """The command lines, each for one thing that it reads."""

    def __init__(self, model: Path, tmp_path: Path) -> None:
        self._model, self.out = ["--model", model, "--device", "cpu"], tmp_path / "out"
        self._tmp_path = tmp_path

    def data(self, path: Path) -> list[Any]:
        return [data.main, path]

    def train(self, path: Path, key: str = "data.train") -> list[Any]:
        sources = {"data.train": self._pairs(), key: path}
        settings = [f"{name}={value}" for name, value in sources.items()]
        parallel = [f"model.{name}_model_parallel_size=1" for name in ("tensor", "pipeline")]
        out = f"train.save_dir={self.out}"
        return [
            train_main,
            "ministral3_tiny_embed_config",
            f"model.hf_model={self._model[1]}",
            out,
            *settings,
            *parallel,
        ]

    def eval_in_training(self, path: Path) -> list[Any]:
        return self.train(path, "data.eval")

    def mine_data(self, path: Path) -> list[Any]:
        (self._tmp_path / "c.jsonl").write_text(DOCUMENT)
        return [mine.main, *self._model, "--data", path, "--corpus", self._tmp_path / "c.jsonl", "--output", self.out]

    def mine_corpus(self, path: Path) -> list[Any]:
        return [mine.main, *self._model, "--data", self._pairs(), "--corpus", path, "--output", self.out]

    def encode(self, path: Path) -> list[Any]:
        return [encode.main, *self._model, "--input", path, "--output", self.out]

    def evaluate(self, path: Path) -> list[Any]:
        return [evaluate.main, *self._model, "--data", path, "--output", self.out]

    def _pairs(self) -> Path:
        path = self._tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps({"query": f"q{i}", "positive": f"p{i}"}) + "\n" for i in range(64)))
        return path

    def refused(self, command: Callable[[Path], list[Any]], given: Path, capsys: pytest.CaptureFixture[str]) -> str:
        """The one message with which a command ends; nothing is left behind."""
        main, *arguments = command(given)
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        err = capsys.readouterr().err
        assert ended.value.code == 1, err
        assert err.startswith("error: "), err
        assert err.count("\n") == 1
        assert not self.out.exists()
        return err


@pytest.fixture
def commands(model: Path, tmp_path: Path) -> Commands:
    return Commands(model, tmp_path)


@pytest.mark.parametrize("damage", PAIRS)
def test_pairs(damage: str, commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = PAIRS[damage]
    path = tmp_path / "bad"
    path.write_bytes(content)
    for command in (commands.train, commands.mine_data):
        assert f"{path}{message}" in commands.refused(command, path, capsys)
    err = commands.refused(commands.data, path, capsys)
    assert f"error: {path}" in err
    assert message.removeprefix(",") in err


@pytest.mark.parametrize("damage", [*CORPORA, *TABLES])
def test_a_corpus(
    damage: str, commands: Commands, beir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, message = {**CORPORA, **TABLES}[damage]
    path = tmp_path / "bad"
    path.write_bytes(content)
    for command in (commands.encode, commands.mine_corpus):
        assert f"{path}{message}" in commands.refused(command, path, capsys)
    if damage in TABLES:
        return
    for name in ("corpus.jsonl", "queries.jsonl"):
        before = (beir / name).read_bytes()
        (beir / name).write_bytes(content)
        for command in (commands.evaluate, commands.train, commands.eval_in_training, commands.data):
            assert f"{beir / name}{message}" in commands.refused(command, beir, capsys)
        (beir / name).write_bytes(before)


@pytest.mark.parametrize("damage", QRELS)
def test_judgements(damage: str, commands: Commands, beir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, message = QRELS[damage]
    for split in ("test", "train"):
        (beir / "qrels" / f"{split}.tsv").write_bytes(content)
    for command, split in ((commands.evaluate, "test"), (commands.train, "train"), (commands.data, "train")):
        assert f"error: {beir}/qrels/{split}.tsv{message}" in commands.refused(command, beir, capsys)


def test_a_bom_at_the_beginning_is_no_damage(
    commands: Commands, beir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in [*beir.glob("*.jsonl"), *beir.glob("qrels/*.tsv")]:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    for command in (commands.data, commands.encode, commands.mine_corpus, commands.mine_data, commands.evaluate):
        commands.out = tmp_path / command.__name__ / "out"
        main, *arguments = command(beir)
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in (*arguments, "--strict")])
        assert not ended.value.code, capsys.readouterr().err


def test_a_line_of_text_may_begin_with_a_bracket(tmp_path: Path) -> None:
    """Control-token text is text on the first line, too."""
    from megatron_embed.recipes.datasets.corpus import Corpus

    (tmp_path / "a.txt").write_text("[INST] one\ntwo\n")
    assert Corpus(tmp_path / "a.txt").read(0, 2) == (["1", "2"], ["[INST] one", "two"])
    (tmp_path / "a.json").write_text(json.dumps([{"_id": "x", "text": "one"}], indent=1))
    assert Corpus(tmp_path / "a.json").read(0, 1) == (["x"], ["one"])
