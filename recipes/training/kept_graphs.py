"""Graphs that pass 1 of a cached step keeps, so that pass 2 does not compute these micro-batches again.

Pass 2 needs the graph of every micro-batch. Pass 1 may keep the graphs of the first ``k`` of ``n`` where memory allows:
a step then costs ``(4 - k/n) F`` in place of ``4 F`` (F: a forward pass of all micro-batches). The gradient is the same
bit for bit, because the kept graph is what pass 2 would compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_embed.bridge.cpu import host
from megatron_embed.recipes.encoding.micro_batches import MicroBatch


@dataclass
class _Graph:
    """What a stage computed from a micro-batch.

    Attributes:
        received: the stage's input from the stage before; None on the first stage.
    """

    received: Tensor | None
    output: Tensor


class KeptGraphs:
    """The graphs of the first micro-batches of a step, on every (virtual) stage of this rank.

    Both passes send the same messages in the same order, so a rank's stages may keep graphs without the other stages'
    knowledge. Tensor- and context-parallel ranks must keep the same number, because a kept micro-batch skips its
    collectives.

    Args:
        micro_batches: those of the step, in the order of both passes.
        count: how many of the first ones to keep.
    """

    def __init__(self, micro_batches: Sequence[MicroBatch], count: int):
        self._kept = {id(micro_batch): number for number, micro_batch in enumerate(micro_batches[:count])}
        self._graphs: dict[tuple[int, int], _Graph] = {}
        # The first stage receives nothing; its output needs some input to have a gradient.
        self._nothing_received = torch.empty(0, requires_grad=True)

    def encode(self, stage: torch.nn.Module, micro_batch: MicroBatch) -> Tensor:
        """Compute a micro-batch in pass 1, and keep its graph if it is one of those to keep."""
        tokens = micro_batch.tokens.to(host.device())
        number = self._kept.get(id(micro_batch))
        if number is None:
            with torch.no_grad():
                return stage(tokens)
        received = _received(stage)
        with torch.enable_grad():
            output = stage(tokens)
        self._graphs[id(stage), number] = _Graph(received, output)
        return _alias(output)

    def replay(self, stage: torch.nn.Module, micro_batch: MicroBatch) -> Tensor:
        """Return a micro-batch's output in pass 2: from its kept graph, or computed anew."""
        number = self._kept.get(id(micro_batch))
        if number is None:
            return stage(micro_batch.tokens.to(host.device()))
        received = _received(stage)
        graph = self._graphs.pop((id(stage), number))
        return _Replay.apply(self._nothing_received if received is None else received, graph)


def _received(stage: torch.nn.Module) -> Tensor | None:
    """Return the tensor that the schedule gave to a stage by ``set_input_tensor``."""
    encoder = getattr(stage, "module", stage)  # without its DDP wrapper
    return encoder.decoder.input_tensor


def _alias(output: Tensor) -> Tensor:
    """Return another tensor with the same storage, which the schedule may free (``.data = empty(1)``) by itself."""
    return torch.empty(0, dtype=output.dtype, device=output.device).set_(output.detach())


class _Replay(torch.autograd.Function):
    """The output of a kept graph, whose backward goes on through that graph.

    The schedule's input of pass 2 has the same values as that of pass 1; it takes the gradient of the latter.
    """

    @staticmethod
    def forward(ctx: Any, received: Tensor, graph: _Graph) -> Tensor:
        ctx.graph = graph
        return _alias(graph.output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        graph, ctx.graph = ctx.graph, None
        torch.autograd.backward(graph.output, grads[0])
        return None if graph.received is None else graph.received.grad, None
