"""Set up megatron-core's DDP, optimizer and learning-rate schedule for the recipe."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import optimizer as mcore_optimizer
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import (
    OptimizerConfig,
    ParamKey,
    clip_grads,
    distrib_optimizer,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer import optimizer as mixed_precision
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import local_multi_tensor_scale
from torch import Tensor

from megatron_embed.bridge.cpu import host
from megatron_embed.bridge.encoder import EncoderStage
from megatron_embed.recipes.config.schema import OptimizerSection
from megatron_embed.recipes.planning.gradient_buckets import bucket_size


class FusedAdamW(torch.optim.Optimizer):
    """torch's fused AdamW kernel behind the interface of Apex's and Transformer Engine's FusedAdam.

    This class exists for one reason: megatron-core's checkpoints expect one step count for each parameter *group*, as
    those two keep it. torch's own AdamW keeps one for each parameter, which megatron-core fails to load (or, worse,
    shares among all).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        **_unused: Any,
    ):
        assert adam_w_mode, "weight decay is decoupled"
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            # Count for empty groups too, because the checkpoint stores one rank's count for all ranks.
            group["step"] = group.get("step", 0) + 1
            # The distributed optimizer gives a rank empty slices of parameters that other ranks hold.
            params = [p for p in group["params"] if p.grad is not None and p.numel()]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            step = torch.full((), float(group["step"]), device=params[0].device)  # no copy from the host
            beta1, beta2 = group["betas"]
            torch._fused_adamw_(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                [step] * len(params),
                lr=group["lr"],
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )


def _scale(chunk_size: int, noop_flag: Tensor, tensors: list[list[Tensor]], factor: float) -> None:
    """Scale tensors as Apex's ``multi_tensor_scale`` does; megatron-core's fallback makes two passes, via a copy."""
    for source, into in zip(*tensors, strict=True):
        torch.mul(source, factor, out=into)


def _l2_norm(chunk_size: int, noop_flag: Tensor, tensors: list[list[Tensor]], per_tensor: bool) -> tuple[Tensor, None]:
    """Return the norm of all tensors; megatron-core's fallback reads one number for each tensor on the host."""
    norms = [norm for each in tensors for norm in torch._foreach_norm(each)]
    return torch.stack(norms).norm()[None], None


def _use_fused_kernels() -> None:
    """Make megatron-core use :class:`FusedAdamW` if neither Transformer Engine nor Apex is installed.

    So it does in a process that computes on a CPU beside one of these, whose kernels take CUDA's tensors alone.
    """
    if not mcore_optimizer.USING_PYTORCH_OPTIMIZER and not host.cuda_is_hidden():
        return
    if host.cuda_is_hidden():
        mixed_precision.multi_tensor_scale_impl = local_multi_tensor_scale
    mcore_optimizer.USING_PYTORCH_OPTIMIZER = False
    mcore_optimizer.Adam = distrib_optimizer.Adam = FusedAdamW
    clip_grads.multi_tensor_scale_impl = _scale
    clip_grads.l2_norm_impl = _l2_norm
    distrib_optimizer.HAVE_APEX_OR_TE = True
    distrib_optimizer.USING_APEX_OPTIMIZER = True


@dataclass
class TrainState:
    """The model in training, with its optimizer and schedule."""

    stages: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler

    @property
    def encoders(self) -> list[EncoderStage]:
        """The stages without their data-parallel wrappers."""
        return [stage.module for stage in self.stages]


class _DDP(DistributedDataParallel):
    """megatron-core's DDP, but freed with its last reference.

    megatron-core's hooks on autograd's nodes refer to the wrapper, and the wrapper and the optimizer's shards refer to
    the nodes. The garbage collector cannot see a cycle that runs through autograd, so the model, its buffers and its
    process groups (with their polling threads) would live as long as the process.
    """

    def _make_backward_post_hook(self, param: torch.nn.Parameter) -> Callable[..., None]:
        hook: Callable[..., None] = DistributedDataParallel._make_backward_post_hook(weakref.proxy(self), param)
        return hook


