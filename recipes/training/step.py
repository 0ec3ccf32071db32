"""One contrastive step with the exact gradient of the global batch, on megatron-core's pipeline schedules.

The loss depends on the parameters only through the embeddings, so ``∂L/∂θ = Σ_i (∂L/∂e_i)ᵀ ∂e_i/∂θ``. Two modes
compute it, at the cost of F for a forward pass:

* ``cached`` (GradCache, Gao et al. 2021): pass 1 encodes without a graph; the loss gives ``g_i = ∂L/∂e_i``; pass 2
  runs the ordinary schedule on ``Σ e_i · g_i``. It allows any number of micro-batches and any layout, and costs 4F,
  or ``(4 - k/n) F`` if pass 1 keeps the graphs of k of n micro-batches (:mod:`.kept_graphs`).
* ``direct``: if the rank's whole batch is one micro-batch, autograd differentiates its loss, at 3F.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_embed.bridge.cpu import host
from megatron_embed.bridge.encoder import EncoderStage
from megatron_embed.bridge.sequences import to_device
from megatron_embed.recipes.encoding.micro_batches import MicroBatch
from megatron_embed.recipes.encoding.schedule import encode_micro_batches, run_schedule, share_last_stage
from megatron_embed.recipes.training.kept_graphs import KeptGraphs
from megatron_embed.recipes.training.loss import ContrastiveLoss
from megatron_embed.recipes.training.targets import Targets


class StepLoss(NamedTuple):
    """The loss of a step's global batch, and the number of its queries whose every negative is masked.

    Both are numbers of the device in fp64, the same on every rank.
    """

    loss: Tensor
    alone: Tensor


def contrastive_step(
    stages: Sequence[torch.nn.Module],
    micro_batches: Sequence[MicroBatch],
    targets: Targets,
    loss: ContrastiveLoss,
    *,
    mode: Literal["direct", "cached"],
    kept: int = 0,
) -> StepLoss:
    """Accumulate the gradient of the global batch's loss into the stages' ``main_grad``.

    Args:
        stages: this rank's pipeline stages, wrapped in megatron-core's DDP, with zeroed gradients.
        micro_batches: this rank's texts; they are the same on all its tensor- and pipeline-parallel ranks.
        targets: the roles of the texts in this rank's part of the batch.
        mode: ``direct`` takes a single micro-batch. Both modes give the same gradient.
        kept: the number of micro-batches whose graphs pass 1 keeps; more than there are means all.
    """
    assert mode == "cached" or len(micro_batches) == 1
    for stage in stages:
        stage.train()
    targets = targets.to(host.device())
    if mode == "direct":
        return _share_loss(_direct(stages, micro_batches, targets, loss))
    return _share_loss(_cached(stages, micro_batches, targets, loss, KeptGraphs(micro_batches, kept)))


def _direct(
    stages: Sequence[torch.nn.Module], micro_batches: Sequence[MicroBatch], targets: Targets, loss: ContrastiveLoss
) -> Tensor | None:
    log_temperature = unwrap(stages)[-1].log_temperature

    def loss_function(micro_batch: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor]:
        order = to_device(torch.argsort(micro_batch.texts), output.device)
        temperature = None
        if log_temperature is not None:
            # Every context-parallel rank computes the whole gradient of the temperature, and DDP adds these up.
            share = log_temperature / parallel_state.get_context_parallel_world_size()
            temperature = (share + (log_temperature - share).detach()).exp()
        value, alone = loss.with_alone(output[order], targets, temperature)
        # The factor turns DDP's average over data-parallel ranks into a sum. The schedule divides it in place.
        return value * loss.world, _both(value, alone)

    losses = run_schedule(stages, micro_batches, loss_function, forward_only=False)
    return losses[0] if losses else None


def _cached(
    stages: Sequence[torch.nn.Module],
    micro_batches: Sequence[MicroBatch],
    targets: Targets,
    loss: ContrastiveLoss,
    graphs: KeptGraphs,
) -> Tensor | None:
    outputs = encode_micro_batches(stages, micro_batches, graphs.encode)
    log_temperature = unwrap(stages)[-1].log_temperature
    found = gradient = temperature_gradient = None
    if outputs is not None:
        order = torch.argsort(torch.cat([micro_batch.texts for micro_batch in micro_batches]))
        leaves = [torch.cat(outputs)[to_device(order, outputs[0].device)].requires_grad_()]
        if log_temperature is not None:
            leaves.append(log_temperature.detach().requires_grad_())
        value, alone = loss.with_alone(leaves[0], targets, *(leaf.exp() for leaf in leaves[1:]))
        gradient, *rest = torch.autograd.grad(value, leaves)
        # The gradients of context-parallel ranks add up, see _direct.
        temperature_gradient = rest[0] / parallel_state.get_context_parallel_world_size() if rest else None
        found = _both(value, alone)
    # The factor cancels the schedule's division by the number of micro-batches and DDP's average over ranks.
    factor = len(micro_batches) * loss.world

    def surrogate(micro_batch: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor]:
        assert gradient is not None
        total = (micro_batch.rows(output) * gradient[to_device(micro_batch.texts, output.device)]).sum()
        if temperature_gradient is not None:
            # Add the temperature's gradient once, but give it one (of 0) in every micro-batch, because DDP with
            # overlapped reduction waits for a gradient in the last one.
            once = 1 if micro_batch is micro_batches[0] else 0
            total = total + (log_temperature * temperature_gradient * once).sum()
        return total * factor, total.detach().clone()

    run_schedule(stages, micro_batches, surrogate, graphs.replay, forward_only=False)
    return found


def _both(loss: Tensor, alone: Tensor) -> Tensor:
    return torch.stack([loss.detach().double(), alone.double()])


def _share_loss(found: Tensor | None) -> StepLoss:
    """Sum the loss and the count over data-parallel ranks and return them on every pipeline stage."""
    values = torch.zeros(2, dtype=torch.float64, device=host.device())
    if found is not None:
        values += found
        dist.all_reduce(values, group=parallel_state.get_data_parallel_group())
    return StepLoss(*share_last_stage(values))


def learned_temperature(stages: Sequence[torch.nn.Module]) -> Tensor:
    """Return the learned temperature that divides the next step's scores: the last stage's parameter, on every rank."""
    value = torch.zeros((), dtype=torch.float64, device=host.device())
    log_temperature = unwrap(stages)[-1].log_temperature
    if log_temperature is not None:
        value += log_temperature.detach().double().exp().squeeze()
    return share_last_stage(value)


class Later:
    """Numbers of the device that the host reads later, without a wait of its own if the host has waited since."""

    def __init__(self, numbers: Sequence[Tensor]):
        values = torch.stack(list(numbers))
        self._copied: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._values = values

    def read(self) -> list[float]:
        """Return the numbers, once they have arrived."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()


def unwrap(stages: Sequence[torch.nn.Module]) -> list[EncoderStage]:
    """Return the encoders without their DDP wrappers, if they have any."""
    return [stage if isinstance(stage, EncoderStage) else stage.module for stage in stages]
