"""One contrastive step with the exact gradient of the global batch, on megatron-core's pipeline schedules.

The loss depends on the parameters only through the embeddings, so ``∂L/∂θ = Σ_i (∂L/∂e_i)ᵀ ∂e_i/∂θ``. Two modes
compute it, at the cost of F for a forward pass:

* ``cached`` (GradCache, Gao et al. 2021): pass 1 encodes without a graph; the loss gives ``g_i = ∂L/∂e_i``; pass 2
  runs the ordinary schedule on ``Σ e_i · g_i``. It allows any number of micro-batches and any layout, and costs 4F.
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
from megatron_embed.bridge.encoder import Encoder
from megatron_embed.recipes.encoding.micro_batches import MicroBatch
from megatron_embed.recipes.encoding.schedule import encode_micro_batches, run_schedule
from megatron_embed.recipes.training.loss import ContrastiveLoss
from megatron_embed.recipes.training.targets import Targets


class StepLoss(NamedTuple):
    """The loss of a step's global batch, and the number of its queries whose every negative is masked."""

    loss: float
    alone: int


def contrastive_step(
    stages: Sequence[torch.nn.Module],
    micro_batches: Sequence[MicroBatch],
    targets: Targets,
    loss: ContrastiveLoss,
    *,
    mode: Literal["direct", "cached"],
) -> StepLoss:
    """Accumulate the gradient of the global batch's loss into the stages' ``main_grad``.

    Args:
        stages: this rank's pipeline stages, wrapped in megatron-core's DDP, with zeroed gradients.
        micro_batches: this rank's texts; they are the same on all its tensor- and pipeline-parallel ranks.
        targets: the roles of the texts in this rank's part of the batch.
        mode: ``direct`` takes a single micro-batch. Both modes give the same gradient.

    Returns:
        The same numbers on every rank.
    """
    assert mode == "cached" or len(micro_batches) == 1
    for stage in stages:
        stage.train()
    compute = _direct if mode == "direct" else _cached
    return _share_loss(compute(stages, micro_batches, targets.to(host.device()), loss))


def _direct(
    stages: Sequence[torch.nn.Module], micro_batches: Sequence[MicroBatch], targets: Targets, loss: ContrastiveLoss
) -> Tensor | None:
    log_temperature = unwrap(stages)[-1].log_temperature

    def loss_function(micro_batch: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.argsort(micro_batch.texts).to(output.device)
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
    stages: Sequence[torch.nn.Module], micro_batches: Sequence[MicroBatch], targets: Targets, loss: ContrastiveLoss
) -> Tensor | None:
    outputs = encode_micro_batches(stages, micro_batches)
    log_temperature = unwrap(stages)[-1].log_temperature
    found = gradient = temperature_gradient = None
    if outputs is not None:
        texts = torch.cat([micro_batch.texts for micro_batch in micro_batches]).to(outputs[0].device)
        leaves = [torch.cat(outputs)[torch.argsort(texts)].requires_grad_()]
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
        total = (micro_batch.rows(output) * gradient[micro_batch.texts.to(output.device)]).sum()
        if temperature_gradient is not None:
            # Add the temperature's gradient once, but give it one (of 0) in every micro-batch, because DDP with
            # overlapped reduction waits for a gradient in the last one.
            once = 1 if micro_batch is micro_batches[0] else 0
            total = total + (log_temperature * temperature_gradient * once).sum()
        return total * factor, total.detach().clone()

    run_schedule(stages, micro_batches, surrogate, forward_only=False)
    return found


def _both(loss: Tensor, alone: Tensor) -> Tensor:
    return torch.stack([loss.detach().double(), alone.double()])


def _share_loss(found: Tensor | None) -> StepLoss:
    """Sum the loss and the count over data-parallel ranks and return them on every pipeline stage."""
    values = torch.zeros(2, dtype=torch.float64, device=host.device())
    if found is not None:
        values += found
        dist.all_reduce(values, group=parallel_state.get_data_parallel_group())
    loss, alone = _from_last_stage(values).tolist()
    return StepLoss(loss, int(alone))


def learned_temperature(stages: Sequence[torch.nn.Module]) -> float:
    """Return the learned temperature that divides the next step's scores: the last stage's parameter, on every rank."""
    value = torch.zeros((), dtype=torch.float64, device=host.device())
    log_temperature = unwrap(stages)[-1].log_temperature
    if log_temperature is not None:
        value += log_temperature.detach().double().exp().squeeze()
    return _from_last_stage(value).item()


def _from_last_stage(value: Tensor) -> Tensor:
    """Return the last pipeline stage's numbers on every stage."""
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(
            value,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return value


def unwrap(stages: Sequence[torch.nn.Module]) -> list[Encoder]:
    """Return the encoders without their DDP wrappers, if they have any."""
    return [stage if isinstance(stage, Encoder) else stage.module for stage in stages]
