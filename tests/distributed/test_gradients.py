"""The gradient of every parameter under every layout, against Hugging Face modules and hand-written InfoNCE."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.contrastive import Case, failures_of

from megatron_embed.bridge.layout import Layout


def matrix(world: int) -> list[Case]:
    """Every combination of TP, PP, CP and DP of 1 or 2 that makes up the world (what is left over is data parallel)."""
    layouts = {
        2: [Layout(), Layout(tp=2), Layout(pp=2), Layout(cp=2), Layout(pp=2, vpp=2)],
        4: [
            Layout(tp=2, pp=2),
            Layout(tp=2, cp=2),
            Layout(tp=2),
            Layout(pp=2, cp=2),
            Layout(pp=2),
            Layout(cp=2),
            Layout(tp=2, pp=2, vpp=2),
            Layout(pp=2, cp=2, vpp=2),
            Layout(pp=2, vpp=2),
            Layout(tp=4),
            Layout(cp=4),
            Layout(),
        ],
    }[world]
    cases = [
        Case(layout, mode, torch.float32, packed)
        for layout in layouts
        for mode in (("cached",) if layout.vpp else ("direct", "cached"))
        for packed in (False, True)
    ]
    in_fp64 = [replace(case, dtype=torch.float64) for case in cases if case.packed == (case.mode == "cached")]
    # every layout keeps some of its graphs, or all
    half = [replace(case, kept=2 if case.packed else 100) for case in cases if case.mode == "cached"]
    extra = Case(layouts[1] if world == 2 else layouts[0], "cached", torch.float32, packed=True)
    options = [{"sequence_parallel": False}, {"recompute": "selective"}, {"recompute": "full"}]
    options += [{"onednn": True}, {"onednn": True, "sequence_parallel": False}]
    return [*cases, *half, *in_fp64, *(replace(extra, **option) for option in options)]


def qwen3_matrix(world: int) -> list[Case]:
    """Every layout once, packed and padded by turns; tensor-parallel ranks share the norms of queries and keys."""
    by_layout = {case.layout: case for case in matrix(world) if case.dtype == torch.float64 and case.packed}
    padded = {case.layout: case for case in matrix(world) if case.dtype == torch.float64 and not case.packed}
    cases = [padded.get(layout, case) if i % 2 else case for i, (layout, case) in enumerate(by_layout.items())]
    extra = Case(Layout(tp=2), "cached", torch.float32, packed=True)
    cases += [extra, replace(extra, sequence_parallel=False), replace(extra, recompute="selective")]
    return [replace(case, family="qwen3") for case in cases]


@pytest.mark.parametrize("world", [2, 4])
def test_gradients_equal_one_process(world: int) -> None:
    failures = failures_of(world, matrix(world))
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("world", [2, 4])
def test_gradients_of_qwen3_equal_one_process(world: int) -> None:
    failures = failures_of(world, qwen3_matrix(world))
    assert not failures, "\n".join(failures)