def wrap_ddp(
    encoders: list[EncoderStage], *, distributed_optimizer: bool = False, overlap: bool = False
) -> list[DistributedDataParallel]:
    """Wrap this rank's stages in megatron-core's DDP, which buffers gradients and reduces them in fp32 or wider.

    Args:
        overlap: reduce a bucket of gradients as soon as backward has filled it.
    """
    transformer = encoders[0].config
    half = transformer.params_dtype in (torch.bfloat16, torch.float16)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=half,
        use_distributed_optimizer=distributed_optimizer,
        overlap_grad_reduce=overlap,
        bucket_size=bucket_size(parallel_state.get_data_parallel_world_size()) if overlap else None,
    )
    stages = [
        _DDP(config=transformer, ddp_config=ddp_config, module=encoder, disable_bucketing=i > 0)
        for i, encoder in enumerate(encoders)
    ]
    syncs = [stage.no_sync for stage in stages]
    transformer.no_sync_func = syncs if len(stages) > 1 else syncs[0]
    transformer.finalize_model_grads_func = finalize_model_grads
    return stages


#: the learned temperature's name inside the DDP wrapper, see :func:`temperature_group`
_TEMPERATURE = ParamKey(name="*.log_temperature")


def temperature_group(section: OptimizerSection) -> dict[str, Any]:
    """Return the settings that distinguish the learned temperature's parameter group in megatron-core.

    megatron-core identifies a group in a checkpoint by keys such as ``is_decoupled_lr``. Without that key this group
    would pass for that of the norms, which also have no weight decay.
    """
    # The group follows the schedule between min_lr and lr, scaled.
    least = section.min_lr * section.temperature_lr / section.lr
    return {"max_lr": section.temperature_lr, "min_lr": least, "wd_mult": 0.0, "is_decoupled_lr": True}


def reset_groups(optimizer: MegatronOptimizer, section: OptimizerSection) -> None:
    """Restore the recipe's learning rates in the parameter groups after a load put the other run's rates there.

    The schedule reads these rates. Also restore the number of updates: Transformer Engine's optimizer counts none for a
    group that is empty on its rank, and the checkpoint stores the groups of the first rank.
    """
    steps = max(group.get("step", 0) for group in optimizer.param_groups)
    for group in optimizer.param_groups:
        rates = {"max_lr": section.lr, "min_lr": section.min_lr}
        group.update(temperature_group(section) if group["is_decoupled_lr"] else rates)
        if steps:
            group["step"] = steps


def set_up_training(encoders: list[EncoderStage], section: OptimizerSection, *, train_iters: int) -> TrainState:
    """Set up DDP, AdamW and the schedule for stages with loaded weights (main parameters are copied from them).

    Matrices have weight decay. Norms have none. A learned temperature has none and has its own learning rate.
    """
    _use_fused_kernels()
    transformer = encoders[0].config
    stages = wrap_ddp(encoders, distributed_optimizer=section.distributed, overlap=section.overlap_grad_reduce)
    config = OptimizerConfig(
        optimizer="adam",
        lr=section.lr,
        min_lr=section.min_lr,
        weight_decay=section.weight_decay,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_eps=1e-8,
        # 0 would also skip the norm that the run logs.
        clip_grad=section.clip_grad or float("inf"),
        bf16=transformer.bf16,
        fp16=transformer.fp16,
        params_dtype=transformer.params_dtype,
        use_distributed_optimizer=section.distributed,
        initial_loss_scale=2.0**16,
    )
    overrides = {**get_standard_config_overrides(config), _TEMPERATURE: temperature_group(section)}
    optimizer = get_megatron_optimizer(config, stages, overrides, use_gloo_process_groups=False)
    transformer.grad_scale_func = optimizer.scale_loss
    warmup = section.warmup_iters if section.warmup_iters is not None else train_iters // 10
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=section.lr,
        min_lr=section.min_lr,
        lr_warmup_steps=min(warmup, max(train_iters - 1, 0)),
        lr_decay_steps=train_iters,
        lr_decay_style=section.lr_decay_style,
        start_wd=section.weight_decay,
        end_wd=section.weight_decay,
        wd_incr_steps=train_iters,
        wd_incr_style="constant",
    )
    return TrainState(stages, optimizer, scheduler)


def gradients(stages: list[DistributedDataParallel]) -> dict[str, Tensor]:
    """Return this rank's gradients after a step, before the optimizer uses them: checkpoint name → gradient."""
    from megatron_embed.bridge.mapping import checkpoint_name

    return {
        checkpoint_name(name, layer_offset=stage.module.layer_offset): parameter.main_grad
        for stage in stages
        for name, parameter in stage.module.named_parameters()
    }
