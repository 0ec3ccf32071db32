"""16-bit runs stay near the fp32 run; long documents train; a temperature learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.runs import make_inputs, read_metrics, recipe
from support.worlds import run_world

#: at 0.02 a rounding of 2^-9 in a score would be a tenth of a logit, and runs part soon
WARM = "loss.temperature=0.5"
RUNS = {
    "fp32": [WARM],
    "bf16": [WARM, "model.precision=bf16"],
    "bf16_plain": [WARM, "model.precision=bf16", "optimizer.distributed=false", "model.tensor_model_parallel_size=2"],
    "fp16": [WARM, "model.precision=fp16"],
    "temperature": ["loss.learn_temperature=true", "optimizer.lr=1e-2", "model.precision=bf16"],
    "long": [
        "data.train={folder}/long.jsonl",
        "data.passage_max_length=8192",
        "train.micro_batch_tokens=9000",
        "train.global_batch_size=2",
        "train.train_iters=2",
        "model.context_parallel_size=2",
    ],
}


def train_all(folder: str) -> None:
    from megatron_embed.recipes import train

    for name, overrides in RUNS.items():
        train(recipe(Path(folder), name, *(text.format(folder=folder) for text in overrides)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("precision")
    make_inputs(path, max_position_embeddings=16384)
    rows = [{"query": f"number {i}", "positive": f"{i} and so on " * 4000} for i in range(4)]
    (path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_world(train_all, 2, str(path))
    return path


@pytest.mark.parametrize("name", ["bf16", "bf16_plain", "fp16"])
def test_sixteen_bit_runs_stay_near_the_fp32_run(folder: Path, name: str) -> None:
    wanted = [record["loss"] for record in read_metrics(folder / "fp32")]
    found = [record["loss"] for record in read_metrics(folder / name)]
    assert len(found) == 20
    assert found == pytest.approx(wanted, rel=0.02)
    assert found[-1] < found[0]


def test_a_run_trains_on_documents_of_8k_tokens(folder: Path) -> None:
    records = read_metrics(folder / "long")
    assert records[0]["tokens"] > 2 * 8192
    assert all(record["loss"] > 0 for record in records)


def test_a_learned_temperature_moves_and_is_exported(folder: Path) -> None:
    from megatron_embed.conversion.exporting import export_hf

    export_hf(folder / "temperature", folder / "out", progress=False)
    stated = json.loads((folder / "out" / "config.json").read_text())["temperature"]
    assert abs(stated - 0.02) > 1e-4
    assert f"{stated:.4f}"[:5] in (folder / "out" / "README.md").read_text()
    assert torch.isfinite(torch.tensor(stated))
