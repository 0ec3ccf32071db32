"""Two runs never write one folder or file at the same time; the second names the first; a dead one hinders nobody."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.mining import run

from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes import Encoder
from megatron_embed.recipes.datasets.corpus import Corpus
from megatron_embed.recipes.retrieval import encode_corpus
from megatron_embed.recipes.retrieval.encode_corpus import encode_texts
from megatron_embed.recipes.retrieval.writer_lock import LOCK

pytestmark = pytest.mark.usefixtures("small_parts")

#: holds a lock as another host's process would be seen to, until it is killed
HOLDER = """
import fcntl, json, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
json.dump({"host": "node7", "pid": 4711, "since": "2026-11-21 10:00:05+00:00"}, file)
file.flush()
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder() -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    started = []

    def hold(lock: Path) -> subprocess.Popen[str]:
        lock.parent.mkdir(parents=True, exist_ok=True)
        started.append(subprocess.Popen([sys.executable, "-c", HOLDER, lock], stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout is not None
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield hold
    for process in started:
        process.kill()
        process.wait()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def while_encoding(monkeypatch: pytest.MonkeyPatch, second_run: Callable[[], Any]) -> list[str]:
    """Try ``second_run`` once, when a run has begun to encode; what it is told."""
    told: list[str] = []
    here = encode_corpus.encode_here

    def encode_here(*arguments: Any, **options: Any) -> Any:
        if not told:
            told.append("")
            with pytest.raises(UserError) as refused:
                second_run()
            told[0] = str(refused.value)
        return here(*arguments, **options)

    monkeypatch.setattr(encode_corpus, "encode_here", encode_here)
    return told


def test_a_second_encode_into_the_folder_is_refused_and_names_the_first(
    encoder: Encoder, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = Corpus(folder / "corpus.jsonl")
    encode_texts(encoder, corpus, tmp_path / "whole")
    told = while_encoding(monkeypatch, lambda: encode_texts(encoder, corpus, tmp_path / "out"))
    encode_texts(encoder, corpus, tmp_path / "out")
    assert told[0].startswith(
        f"{tmp_path / 'out'}: is being written by process {os.getpid()} on {socket.gethostname()}"
    )
    assert told[0].endswith("; wait until it ends, or name another")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")  # and no lock is left


def test_a_second_mine_into_the_file_is_refused_and_leaves_the_first_alone(
    encoder: Encoder, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(encoder, folder, tmp_path / "alone" / "out.jsonl", cache=tmp_path / "alone" / "vectors")
    out, other = tmp_path / "runs" / "out.jsonl", tmp_path / "other"
    told = while_encoding(monkeypatch, lambda: run(encoder, folder, out, cache=other))
    run(encoder, folder, out, cache=tmp_path / "runs" / "vectors")
    assert told[0].startswith(f"{out}: is being written by process {os.getpid()} on ")
    assert not other.exists()
    assert contents(tmp_path / "runs") == contents(tmp_path / "alone")


def test_a_second_mine_waits_for_no_vectors_that_are_whole_and_breaks_none_that_are_not(
    encoder: Encoder, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder: Callable[..., Any]
) -> None:
    cache = tmp_path / "vectors"
    told = while_encoding(monkeypatch, lambda: run(encoder, folder, tmp_path / "second.jsonl", cache=cache))
    run(encoder, folder, tmp_path / "first.jsonl", cache=cache)
    assert "is being written by process" in told[0]
    assert told[0].startswith(str(cache))
    for written in (cache, *(path for path in cache.iterdir() if path.is_dir())):
        holder(written / LOCK)  # whoever writes there: what is whole is only read
    run(encoder, folder, tmp_path / "second.jsonl", cache=cache)
    assert (tmp_path / "second.jsonl").read_bytes() == (tmp_path / "first.jsonl").read_bytes()


@pytest.mark.parametrize("state", ["new", "begun"])
def test_another_process_is_named_until_it_is_killed(
    state: str, encoder: Encoder, folder: Path, tmp_path: Path, holder: Callable[..., Any]
) -> None:
    corpus, out = Corpus(folder / "corpus.jsonl"), tmp_path / "out"
    encode_texts(encoder, corpus, tmp_path / "whole")
    if state == "begun":
        shutil.copytree(tmp_path / "whole", out)
        (out / "vectors-00001.npy").write_bytes(b"cut short")
    before = contents(out)
    process = holder(out / LOCK)
    message = r"process 4711 on node7, since 2026-11-21 10:00:05\+00:00; wait until it ends, or name another"
    with pytest.raises(UserError, match=message):
        encode_texts(encoder, corpus, out)
    assert {name: data for name, data in contents(out).items() if name != LOCK} == before
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (out / LOCK).is_file()
    encode_texts(encoder, corpus, out)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_holder_that_has_not_signed_yet_is_another_run(
    encoder: Encoder, folder: Path, tmp_path: Path, holder: Callable[..., Any]
) -> None:
    holder(tmp_path / "out" / LOCK)
    (tmp_path / "out" / LOCK).write_text("")
    with pytest.raises(UserError, match=r"out: is being written by another run; wait"):
        encode_texts(encoder, Corpus(folder / "corpus.jsonl"), tmp_path / "out")


def test_a_lock_says_who_holds_it(
    encoder: Encoder, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    here = encode_corpus.encode_here

    def encode_here(*arguments: Any, **options: Any) -> Any:
        seen.append(json.loads((tmp_path / "out" / LOCK).read_text()))
        return here(*arguments, **options)

    monkeypatch.setattr(encode_corpus, "encode_here", encode_here)
    encode_texts(encoder, Corpus(folder / "corpus.jsonl"), tmp_path / "out")
    assert seen[0]["pid"] == os.getpid()
    assert seen[0]["host"] == socket.gethostname()
    assert seen == [seen[0]] * len(seen)
