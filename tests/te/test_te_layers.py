"""Transformer Engine's layers under every layout: losses and gradients are Hugging Face's in one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.contrastive import Case, failures_of
from support.te_worlds import needs_te, run_te_world

from megatron_embed.bridge.layout import Layout

pytestmark = [needs_te, pytest.mark.slow]

LAYOUTS = [Layout(tp=2), Layout(pp=2), Layout(pp=2, vpp=2), Layout(cp=2), Layout()]
BASE = Case(Layout(), "cached", torch.float32, layers="transformer_engine")

QUICK = [
    replace(BASE, layout=Layout(tp=2), packed=True),
    replace(BASE, layout=Layout(tp=2), packed=True, fused=True, recompute="full"),
    replace(BASE, layout=Layout(pp=2), family="qwen3"),
    replace(BASE, layout=Layout(pp=2, vpp=2), packed=True, family="llama"),
    replace(BASE, layout=Layout(cp=2), packed=True),
    replace(BASE, layout=Layout(cp=2), recompute="selective"),
    replace(BASE, layout=Layout(), fused=True, recompute="selective"),
]
MATRIX = [
    replace(BASE, layout=layout, packed=packed, family=family, recompute=recompute, fused=fused)
    for family in ("ministral3", "llama", "qwen3")
    for layout in LAYOUTS
    for packed in (True, False)
    for recompute, fused in (("none", False), ("none", True), ("selective", False), ("full", True))
]


def test_loss_and_gradients_equal_one_process() -> None:
    failures = failures_of(2, QUICK, run_te_world)
    assert not failures, "\n".join(failures)


@pytest.mark.exhaustive
def test_loss_and_gradients_equal_one_process_in_every_combination() -> None:
    failures = failures_of(2, MATRIX, run_te_world)
    assert not failures, "\n".join(failures)
