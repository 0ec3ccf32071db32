"""The result file of ``cpu_minutes_quality.py``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import SMALL, write_result
from quality import OPTIMIZER

Found = Mapping[str, Mapping[str, Any]]  # stage → its result

NAMES = {
    "theirs": "sentence-transformers",
    "ours": "ours",
    "mined": "ours, mined negatives",
    "more-none": "ours, trained on, no negatives",
    "more-mined": "ours, trained on, mined negatives",
}
HEADING = [
    "| seed | run | nDCG@10 before | after | recall@100 before | after | steps (planned) | CPU s | wall s | a step |",
    "|---|---|---|---|---|---|---|---|---|---|",
]
FORMS = {
    "trainer": "sentence-transformers' Trainer, BatchSamplers.NO_DUPLICATES, a dataset each source, in proportion",
    "loop": "a loop around MultipleNegativesRankingLoss with our batches; its step is no dearer than the Trainer's",
}

RULES = (
    "minutes of processor time (user and system, all threads of its process) for training; imports, loading, saving "
    "and evaluation do not count. A trial thrown away said what a step costs, and with it how many steps the budget "
    "holds; a run that turned out dearer was ended by the step that reached its budget. All runs of a seed start from "
    "the same weights."
)
FROM_START = (
    "The same weights, data and budget; the run without negatives is ours from above. A step with negatives costs "
    "more, so that the budget holds fewer."
)
FROM_TRAINED = (
    "Both start from our trained model, which also mined, and get the budget once more (new optimizer, warm-up and "
    "decay)."
)


def read(workdir: Path, stages: Sequence[str]) -> dict[str, Found]:
    """Return seed → results of its stages."""
    folders = sorted(workdir.glob("seed-*"), key=lambda path: int(path.name.partition("-")[2]))
    return {
        folder.name.partition("-")[2]: {
            stage: json.loads(path.read_text(encoding="utf-8"))
            for stage in stages
            if (path := folder / f"{stage}.json").exists()
        }
        for folder in folders
    }


def seconds(result: Mapping[str, Any]) -> str:
    """Format the processor seconds of a run, with their deviation from the budget if it is above 3 %."""
    off = result["processor"] / result["budget"] - 1
    return f"{result['processor']:.1f}" + (f" ({off:+.0%} of the budget)" if abs(off) > 0.03 else "")


def rows(seeds: Mapping[str, Found], runs: Sequence[str]) -> Iterator[str]:
    """Yield a line for each seed and run, and the means if there are several seeds."""
    for seed, found in seeds.items():
        for run in runs:
            if run in found:
                result, before = found[run], found["ours" if run.startswith("more-") else "start"]
                cells = [f"{x['scores'][key]:.4f}" for key in ("ndcg@10", "recall@100") for x in (before, result)]
                cells += [f"{result['steps']} ({result['planned']})", seconds(result), f"{result['wall']:.0f}"]
                cells.append(f"{result['processor'] / result['steps']:.3f}")
                yield f"| {seed} | {NAMES[run]} | {' | '.join(cells)} |"
    for run in runs:
        done = [found[run]["scores"] for found in seeds.values() if run in found]
        if len(done) > 1:
            ndcg, recall = (statistics.mean(each[key] for each in done) for key in ("ndcg@10", "recall@100"))
            yield f"| **mean** | {NAMES[run]} | | **{ndcg:.4f}** | | {recall:.4f} | | | | |"


def mining(seeds: Mapping[str, Found]) -> Iterator[str]:
    """Yield lines about the audits of mining."""
    for seed, found in seeds.items():
        for name, audit in found.get("mine", {}).get("audits", {}).items():
            yield (
                f"* Seed {seed}, `{name}`: {audit['queries']:,} queries, {audit['kept']:,} negatives, "
                f"{audit['queries_with_none']:,} queries without any; dropped as known positives "
                f"{audit['dropped']['known positive']:,}, "
                f"for their score {audit['dropped']['above max-score-ratio']:,}."
            )
        if "mine" in found:
            yield f"* Seed {seed}: mining took {found['mine']['processor']:.0f} processor seconds, in no run's budget."


def body(seeds: Mapping[str, Found], settings: Mapping[str, Any]) -> str:
    first = next(iter(seeds.values()))
    bm25 = first["start"]["bm25"]
    minutes = f"{settings['minutes']:g}"
    yardstick = f"BM25: nDCG@10 {bm25['ndcg@10']:.4f}, recall@100 {bm25['recall@100']:.4f}."
    lines = [
        f"Each run had {minutes} {RULES} {yardstick}",
        "",
        "## Beside sentence-transformers",
        "",
        *HEADING,
        *rows(seeds, ("theirs", "ours")),
    ]
    if any("mined" in found for found in seeds.values()):
        lines += [
            "",
            "## Mined negatives against none, from the random start",
            "",
            FROM_START,
            "",
            *HEADING,
            *rows(seeds, ("ours", "mined")),
            "",
            *mining(seeds),
        ]
    if any("more-mined" in found for found in seeds.values()):
        lines += [
            "",
            "## Mined negatives against none, from the trained model",
            "",
            FROM_TRAINED,
            "",
            *HEADING,
            *rows(seeds, ("more-none", "more-mined")),
        ]
    return "\n".join(lines)


def write_report(workdir: Path, stages: Sequence[str], settings: Mapping[str, Any], *, name: str) -> Path:
    """Write the dated result file of the stages that have ended."""
    described = {key.replace("_", " "): value for key, value in settings.items() if key != "their_form"}
    described["model"] = SMALL
    described["initial weights"] = "normal, std 0.02, embeddings too (transformers' own)"
    described["optimizer"] = f"{OPTIMIZER}; torch's fused kernel on both sides"
    described["precision"] = "fp32"
    described["theirs"] = FORMS[settings["their_form"]]
    described["ours"] = (
        "recipes.train with optimizer.distributed=false; each batch from one source, sources in proportion, "
        "no text twice in a batch"
    )
    title = f"{settings['minutes']:g} minutes of processor time beside sentence-transformers"
    return write_result(name, title, body(read(workdir, stages), settings), described)
