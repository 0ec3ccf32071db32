"""A corpus from the hub: encoded, resumed and mined like a file with the same rows, in this run and the next."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from support.mining import read, run

from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes import Encoder
from megatron_embed.recipes.datasets.corpus import Corpus
from megatron_embed.recipes.encode import main as encode_main
from megatron_embed.recipes.retrieval import encode_corpus
from megatron_embed.recipes.retrieval.vectors import VectorFolder

pytestmark = pytest.mark.usefixtures("small_parts")

HUB = "hf://org/name"
Publish = Callable[[list[dict[str, Any]]], None]


@pytest.fixture(params=["in memory", "on disk"])
def publish(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Lets ``load_dataset`` find rows, each call anew, as each run of a program does."""
    versions = iter(range(10))

    def publish(rows: list[dict[str, Any]]) -> None:
        stored = tmp_path / "hub" / str(next(versions))
        datasets.disable_progress_bars()
        datasets.Dataset.from_list(rows).save_to_disk(stored)

        def load(*_: Any, **__: Any) -> Any:
            if request.param == "on disk":
                return datasets.load_from_disk(str(stored))
            return datasets.Dataset.from_list(rows)

        assert bool(load().cache_files) == (request.param == "on disk")
        monkeypatch.setattr(datasets, "load_dataset", load)

    return publish


def vectors_of(folder: Path) -> tuple[list[str], list[list[float]]]:
    parts = list(VectorFolder(folder))
    return [id_ for ids, _ in parts for id_ in ids], [row for _, rows in parts for row in rows.tolist()]


def test_encode_takes_the_hub_and_resumes(
    publish: Publish, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def encode(source: str, output: str) -> int:
        arguments = ["--model", str(folder / "model"), "--device", "cpu", "--input", source]
        with pytest.raises(SystemExit) as ended:
            encode_main([*arguments, "--output", str(tmp_path / output)])
        return int(ended.value.code or 0)

    rows = read(folder / "corpus.jsonl")
    publish(rows)
    assert encode(HUB, "hub-vectors") == encode(str(folder / "corpus.jsonl"), "file-vectors") == 0
    assert vectors_of(tmp_path / "hub-vectors") == vectors_of(tmp_path / "file-vectors")
    with monkeypatch.context() as patch:
        patch.setattr(encode_corpus, "encode_here", None)  # a second run encodes nothing
        assert encode(HUB, "hub-vectors") == 0
    for changed in ({"text": "other"}, {"_id": "other"}):
        publish([*rows[:-1], {**rows[-1], **changed}])
        assert encode(HUB, "hub-vectors") == 1
        assert "vectors of another model, input or setting: input_sha256" in capsys.readouterr().err


def test_mine_takes_the_hub_and_encodes_it_once(
    publish: Publish, encoder: Encoder, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(read(folder / "corpus.jsonl"))
    run(encoder, folder, tmp_path / "file.jsonl")
    run(encoder, folder, tmp_path / "hub.jsonl", corpus=HUB, cache=tmp_path / "vectors")
    assert read(tmp_path / "hub.jsonl") == read(tmp_path / "file.jsonl")
    monkeypatch.setattr(encode_corpus, "encode_here", None)
    run(encoder, folder, tmp_path / "again.jsonl", corpus=HUB, cache=tmp_path / "vectors")
    assert read(tmp_path / "again.jsonl") == read(tmp_path / "file.jsonl")


def test_the_digest_knows_title_from_text(publish: Publish) -> None:
    """The text alone tells mining known positives."""
    found = []
    for title, text in (("a", "b"), ("", "a b"), ("a", "b")):
        publish([{"_id": "1", "title": title, "text": text}])
        found.append(Corpus(HUB).digest())
    assert found[0] == found[2] != found[1]


def test_damage_in_the_cache_of_the_hub_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a" * length for length in range(3, 40)]
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"_id": list(map(str, range(37))), "text": texts}).save_to_disk(tmp_path / "stored")
    (file,) = (tmp_path / "stored").glob("*.arrow")
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int32)
    damaged = offsets.copy()
    damaged[5] = -1
    content = file.read_bytes()
    assert content.count(offsets.tobytes()) == 1
    file.write_bytes(content.replace(offsets.tobytes(), damaged.tobytes()))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.load_from_disk(str(tmp_path / "stored")))
    with pytest.raises(UserError, match=r"hf://org/name: damaged in .*\.arrow \(.*offset.*\); remove it there"):
        Corpus(HUB).text(0)


def test_what_the_hub_says_is_told_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise ValueError("no config\nAvailable configs:\n\t['one']")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        UserError,
        match=r"\(ValueError: no config Available configs: \['one'\]\); check its name and the network$",
    ):
        Corpus(HUB)


def test_rows_of_the_hub_that_cannot_be_used_are_named(
    publish: Publish, encoder: Encoder, folder: Path, tmp_path: Path
) -> None:
    publish([{"_id": 1.5, "text": "a"}])
    with pytest.raises(UserError, match=r"hf://org/name, line 1: '_id': found 1.5; wanted text or a whole number"):
        run(encoder, folder, tmp_path / "out.jsonl", corpus=HUB, cache=tmp_path / "vectors")
