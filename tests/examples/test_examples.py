"""The examples run as they stand."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from support.places import ROOT
from support.tiny_models import save_vlm

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def environment() -> dict[str, str]:
    own = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    return {**own, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TERM": "dumb"}


def test_docstrings_become_pairs() -> None:
    split = load("docstrings").split_docstring
    rest = "The values are taken in the order in which they were put in, and none of them is lost on the way."
    pair = split(f"Return the values of a queue. {rest}\n\n    More of it.\n")
    assert (pair.query, pair.passage) == ("Return the values of a queue", f"{rest} More of it.")
    assert split(f"Return the values\n    of a queue.\n\n{rest}").query == "Return the values of a queue"
    assert split("Return the values of a queue.") is None
    assert split(f"Short. {rest}") is None
    assert split("Return the values of a queue. " + ">>> a[0] == {1: 2} " * 12) is None


def test_held_out_pairs_are_not_trained_on(tmp_path: Path) -> None:
    docstrings = load("docstrings")
    pairs = [docstrings.Pair(f"query number {i}", f"passage {i}") for i in range(50)]
    train, beir = docstrings.write_corpus(tmp_path, pairs, held_out=10)
    trained = {json.loads(line)["query"] for line in train.read_text().splitlines()}
    held_out = {json.loads(line)["text"] for line in (beir / "queries.jsonl").read_text().splitlines()}
    assert (len(trained), len(held_out), trained & held_out) == (40, 10, set())
    again = docstrings.write_corpus(tmp_path / "again", pairs[::-1], held_out=10)[0]
    assert again.read_text() == train.read_text()


def test_quickstart_ends_with_an_embedder(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    save_vlm(tmp_path / "vlm")
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"query": f"which {i}", "positive": f"number {i}"}) + "\n" for i in range(16)))
    overrides = ("train.train_iters=2", "train.global_batch_size=8", "data.query_prompt=find: ", "device=cpu")
    command = [str(EXAMPLES / "quickstart.sh"), str(tmp_path / "vlm"), str(data), str(tmp_path / "out"), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len((tmp_path / "out" / "run" / "metrics.jsonl").read_text().splitlines()) >= 1
    model = SentenceTransformer(str(tmp_path / "out" / "embedder"), device="cpu")
    assert model.prompts["query"] == "find: "
    vectors = model.encode_query(["which 3", "which 4"])
    assert vectors.shape == (2, 48)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)


def test_the_demo_runs_to_its_end(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    options = ("--train-iters", "4", "--held-out", "40", "--wanted-rise", "-1", "--device", "cpu", "--packages")
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--output", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nDCG@10 rose by" in done.stdout
    assert "Warning" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 4  # similarities before and after, training, retrieval
    assert (out / "export" / "modules.json").is_file()
