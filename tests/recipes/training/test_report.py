"""The page about runs is self-contained and says what the logs say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes.report import main
from megatron_embed.recipes.training.run_report import heat_map, read_run, table, write_report


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "my run <1>"
    folder.mkdir()
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(10, 51, 10):
            record = {"step": step, "loss": 3 - step / 25, "grad_norm": 1.5, "learning_rate": 1e-4 * step}
            record |= {"tokens_per_second": 1000.0 + step, "peak_memory_bytes": 2**31}
            if step % 20 == 0:
                record["eval"] = {"held-out": {"ndcg@10": step / 100, "recall@100": 0.5, "mrr@10": 0.25}}
            file.write(json.dumps(record) + "\n")
    (folder / "run_config.yaml").write_text("data:\n  query_prompt: '<b>'\n")
    return folder


def test_the_page_needs_nothing_from_outside(run_dir: Path, tmp_path: Path) -> None:
    sections = [("First", table(("what", "score"), [("a & b", 0.5), ("c", None)]))]
    sections.append(("Similar", heat_map(np.eye(2), ["costs $4 and $5", "b"], ["<p>", "d"], caption="cosine")))
    page = write_report(
        tmp_path / "x" / "report.html", [read_run(run_dir)], title="A < B", sections=sections
    ).read_text()
    links = re.findall(r"(?:src|href)\s*=\s*\"([^\"]+)\"|url\(([^)]+)\)", page)
    assert all(target.startswith(("#", "data:")) for pair in links for target in pair if target)
    assert "<script" not in page
    assert "prefers-color-scheme: dark" in page
    for text in (
        "A &lt; B",
        "a &amp; b",
        "0.5000",
        "–",
        "my run &lt;1&gt;",
        "&#x27;&lt;b&gt;&#x27;",
        "2.00 GiB",
        "1,030",
    ):
        assert text in page
    assert page.count("<svg") == 3
    assert "costs $4 and $5" in page
    assert "0.2000" in page  # first nDCG@10
    assert "0.4000" in page  # last
    ids = re.findall(r"<clipPath id=\"([^\"]+)\"", page)
    assert len(ids) == len(set(ids))


def test_a_last_line_that_is_cut_short_is_left_out(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "lo')
    assert [record["step"] for record in read_run(run_dir).records] == [10, 20, 30, 40, 50]


def test_the_command(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(run_dir), str(run_dir)])
    assert not ended.value.code
    assert capsys.readouterr().out.strip() == str(run_dir / "report.html")
    assert (run_dir / "report.html").is_file()


def test_the_command_replaces_an_earlier_report_and_no_other_file(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def status(output: Path) -> object:
        with pytest.raises(SystemExit) as ended:
            main([str(run_dir), "--output", str(output)])
        return ended.value.code

    page, thesis = tmp_path / "page.html", tmp_path / "thesis.html"
    assert not status(page)
    page.write_text(page.read_text().replace("<h2>", "<h3>"))
    assert not status(page)  # of another version
    assert "<h3>" not in page.read_text()
    thesis.write_bytes(b"<!doctype html>\xff my thesis")
    assert status(thesis) == 1
    assert f"{thesis}: is there already and is no earlier report" in capsys.readouterr().err
    assert thesis.read_bytes() == b"<!doctype html>\xff my thesis"
    assert status(tmp_path) == 1
    assert f"{tmp_path}: a folder; wanted a file's name" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert status(tmp_path / "file" / "page.html") == 1
    assert f"{tmp_path / 'file'}: is a file; wanted a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"metrics.jsonl: no such file; wanted the folder of a run"),
        ("", r"metrics.jsonl: holds no step yet"),
        ('{x\n{"step": 1}\n', r"metrics.jsonl, line 1: not JSON"),
        ("[1]\n", r"metrics.jsonl, line 1: wanted an object with a step"),
    ],
)
def test_unusable_runs(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        read_run(tmp_path)
