"""Encoding a corpus: whatever stops it, the folder ends up as if nothing had; the numbers are the library call's."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.full_disk import files_of_at_most
from support.tiny_models import save_model

from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes import Encoder, encode
from megatron_embed.recipes.datasets.corpus import Corpus
from megatron_embed.recipes.datasets.odd_rows import NO_TEXT
from megatron_embed.recipes.retrieval import encode_corpus, vectors
from megatron_embed.recipes.retrieval.encode_corpus import encode_texts
from megatron_embed.recipes.retrieval.vectors import MANIFEST, Manifest, VectorFolder, plan_shards, quantize

ROWS = [
    {
        "_id": f"d{i}",
        "title": f"title {i}" if i % 2 else "",
        "text": " ".join(f"w{i * j % 97}" for j in range(i % 17 + 1)),
    }
    for i in range(60)
]
TEXTS = [f"{row['title']} {row['text']}".strip() for row in ROWS]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Encoder]:
    with Encoder.from_pretrained(save_model(tmp_path_factory.mktemp("model")), device="cpu", max_tokens=128) as encoder:
        yield encoder


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus(write_corpus(tmp_path / "corpus.jsonl"))


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_corpus, "plan_shards", lambda rows, _: plan_shards(rows, 8))


def write_corpus(path: Path, rows: Any = ROWS) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_all(folder: VectorFolder) -> tuple[list[str], np.ndarray]:
    parts = list(folder)
    return [id_ for ids, _ in parts for id_ in ids], np.concatenate([rows for _, rows in parts])


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_vectors_and_ids_in_the_order_of_the_input(encoder: Encoder, corpus: Corpus, tmp_path: Path) -> None:
    found = encode_texts(encoder, corpus, tmp_path / "out")
    ids, rows = read_all(found)
    assert ids == [row["_id"] for row in ROWS]
    assert len(found.manifest.shards) == 8
    np.testing.assert_allclose(rows, encoder.encode(TEXTS, kind="passage"), atol=2e-6)
    np.testing.assert_array_equal(found.rows(5, 23), rows[5:23])
    value = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert (value["complete"], value["rows"], value["dim"], value["dtype"]) == (True, 60, 48, "float32")
    assert [shard["first"] for shard in value["shards"]] == [60 * i // 8 for i in range(8)]


@pytest.mark.parametrize("stop", range(1, 25, 3))
def test_stopped_anywhere_and_resumed_equals_undisturbed(
    stop: int, encoder: Encoder, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_texts(encoder, corpus, tmp_path / "whole", precision="int8")
    count, fsync = 0, os.fsync

    def dying(file: int) -> None:
        nonlocal count
        count += 1
        if count == stop:
            raise KeyboardInterrupt
        fsync(file)

    monkeypatch.setattr(os, "fsync", dying)  # what would be left to do after the moment never comes
    with pytest.raises(KeyboardInterrupt):
        encode_texts(encoder, corpus, tmp_path / "out", precision="int8")
    encode_texts(encoder, corpus, tmp_path / "out", precision="int8")
    whole, resumed = files_of(tmp_path / "whole"), files_of(tmp_path / "out")
    assert resumed == whole


def test_what_is_whole_is_not_encoded_again_and_what_is_cut_short_is(
    encoder: Encoder, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_texts(encoder, corpus, tmp_path / "out")
    whole = files_of(tmp_path / "out")
    damaged = tmp_path / "out" / "vectors-00003.npy"
    damaged.write_bytes(damaged.read_bytes()[:-5])
    encoded: list[int] = []
    here = encode_corpus.encode_here

    def counted(stages: Any, plan: Any, sequences: Any, hidden: int) -> Any:
        encoded.append(len(sequences))
        return here(stages, plan, sequences, hidden)

    monkeypatch.setattr(encode_corpus, "encode_here", counted)
    encode_texts(encoder, corpus, tmp_path / "out")
    assert encoded == [8]
    assert files_of(tmp_path / "out") == whole


def test_a_folder_of_other_vectors_is_refused(encoder: Encoder, corpus: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "out"
    encode_texts(encoder, corpus, out, dim=16)
    before = files_of(out)
    with pytest.raises(UserError, match=r"another model, input or setting: dim 16, now 48; give another folder"):
        encode_texts(encoder, corpus, out)
    with pytest.raises(UserError, match=r"kind 'passage', now 'query'"):
        encode_texts(encoder, corpus, out, dim=16, kind="query")
    with pytest.raises(UserError, match=r"input_sha256"):
        encode_texts(encoder, Corpus(write_corpus(tmp_path / "corpus.jsonl", ROWS[::-1])), out, dim=16)
    assert files_of(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(UserError, match=r"mine: holds thesis.txt; wanted an empty folder"):
        encode_texts(encoder, corpus, tmp_path / "mine")


def test_other_weights_are_refused(encoder: Encoder, corpus: Corpus, tmp_path: Path) -> None:
    encode_texts(encoder, corpus, tmp_path / "out")
    other = save_model(tmp_path / "other", seed=1)
    with (
        Encoder.from_pretrained(other, device="cpu") as second,
        pytest.raises(UserError, match=r"setting: weights_sha256 '[0-9a-f]*…, now '[0-9a-f]*…; give another folder"),
    ):
        encode_texts(second, corpus, tmp_path / "out")


def test_dim_truncates_and_normalises_anew(encoder: Encoder, corpus: Corpus, tmp_path: Path) -> None:
    _, rows = read_all(encode_texts(encoder, corpus, tmp_path / "out", dim=12))
    wanted = encoder.encode(TEXTS, kind="passage")[:, :12]
    np.testing.assert_allclose(rows, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=3e-6)
    for dim in (0, 49):
        with pytest.raises(UserError, match=rf"dim: found {dim}; wanted 1 to the model's hidden_size 48"):
            encode_texts(encoder, corpus, tmp_path / "none", dim=dim)


def dequantize(stored: np.ndarray, precision: str, dim: int, ranges: np.ndarray | None = None) -> np.ndarray:
    """What :func:`quantize` kept, as fp32: the middle of an int8 step, ±1 for a bit."""
    if precision == "int8":
        assert ranges is not None
        steps = (ranges[1] - ranges[0]) / 255
        return (ranges[0] + (stored.astype(np.float32) + 128.5) * steps).astype(np.float32)
    if precision.endswith("binary"):
        packed = stored if precision == "ubinary" else (stored.astype(np.int16) + 128).astype(np.uint8)
        bits = np.unpackbits(packed, axis=-1, count=dim)
        return bits.astype(np.float32) * 2 - 1
    return stored.astype(np.float32)


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "binary", "ubinary"])
@pytest.mark.parametrize("dim", [48, 13])
def test_precisions_are_sentence_transformers(
    precision: Any, dim: int, encoder: Encoder, corpus: Corpus, tmp_path: Path
) -> None:
    from sentence_transformers.util.quantization import quantize_embeddings

    exact = np.concatenate(
        list(map(np.asarray, (r for _, r in encode_texts(encoder, corpus, tmp_path / "f", dim=dim))))
    )
    found = encode_texts(encoder, corpus, tmp_path / "out", dim=dim, precision=precision)
    _, rows = read_all(found)
    if precision == "float16":
        wanted = exact.astype(np.float16)
    else:
        wanted = quantize_embeddings(exact, precision=precision, ranges=found.ranges)
    assert rows.dtype == wanted.dtype
    np.testing.assert_array_equal(rows, wanted)
    back = dequantize(rows, precision, dim, found.ranges)
    if precision.endswith("binary"):
        np.testing.assert_array_equal(back > 0, exact > 0)
    else:
        step = {"float32": 0, "float16": 1e-3, "int8": np.ptp(exact, axis=0).max() / 255}[precision]
        np.testing.assert_allclose(back, exact, atol=step)


def test_int8_clips_what_lies_outside_the_calibration() -> None:
    ranges = np.array([[-1.0, 0.0], [1.0, 0.0]], dtype=np.float32)
    found = quantize(np.array([[-3.0, 5.0], [3.0, 0.0]], dtype=np.float32), "int8", ranges)
    assert found.tolist() == [[-128, -123], [127, -128]]


def test_a_full_disk_is_one_message_and_nothing_is_lost(
    encoder: Encoder, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_texts(encoder, corpus, tmp_path / "whole")
    save, calls = np.save, []

    def full(file: Any, values: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(file, values, **options)

    with monkeypatch.context() as patch:
        patch.setattr(vectors.np, "save", full)
        with pytest.raises(UserError, match=r"vectors-00003.npy: cannot be written \(No space left on device\)"):
            encode_texts(encoder, corpus, tmp_path / "out")
    manifest = Manifest.read(tmp_path / "out")
    assert manifest is not None
    assert [shard.complete for shard in manifest.shards] == [True] * 3 + [False] * 5
    assert not list((tmp_path / "out").glob("*.partial"))
    encode_texts(encoder, corpus, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("numbers", [1000, 100_000])  # the end of the file, and the middle of it
def test_a_really_full_disk_is_noticed(numbers: int, tmp_path: Path) -> None:
    """Numpy's own writing overlooks the end of a file."""
    vectors.write_array(tmp_path / "a.npy", np.zeros(5))
    before = files_of(tmp_path)
    with files_of_at_most(3000), pytest.raises(UserError, match=r"a.npy: cannot be written \(File too large\)"):
        vectors.write_array(tmp_path / "a.npy", np.zeros(numbers, dtype=np.float32))
    assert files_of(tmp_path) == before


