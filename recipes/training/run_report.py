"""One self-contained HTML page about one or more runs."""

from __future__ import annotations

import html
import io
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.files.disk_errors import check_writable
from megatron_embed.recipes.retrieval.vectors import write_file

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

# Figures are drawn in this colour. It is then replaced by the page's own text colour, light or dark.
_INK = "#010203"
_LOOK: Any = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.grid", "legend.frameon"), False),
    "svg.fonttype": "none",
}
_SERIES = ("#3b7dd8", "#d9822b", "#3a9d5d", "#b5547a", "#7a63c7", "#8a8a3a")


@contextmanager
def _look() -> Iterator[None]:
    """Draw in the page's style; import matplotlib only to draw, not for ``--help``."""
    from matplotlib import rc_context

    with rc_context(_LOOK):
        yield


def _figure(**kwargs: Any) -> Figure:
    from matplotlib.figure import Figure

    return Figure(**kwargs)


@dataclass(frozen=True)
class RunLog:
    """The content of a run's folder: its ``metrics.jsonl`` and, if there is one, its ``run_config.yaml``."""

    name: str
    records: list[dict[str, Any]]
    config: str

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Return (steps, values) of a number in the records."""
        found = [(r["step"], r[key]) for r in self.records if isinstance(r.get(key), int | float)]
        return [step for step, _ in found], [value for _, value in found]

    def scores(self, metric: str) -> dict[str, tuple[list[int], list[float]]]:
        """Return collection → (steps, values) of a retrieval metric."""
        found: dict[str, tuple[list[int], list[float]]] = {}
        for record in self.records:
            for collection, values in record.get("eval", {}).items():
                steps, numbers = found.setdefault(collection, ([], []))
                steps.append(record["step"])
                numbers.append(values[metric])
        return found


def read_run(folder: str | Path) -> RunLog:
    """Read a run's folder; skip an incomplete last line (the run is still writing, or was killed).

    Raises:
        UserError: ``metrics.jsonl`` is missing or empty.
    """
    folder = Path(folder)
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file; wanted the folder of a run (train.save_dir)")
    records = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number}: not JSON: {error.msg}") from None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise UserError(f"{path}, line {number}: wanted an object with a step")
        records.append(record)
    if not records:
        raise UserError(f"{path}: holds no step yet; wait until the run has logged one")
    config = folder / "run_config.yaml"
    return RunLog(folder.resolve().name, records, config.read_text(encoding="utf-8") if config.is_file() else "")


def write_report(
    path: str | Path,
    runs: Sequence[RunLog],
    *,
    title: str = "Training report",
    sections: Iterable[tuple[str, str]] = (),
) -> Path:
    """Write the page.

    Args:
        sections: (heading, HTML) to put before the runs' own; :func:`table` and :func:`heat_map` make such HTML.

    Raises:
        UserError: see :func:`check_output`.
    """
    check_output(Path(path))
    parts = list(sections)
    if runs:
        parts.append(("Runs", _summary(runs)))
        parts.append(("Training", _training_figure(runs)))
    if any(run.scores("ndcg@10") for run in runs):
        parts.append(("Retrieval while training", _scores_figure(runs) + _first_and_last(runs)))
    for run in runs:
        if run.config:
            body = f"<details><summary>run_config.yaml</summary><pre>{html.escape(run.config)}</pre></details>"
            parts.append((f"Configuration of {run.name}", body))
    text = "\n".join(f"<section><h2>{html.escape(heading)}</h2>\n{body}</section>" for heading, body in parts)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    page = _PAGE.format(title=html.escape(title), style=_STYLE, body=text)
    write_file(path, lambda file: file.write(page.encode()))
    return path


def check_output(path: Path) -> None:
    """Check that a report can be written: only an earlier report is replaced.

    Raises:
        UserError: there is a folder or any other file, or nothing can be written there.
    """
    if path.is_dir():
        raise UserError(f"{path}: a folder; wanted a file's name")
    if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"{path}: is there already and is no earlier report; name another file, or move it away")
    check_writable(path.parent)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return an HTML table with text in the first column and right-aligned numbers in the others."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(_shown(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


@_look()
def heat_map(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], *, caption: str = "") -> str:
    """Return a figure of a matrix ``[len(rows), len(columns)]`` with labels and a colour bar."""
    width = 0.42 * len(columns) + 4.2
    figure = _figure(figsize=(width, 0.42 * len(rows) + 2.4))
    axes = figure.subplots()
    image = axes.imshow(values, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(columns)), [_clip(text, 26) for text in columns], rotation=50, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), [_clip(text, 44) for text in rows], fontsize=8)
    figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02)
    return _svg(figure, caption)


def _summary(runs: Sequence[RunLog]) -> str:
    rows = []
    for run in runs:
        last = run.records[-1]
        speed, waited = run.series("tokens_per_second")[1], run.series("data_seconds")[1]
        memory = last.get("peak_memory_bytes")
        rows.append(
            (
                run.name,
                last["step"],
                run.records[0].get("loss"),
                last.get("loss"),
                f"{statistics.median(speed):,.0f}" if speed else None,
                f"{statistics.median(waited):.3f} s" if waited else None,
                f"{memory / 2**30:.2f} GiB" if memory else None,
            )
        )
    header = ("run", "steps", "first loss", "last loss", "tokens/s (median)", "waited for data (median)", "peak memory")
    return table(header, rows)


@_look()
def _training_figure(runs: Sequence[RunLog]) -> str:
    figure = _figure(figsize=(11, 6.4), layout="constrained")
    grid = figure.subplots(2, 2)
    panels = {
        "loss": "loss",
        "grad_norm": "gradient norm before clipping",
        "learning_rate": "learning rate",
        "tokens_per_second": "tokens per second",
    }
    for axes, (key, label) in zip(grid.flat, panels.items(), strict=True):
        for color, run in zip(_SERIES * len(runs), runs, strict=False):
            steps, values = run.series(key)
            axes.plot(steps, values, label=run.name, linewidth=1.5, color=color, marker="." if len(steps) < 8 else None)
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5))
        axes.set_ylim(bottom=0 if key != "grad_norm" else None)
    if len(runs) > 1:
        grid.flat[0].legend(fontsize=8)
    return _svg(
        figure,
        "Loss (the mean over the steps since the point before); gradient norm, learning rate, speed of logged steps.",
    )


@_look()
def _scores_figure(runs: Sequence[RunLog]) -> str:
    figure = _figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots()
    labelled = [(run, name, values) for run in runs for name, values in run.scores("ndcg@10").items()]
    for color, (run, name, (steps, values)) in zip(_SERIES * len(labelled), labelled, strict=False):
        label = f"{run.name}: {name}" if len(runs) > 1 else name
        axes.plot(steps, values, marker="o", markersize=4, linewidth=1.5, label=label, color=color)
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel("nDCG@10", fontsize=9)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return _svg(figure, "nDCG@10 at the evaluation steps.")


def _first_and_last(runs: Sequence[RunLog]) -> str:
    rows = []
    for run in runs:
        for metric in ("ndcg@10", "recall@100", "mrr@10"):
            for collection, (steps, values) in run.scores(metric).items():
                rows.append(
                    (run.name, collection, metric, f"{values[0]:.4f}", f"{values[-1]:.4f}", steps[0], steps[-1])
                )
    return table(("run", "collection", "metric", "first", "last", "first step", "last step"), rows)


def _svg(figure: Figure, caption: str) -> str:
    buffer = io.StringIO()
    # matplotlib names clip paths by a hash, so figures on one page must not share the salt.
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": caption}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    return f'<figure class="wide">{svg}<figcaption>{html.escape(caption)}</figcaption></figure>'


def _shown(cell: Any) -> str:
    if cell is None:
        return "–"
    return f"{cell:.4f}" if isinstance(cell, float) else str(cell)


def _clip(text: str, length: int) -> str:
    text = " ".join(text.split()).replace("$", r"\$")  # otherwise matplotlib reads $…$ as mathematics
    return text if len(text) <= length else text[: length - 1] + "…"


#: what every report has in its head, those of earlier versions too; :func:`check_output` knows them by it
_MARK = "<style>\n:root { color-scheme: light dark; --ink:"
_STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --paper: #ffffff; --soft: #f4f6f9; --line: #d8dde5; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dfe4ec; --paper: #14181f; --soft: #1d232d; --line: #343c4a; }
}
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 62rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; margin: 0 0 .5rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
.wide { overflow-x: auto; } figure { margin: 0; } figcaption { font-size: .85rem; opacity: .75; }
svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; margin: .6rem 0; }
th, td { padding: .35rem .9rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
pre { background: var(--soft); padding: .9rem; overflow-x: auto; font-size: .85rem; border-radius: .4rem; }
summary { cursor: pointer; }
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><h1>{title}</h1>
{body}
</body></html>
"""
