"""mteb takes an export as it is, without a network, and finds the number that this project finds."""

from __future__ import annotations

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from support.places import ROOT
from support.tiny_models import save_vlm

from megatron_embed.bridge.cpu import host
from megatron_embed.conversion.exporting import export_hf
from megatron_embed.conversion.importing import import_hf
from megatron_embed.recipes import Encoder
from megatron_embed.recipes.datasets.beir import load_beir
from megatron_embed.recipes.retrieval.evaluation import evaluate

SCRIPT = ROOT / "examples" / "mteb_local_task.py"

#: runs a script with every way to another host closed, and says so where one was tried
OFFLINE = """
import runpy, socket, sys
def closed(*arguments, **_):
    print("NETWORK", arguments[1:], file=sys.stderr, flush=True)
    raise OSError("no network")
socket.socket.connect = socket.getaddrinfo = closed
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def write_collection(folder: Path) -> Path:
    """200 documents, some with a title; 40 queries made of a document's words, graded 1 to 3; one that none answers."""
    generator = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{generator.randint(0, 300)}" for _ in range(count))

    documents = [
        {"_id": f"d{i}", "title": words(2) if i % 3 else "", "text": words(generator.randint(3, 20))}
        for i in range(200)
    ]
    queries, judgements = [], ["query-id\tcorpus-id\tscore"]
    for i in range(41):
        text = " ".join(generator.sample(str(documents[5 * i % 200]["text"]).split(), 3))
        queries.append({"_id": f"q{i}", "text": text})
        judgements += [f"q{i}\td{(5 * i + j) % 200}\t{3 - j if i < 40 else 0}" for j in range(4)]
    (folder / "qrels").mkdir(parents=True)
    for name, rows in {"corpus": documents, "queries": queries}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "qrels" / "test.tsv").write_text("\n".join(judgements) + "\n")
    return folder


@pytest.mark.skipif(importlib.util.find_spec("mteb") is None, reason="mteb is not installed: pip install mteb")
def test_mteb_finds_the_same_scores_without_a_network(tmp_path: Path) -> None:
    host.run_on_cpu()
    save_vlm(tmp_path / "vlm")
    import_hf(tmp_path / "vlm", tmp_path / "megatron", progress=False)
    export_hf(tmp_path / "megatron", tmp_path / "export", progress=False)
    data = write_collection(tmp_path / "words")
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(SCRIPT), str(tmp_path / "export"), str(data)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "NETWORK" not in done.stderr, done.stderr
    theirs = {name: float(value) for name, value in map(str.split, done.stdout.splitlines())}
    collection = load_beir(data)
    with Encoder.from_pretrained(tmp_path / "export", device="cpu") as encoder:
        ours = evaluate(encoder.encode, [collection])["words"]
    assert 0.05 < ours["ndcg@10"] < 0.9
    for mine, name in (("ndcg@10", "ndcg_at_10"), ("recall@100", "recall_at_100"), ("mrr@10", "mrr_at_10")):
        assert theirs[name] == pytest.approx(ours[mine], abs=1e-4)
