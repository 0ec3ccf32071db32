"""What a training run says while it runs and at its end, and what metrics.jsonl holds of its losses."""

from __future__ import annotations

import io
import json
import logging
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.runs import make_inputs, read_metrics, recipe

from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion import convert_checkpoints
from megatron_embed.conversion.files.progress import progress
from megatron_embed.conversion.mcore import folder as checkpoint_folder
from megatron_embed.recipes.cli import run_program
from megatron_embed.recipes.config.run_config import save_run_config
from megatron_embed.recipes.train import main
from megatron_embed.recipes.training.metrics import Reporter
from megatron_embed.recipes.training.resume import Start, checkpoints_folder
from megatron_embed.recipes.training.run_folder import RunFolder
from megatron_embed.recipes.training.run_report import read_run, write_report

pytestmark = pytest.mark.slow


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def report_steps(folder: Path, losses: list[float], logged: set[int], *, start: int = 0) -> None:
    """Give a reporter steps whose losses are these, the first after ``start``."""
    cfg = recipe(folder, "run", f"train.train_iters={start + len(losses)}")
    begin = None
    if start:
        root = checkpoints_folder(folder / "run")
        root.mkdir()
        checkpoint_folder.write_tracker(root, start)
        begin = Start(checkpoint_folder.iteration_folder(root, start), start, own=True, before=None, data={})
    reporter = Reporter(cfg, RunFolder(cfg, folder / "run", begin), active=True, start=start)
    for step, loss in enumerate(losses, start=start + 1):
        record: dict[str, Any] = {"step": step, "loss": loss, "learning_rate": 1e-4, "tokens_per_second": 5e3}
        if step == 4:
            record["eval"] = {"held-out": {"ndcg@10": 0.5, "mrr@10": 0.25}}
        reporter.step(record, logged=step in logged)
    reporter.close()


def test_loss_is_the_mean_since_the_line_before_and_loss_step_its_own(tmp_path: Path) -> None:
    report_steps(tmp_path, [9.0, 4.0, 2.0, 3.0, 8.0, 1.0], {1, 4, 6})
    found = [(record["step"], record["loss"], record["loss_step"]) for record in read_metrics(tmp_path / "run")]
    assert found == [(1, 9.0, 9.0), (4, 3.0, 3.0), (6, 4.5, 1.0)]
    report_steps(tmp_path, [5.0, 1.0], {6}, start=4)  # goes on from step 4: of what came after nothing is left
    found = [(record["step"], record["loss"], record["loss_step"]) for record in read_metrics(tmp_path / "run")]
    assert found == [(1, 9.0, 9.0), (4, 3.0, 3.0), (6, 3.0, 1.0)]


@pytest.mark.parametrize("line", ['{"foo": 1}', "[1]", '{"step": "1"}'])
def test_a_foreign_line_of_the_metrics_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
    begin = Start(tmp_path / "iter_0000001", 1, own=True, before=None, data={})
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2: found .*, wanted an object"):
        RunFolder(recipe(tmp_path, "run"), tmp_path, begin).check()


def test_without_a_terminal_plain_lines(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "megatron_embed")
    report_steps(tmp_path, [9.0, 4.0, 2.0, 3.0, 8.0, 1.0], {1, 4, 6})
    said = [re.sub(r"\d+:\d\d:\d\d left", "T left", record.getMessage()) for record in caplog.records]
    assert said == [
        "step 1/6: loss 9.0000, lr 0.0001, 5,000 tokens/s, T left",
        "step 4/6: loss 3.0000, lr 0.0001, 5,000 tokens/s, T left",
        "step 4: held-out: ndcg@10 0.5000, mrr@10 0.2500",
        "step 6/6: loss 4.5000, lr 0.0001, 5,000 tokens/s, T left",
    ]
    assert capsys.readouterr().err == ""


def test_on_a_terminal_a_bar_and_the_evaluations_above_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "megatron_embed")
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    report_steps(tmp_path, [9.0, 4.0, 2.0, 3.0, 8.0, 1.0], {1, 4, 6})
    assert "6/6" in terminal.getvalue()
    assert "loss 1.0000, 5,000 tokens/s" in terminal.getvalue()
    assert [record.getMessage() for record in caplog.records] == ["step 4: held-out: ndcg@10 0.5000, mrr@10 0.2500"]


