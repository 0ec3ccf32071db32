"""One contrastive step with the exact gradient of the global batch, through megatron-core's pipeline schedules.

The loss depends on the parameters only through the embeddings, so ``∂L/∂θ = Σ_i (∂L/∂e_i)ᵀ ∂e_i/∂θ``:

* ``cached`` (GradCache, Gao et al. 2021): pass 1 encodes without a graph; the loss gives ``g_i = ∂L/∂e_i``; pass 2
  runs the ordinary schedule on ``Σ e_i · g_i``. Any number of micro-batches, any layout. Costs 4F against 3F.
* ``direct``: where the rank's whole batch is one micro-batch, its loss is simply differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

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


def contrastive_step(
    stages: Sequence[torch.nn.Module],
    micro_batches: Sequence[MicroBatch],
    targets: Targets,
    loss: ContrastiveLoss,
    *,
    mode: Literal["direct", "cached"],
) -> float:
    """Accumulate the gradient of the global batch's loss into the stages' ``main_grad``.

    Args:
        stages: this rank's pipeline stages, wrapped in megatron-core's DDP, gradients zeroed.
        micro_batches: of this rank's texts, the same on all its tensor- and pipeline-parallel ranks.
        targets: how the texts make up this rank's part of the batch.
        mode: ``direct`` takes a single micro-batch. Either gives the same gradient.

    Returns:
        The loss of the global batch, the same number on every rank.
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
            # Every context-parallel rank computes the whole gradient of it, and these are added up.
            share = log_temperature / parallel_state.get_context_parallel_world_size()
            temperature = (share + (log_temperature - share).detach()).exp()
        value = loss(output[order], targets, temperature)
        # DDP averages over data-parallel ranks what is to be summed. Cloned: the schedule divides in place.
        return value * loss.world, value.detach().clone()

    losses = run_schedule(stages, micro_batches, loss_function, forward_only=False)
    return losses[0] if losses else None


def _cached(
    stages: Sequence[torch.nn.Module], micro_batches: Sequence[MicroBatch], targets: Targets, loss: ContrastiveLoss
) -> Tensor | None:
    outputs = encode_micro_batches(stages, micro_batches)
    log_temperature = unwrap(stages)[-1].log_temperature
    value = gradient = temperature_gradient = None
    if outputs is not None:
        texts = torch.cat([micro_batch.texts for micro_batch in micro_batches]).to(outputs[0].device)
        leaves = [torch.cat(outputs)[torch.argsort(texts)].requires_grad_()]
        if log_temperature is not None:
            leaves.append(log_temperature.detach().requires_grad_())
        value = loss(leaves[0], targets, *(leaf.exp() for leaf in leaves[1:]))
        gradient, *rest = torch.autograd.grad(value, leaves)
        # see _direct: context-parallel ranks add up
        temperature_gradient = rest[0] / parallel_state.get_context_parallel_world_size() if rest else None
        value = value.detach()
    # cancels the schedule's division by the number of micro-batches and DDP's average over ranks
    factor = len(micro_batches) * loss.world

    def surrogate(micro_batch: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor]:
        assert gradient is not None
        total = (micro_batch.rows(output) * gradient[micro_batch.texts.to(output.device)]).sum()
        if temperature_gradient is not None:
            # once, but a gradient in every micro-batch: DDP, under overlapped reduction, waits for one in the last
            once = 1 if micro_batch is micro_batches[0] else 0
            total = total + (log_temperature * temperature_gradient * once).sum()
        return total * factor, total.detach().clone()

    run_schedule(stages, micro_batches, surrogate, forward_only=False)
    return value


def _share_loss(loss: Tensor | None) -> float:
    """Sum over data-parallel ranks, told to every pipeline stage."""
    value = torch.zeros((), dtype=torch.float64, device=host.device())
    if loss is not None:
        value += loss
        dist.all_reduce(value, group=parallel_state.get_data_parallel_group())
    return _from_last_stage(value)


def learned_temperature(stages: Sequence[torch.nn.Module]) -> float:
    """What the next step divides scores by, where it is learned: the last stage's parameter, told to every rank."""
    value = torch.zeros((), dtype=torch.float64, device=host.device())
    log_temperature = unwrap(stages)[-1].log_temperature
    if log_temperature is not None:
        value += log_temperature.detach().double().exp().squeeze()
    return _from_last_stage(value)


def _from_last_stage(value: Tensor) -> float:
    """The number that the last pipeline stage has, on every stage."""
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(
            value,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return value.item()


def unwrap(stages: Sequence[torch.nn.Module]) -> list[Encoder]:
    """The encoders inside their DDP wrappers, if they have any."""
    return [stage if isinstance(stage, Encoder) else stage.module for stage in stages]
