"""The report of mining: the audit as text, as JSON, and as a figure of the scores."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from megatron_embed.recipes.retrieval.mining import BINS, REASONS, Audit, MiningRules
from megatron_embed.recipes.retrieval.vectors import write_file


def audit_as_text(audit: Audit, rules: MiningRules) -> str:
    """Return the audit as text."""
    share = max(audit.candidates, 1)
    lines = [
        f"{audit.queries:,} queries, {audit.candidates:,} candidates at ranks {rules.ranks[0]} to {rules.ranks[1] - 1}"
    ]
    counted = dict(zip(REASONS, audit.dropped.tolist(), strict=True))
    for reason, number in {**counted, "not needed": audit.spare, "kept as negatives": audit.kept}.items():
        lines.append(f"  {reason:32} {number:>12,}  {number / share:6.1%}")
    lines.append(
        f"{audit.short:,} queries have fewer than {rules.negatives} negatives, {audit.without:,} of them none"
        + ("; a wider --rank-range or a higher --max-score-ratio gives more" if audit.short else "")
    )
    if audit.scores_dropped or audit.vectors_dropped:
        lines.append(
            f"a teacher's answers that the data had and the output has not, since they go with the old negatives: "
            f"scores of {audit.scores_dropped:,} rows, vectors of {audit.vectors_dropped:,}"
        )
    lines.extend(f"{rows.path}: {remark}" for rows in audit.odd for remark in rows.remarks())
    return "\n".join(lines)


def beside(output: Path, ending: str) -> Path:
    """Return the path beside ``output`` with another ending, such as ``OUT.audit.json`` for ``OUT.jsonl``.

    The ending replaces ``.jsonl`` or ``.json``; it follows any other name.
    """
    return output.with_name(output.name.removesuffix(".jsonl").removesuffix(".json") + ending)


def write_audit(audit: Audit, rules: MiningRules, output: Path) -> None:
    """Write ``OUT.audit.json`` and the figure of the scores, ``OUT.scores.png``."""
    value = {
        "queries": audit.queries,
        "candidates": audit.candidates,
        "dropped": dict(zip(REASONS, audit.dropped.tolist(), strict=True)),
        "not_needed": audit.spare,
        "kept": audit.kept,
        "queries_with_fewer": audit.short,
        "queries_with_none": audit.without,
        "rows_without_their_teachers_scores": audit.scores_dropped,
        "rows_without_their_teachers_vectors": audit.vectors_dropped,
        "odd_rows": {rows.path: rows.counts() for rows in audit.odd},
        "rules": vars(rules)
        | {"max_score_ratio": None if math.isinf(rules.max_score_ratio) else rules.max_score_ratio},
    }
    text = json.dumps(value, indent=2) + "\n"
    write_file(beside(output, ".audit.json"), lambda file: file.write(text.encode()))
    write_file(beside(output, ".scores.png"), lambda file: _draw(audit, file))


def _draw(audit: Audit, file: Any) -> None:
    from matplotlib.figure import Figure

    edges = np.linspace(-audit.bound, audit.bound, BINS + 1)
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for counts, label in zip(audit.histograms, ("positives", "negatives", "dropped for their score"), strict=True):
        axes.stairs(counts / max(counts.sum(), 1), edges, fill=True, alpha=0.45, label=f"{label} ({counts.sum():,})")
    seen = np.flatnonzero(audit.histograms.sum(axis=0))
    if len(seen):
        axes.set_xlim(edges[max(seen[0] - 1, 0)], edges[min(seen[-1] + 2, BINS)])
    axes.set_xlabel("score")
    axes.set_ylabel("share")
    axes.legend()
    figure.savefig(file, format="png", dpi=120)