def test_the_first_rank_speaks_and_the_others_do_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def body() -> None:
        logging.getLogger("megatron_embed.recipes.training.loop").info("step 1")
        logging.getLogger("megatron_embed.recipes.training.loop").warning("odd")

    for rank, wanted in (("0", "step 1\nodd\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit):
            run_program(body)
        assert capsys.readouterr().err == wanted
    assert not logging.getLogger("megatron_embed").handlers
    assert logging.getLogger("megatron_embed").propagate


def test_a_long_piece_of_work_ends_with_a_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "megatron_embed")
    with progress("encoding", 1500, done=500) as advance:
        advance(500)
        advance(500)
    (line,) = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(r"encoding: 1,500 of 1,500 texts, [\d,]+ a second, 0:00:00 left", line)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("output")
    make_inputs(folder)
    (folder / "held-out" / "qrels").mkdir(parents=True)
    for name in ("corpus", "queries"):
        rows = [{"_id": str(i), "text": f"w{i} {name}"} for i in range(4)]
        (folder / "held-out" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "held-out" / "qrels" / "test.tsv").write_text("0\t0\t1\n1\t1\t1\n")
    return folder


def test_a_run_from_its_first_line_to_the_export(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("train.train_iters=5", "train.log_interval=3", "train.save_interval=4", "train.eval_interval=3")
    save_run_config(recipe(folder, "run", *settings, f"data.eval={folder / 'held-out'}"), folder / "config.yaml")
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["--config", str(folder / "config.yaml"), "device=cpu"])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (0, "")
    run = folder / "run"
    step = r"step {}/5: loss \d+\.\d{{4}}, lr \S+, [\d,]+ tokens/s, \d:\d\d:\d\d left"
    scores = r"step {}: held-out: ndcg@10 \d\.\d{{4}}, recall@100 \d\.\d{{4}}, mrr@10 \d\.\d{{4}}"
    wanted = [
        r"ministral3_tiny_embed_config on 1 rank \(TP 1 × PP 1 × CP 1 × DP 1\), steps 1 to 5 of 8 queries, .*",
        r"step 1: loss\.mode .*",
        step.format(1),
        r"step 3: keeps the graphs of (\d+) of \1 micro-batches \(loss\.kept_micro_batches auto: .*\)",
        *(step.format(3), scores.format(3)),
        *(step.format(4), rf"step 4: saved to {run}/checkpoints/iter_0000004"),
        *(step.format(5), scores.format(5), rf"step 5: saved to {run}/checkpoints/iter_0000005"),
        rf"done: step 5 after \d:\d\d:\d\d; the run lies in {run}; export it with: convert-checkpoints export .*",
    ]
    lines = err.splitlines()
    assert len(lines) == len(wanted), err
    for line, pattern in zip(lines, wanted, strict=True):
        assert re.fullmatch(pattern, line)

    records = read_metrics(run)
    assert [record["step"] for record in records] == [1, 3, 4, 5]
    assert records[0]["loss"] == records[0]["loss_step"]
    assert records[1]["loss"] != records[1]["loss_step"]
    page = write_report(folder / "report.html", [read_run(run)]).read_text()
    assert f"<td>{records[0]['loss']:.4f}</td><td>{records[-1]['loss']:.4f}</td>" in page

    program, *export = shlex.split(lines[-1].partition("export it with: ")[2])
    assert program == "convert-checkpoints"
    assert convert_checkpoints.main(export) == 0
    assert (folder / "run-embedder" / "modules.json").is_file()


LIBRARY = """
from megatron_embed.recipes import Encoder, RecipeConfig, train
from megatron_embed.recipes.config.run_config import load_run_config

if __name__ == "__main__":
    cfg = load_run_config("silent.yaml")
    train(cfg)
    with Encoder.from_pretrained("silent") as encoder:
        vectors = encoder.encode(["where is it?"], kind="query")
"""


def test_used_from_python_the_package_is_silent(folder: Path) -> None:
    """No warning of torch or megatron-core, no bar without a terminal; lines for those who ask ``logging`` for them."""
    save_run_config(recipe(folder, "silent", "train.train_iters=2", "device=cpu"), folder / "silent.yaml")
    (folder / "program.py").write_text(LIBRARY)
    done = subprocess.run(
        [sys.executable, "program.py"], capture_output=True, text=True, timeout=180, cwd=folder, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