def test_half_a_folder_is_no_folder_of_vectors(encoder: Encoder, corpus: Corpus, tmp_path: Path) -> None:
    found = encode_texts(encoder, corpus, tmp_path / "out").manifest
    Manifest(found.fingerprint, found.rows, found.dim, found.precision, plan_shards(60, 8)).write(tmp_path / "out")
    with pytest.raises(UserError, match=r"8 of 8 shards are missing"):
        VectorFolder(tmp_path / "out")
    (tmp_path / "out" / MANIFEST).write_text('{"a": 1}')
    with pytest.raises(UserError, match=r"manifest.json: not a manifest of vectors \(format None"):
        encode_texts(encoder, corpus, tmp_path / "out")


@pytest.mark.parametrize("form", ["plain lines", "BEIR passages", "BEIR queries", "bom"])
def test_forms_of_a_corpus(form: str, tmp_path: Path) -> None:
    if form == "plain lines":
        (tmp_path / "a.txt").write_bytes("one\r\n\n[two] “ü”\n".encode())
        corpus = Corpus(tmp_path / "a.txt")
        assert corpus.read(0, 2) == (["1", "3"], ["one", "[two] “ü”"])
    elif form == "bom":
        path = write_corpus(tmp_path / "c.jsonl")
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        corpus = Corpus(path)
        assert corpus.read(0, 60) == ([row["_id"] for row in ROWS], TEXTS)
    else:
        write_corpus(tmp_path / "corpus.jsonl")
        write_corpus(tmp_path / "queries.jsonl", [{"_id": "q", "text": "what?"}])
        corpus = Corpus(tmp_path, "query" if form == "BEIR queries" else "passage")
        assert len(corpus) == (1 if form == "BEIR queries" else 60)
    assert not corpus.odd.found


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"_id": "d1", "text": "again"}', r"line 61: _id 'd1' stands in the file twice \(1 such rows\)"),
        ('{"_id": "x", "text": 5}', r"line 61: 'text': found the number 5; wanted text"),
        ('{"text": "no id"}', r"line 61: found text; wanted an object with _id"),
        ('{"_id": "x", "text": ', r"line 61: not JSON"),
    ],
)
def test_bad_rows_of_a_corpus_are_named(line: str, message: str, tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "corpus.jsonl")
    path.write_text(path.read_text() + line)
    with pytest.raises(UserError, match=f"corpus.jsonl, {message}"):
        len(Corpus(path))


