"""Gradients under layouts of eight ranks, against one process of Hugging Face modules and hand-written InfoNCE.

    python benchmarks/eight_ranks.py

The cases and the comparison are those of ``tests/distributed/test_gradients.py``. That test stops at four ranks,
because eight processes on a small machine take too long for the suite.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from common import write_result

from megatron_embed.bridge.layout import Layout

sys.path.append(str(Path(__file__).parents[1] / "tests"))
sys.path.append(str(Path(__file__).parents[1] / "tests" / "distributed"))
from test_gradients import Case, failures_of

LAYOUTS = (
    Layout(tp=2, pp=2, cp=2),
    Layout(tp=2, pp=2),
    Layout(tp=2, cp=2),
    Layout(pp=2, cp=2),
    Layout(tp=4, pp=2),
    Layout(pp=4, cp=2),
    Layout(tp=2, pp=2, vpp=2),
    Layout(tp=2, pp=2, cp=2, vpp=2),
    Layout(),
)


def main() -> int:
    cases = [
        Case(layout, mode, torch.float32, packed=mode == "cached")
        for layout in LAYOUTS
        for mode in (("cached",) if layout.vpp else ("direct", "cached"))
    ]
    cases += [Case(layout, "cached", torch.float64, packed=True) for layout in LAYOUTS]
    failures = failures_of(8, cases)
    body = ["| case (what is left of 8 ranks is data parallel) | equal |", "|---|---|"]
    body += [f"| {case} | {'no' if any(f.startswith(f'{case}:') for f in failures) else 'yes'} |" for case in cases]
    settings = {"limit": "1e-5 in fp32, 1e-10 in fp64, relative, for every parameter and the temperature"}
    write_result("eight-ranks", "Gradients under eight ranks", "\n".join(body + failures), settings)
    return len(failures)


if __name__ == "__main__":
    sys.exit(main())