def test_a_corpus_without_text(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "c.jsonl", [{"_id": str(i), "text": " "} for i in range(3)])
    with pytest.raises(UserError, match=r"c.jsonl: no row has any text"):
        len(Corpus(path))
    path = write_corpus(tmp_path / "c.jsonl", [{"_id": "a", "text": " "}, {"_id": "b", "text": "b"}])
    assert Corpus(path).odd.found == {NO_TEXT: (1, 1)}


def test_latin_1_lines_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\ncaf\u00e9\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"a.txt, line 2: not UTF-8: byte 0xe9 at byte 4 of the line"):
        len(Corpus(tmp_path / "a.txt"))


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, path = save_model(tmp_path / "model"), write_corpus(tmp_path / "corpus.jsonl")
    arguments = ["--model", str(model), "--input", str(path), "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        encode.main([*arguments, "--output", str(tmp_path / "out"), "--dim", "8", "--precision", "float16"])
    assert not ended.value.code
    assert "out: 60 vectors of 8 × float16 in 8 shards" in capsys.readouterr().out
    assert read_all(VectorFolder(tmp_path / "out"))[1].shape == (60, 8)
    with pytest.raises(SystemExit) as ended:
        encode.main([*arguments, "--output", str(tmp_path / "out"), "--dim", "9", "--precision", "float16"])
    assert ended.value.code == 1
    assert "dim 8, now 9" in capsys.readouterr().err
