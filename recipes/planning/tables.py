"""Format plans as tables, as notes and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, astuple
from typing import Any

from rich.table import Table

from megatron_embed.recipes.config.schema import LAYOUT_KEYS, RecipeConfig
from megatron_embed.recipes.planning.layouts import TOLERANCE, Plan, recommend


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        name = column == "layout"
        table.add_column(column, justify="left" if name else "right", no_wrap=name)
    return table


def memory_table(recipe: str, world_size: int, gpu_memory: float, plans: Sequence[Plan]) -> Table:
    """Return the memory of each layout by its parts; layouts that do not fit into ``gpu_memory`` GiB are dimmed."""
    columns = ["layout", "params", "grads", "Adam: sharded", "whole", "activ.: none", "selective", "full", "loss"]
    title = f"{recipe} on {world_size} rank{'s' if world_size > 1 else ''}: GiB on the fullest rank"
    table = _table(title, [*columns, "recompute", "total"])
    for plan in plans:
        memory, fits = plan.worst, plan.fits(gpu_memory)
        sizes = [memory.parameters, memory.gradients, memory.optimizer_sharded, memory.optimizer_whole]
        sizes += [*memory.activations.values(), memory.loss]
        total = f"{_gib(plan.total)}{'' if fits else ' !'}"
        table.add_row(_short(plan), *map(_gib, sizes), plan.recompute, total, style=None if fits else "dim")
    return table


def step_table(plans: Sequence[Plan]) -> Table:
    """Return the traffic of the busiest rank, the bubble and the time of a step, for each layout."""
    columns = ["layout", "loss", "micro-batches", "TP", "PP", "CP", "DP", "loss", "total", "bubble", "time"]
    table = _table("GiB that the busiest rank sends in a step; bubble and time of a step", columns)
    for plan in plans:
        step, sent = plan.step, plan.busiest
        volumes = map(_gib, (*astuple(sent), sent.total))
        times = (f"{plan.bubble:.0%}", f"{plan.seconds:.3g} s")
        table.add_row(_short(plan), step.mode, str(len(step.micro_batches)), *volumes, *times)
    return table


def stage_table(plan: Plan) -> Table:
    """Return the memory of one layout by pipeline stage."""
    columns = ["PP rank", "layers", "parameters", "gradients", "Adam", "sharded", "whole"]
    columns += ["act. none", "act. selective", "act. full", "loss", "working", f"total, {plan.recompute}"]
    table = _table(f"{_name(plan)}: GiB on the fullest rank of each stage", columns)
    pp = plan.layout.pp
    for pp_rank, memory in enumerate(plan.stages):
        sizes = [memory.parameters, memory.gradients, memory.optimizer, memory.optimizer_sharded]
        sizes += [memory.optimizer_whole, *memory.activations.values(), memory.loss, memory.working[plan.recompute]]
        layers = " + ".join(map(str, plan.layers[pp_rank::pp]))
        table.add_row(str(pp_rank), layers, *map(_gib, sizes), _gib(memory.total(plan.recompute)))
    return table


def traffic_table(plan: Plan) -> Table:
    """Return the traffic of a rank in a step, for each pipeline stage."""
    of_tensor = "all-gather, reduce-scatter" if plan.sequence_parallel else "all-reduce"
    columns = ["PP rank", f"TP: {of_tensor}", "PP: point to point", "CP: keys and values", "DP: gradients"]
    table = _table("GiB that a rank sends in a step", [*columns, "loss: embeddings", "total"])
    for pp_rank, sent in enumerate(plan.sent):
        table.add_row(str(pp_rank), *map(_gib, (*astuple(sent), sent.total)))
    return table


def _gib(size: int) -> str:
    value = size / (1 << 30)
    return "0" if size == 0 else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _name(plan: Plan) -> str:
    return f"{plan.layout} × DP {plan.replicas}"


def _short(plan: Plan) -> str:
    layout = plan.layout
    virtual = f"×{layout.vpp}" if layout.vpp else ""
    return f"TP {layout.tp} PP {layout.pp}{virtual} CP {layout.cp} DP {plan.replicas}"


def _keys(plan: Plan) -> str:
    """Return the overrides that choose a plan."""
    layout = plan.layout
    sizes = (layout.tp, layout.pp, layout.cp, layout.vpp or "null")
    words = [f"{key}={size}" for key, size in zip(LAYOUT_KEYS, sizes, strict=True)]
    return " ".join([*words, f"model.recompute={plan.recompute}"])


def notes(cfg: RecipeConfig, gpu_memory: float, plans: Sequence[Plan], own: Plan | None) -> list[str]:
    """Return notes that explain the figures and recommend a layout.

    Args:
        own: the plan of the layout that the user chose; None if the user asked about all layouts.
    """
    on = "a CPU" if cfg.device == "cpu" else "GPUs with fused kernels; Transformer Engine may differ"
    assumed = (
        f"Every text at its greatest length ({cfg.data.query_max_length}, {cfg.data.passage_max_length} tokens), "
        f"{cfg.model.precision}, activations of {on}; time: an estimate to compare layouts by."
    )
    lines = [assumed]
    if own is not None:
        step, fits = own.step, "fits" if own.fits(gpu_memory) else "does not fit"
        lines.append(
            f"{_name(own)}: {len(step.micro_batches)} micro-batches of at most {step.largest.tokens} tokens, loss.mode "
            f"{step.mode} (forward passes: {step.forwards:g}), bubble {own.bubble:.1%} of the computing time, "
            f"about {own.seconds:.3g} s a step; {_gib(own.total)} GiB with recompute {own.recompute} {fits} into "
            f"{gpu_memory:g} GiB."
        )
    return [*lines, _recommendation(gpu_memory, plans)]


def _recommendation(gpu_memory: float, plans: Sequence[Plan]) -> str:
    best, fitting = recommend(list(plans), gpu_memory), sum(plan.fits(gpu_memory) for plan in plans)
    if best is None:
        nearest = plans[0]
        return (
            f"Recommended: none of {len(plans)} layouts fits into {gpu_memory:g} GiB; {_name(nearest)} comes "
            f"nearest with {_gib(nearest.total)} GiB: more ranks, or a smaller train.micro_batch_tokens"
        )
    return (
        f"Recommended: {_name(best)}, recompute {best.recompute}: of {fitting} layouts (of {len(plans)}) that fit into "
        f"{gpu_memory:g} GiB the simplest within {TOLERANCE:.0%} of the quickest, with {_gib(best.total)} GiB on "
        f"the fullest rank, {_gib(best.busiest.total)} GiB sent a step, bubble {best.bubble:.0%}: {_keys(best)}"
    )


def as_json(
    cfg: RecipeConfig, world_size: int, gpu_memory: float, plans: Sequence[Plan], own: Plan | None
) -> dict[str, Any]:
    """Return all plans as plain values, sizes in bytes; ``own`` is that of :func:`notes`."""
    best = recommend(list(plans), gpu_memory)
    return {
        "recipe": cfg.recipe,
        "model": cfg.model.hf_model,
        "world_size": world_size,
        "gpu_memory_gib": gpu_memory,
        "recommended": None if best is None else _plan_as_json(best, gpu_memory),
        "layouts": [_plan_as_json(plan, gpu_memory) for plan in ([own] if own is not None else plans)],
    }


def _plan_as_json(plan: Plan, gpu_memory: float) -> dict[str, Any]:
    layout, step = plan.layout, plan.step
    return {
        "tensor": layout.tp,
        "pipeline": layout.pp,
        "virtual_pipeline": layout.vpp,
        "context": layout.cp,
        "data": plan.replicas,
        "sequence_parallel": plan.sequence_parallel,
        "recompute": plan.recompute,
        "layers": plan.layers,
        "loss_mode": step.mode,
        "micro_batches": len(step.micro_batches),
        "micro_batch_tokens": step.largest.tokens,
        "stages": [
            {**asdict(memory), "total": memory.total(plan.recompute), "sent": {**asdict(sent), "total": sent.total}}
            for memory, sent in zip(plan.stages, plan.sent, strict=True)
        ],
        "total_bytes": plan.total,
        "sent_bytes": plan.busiest.total,
        "bubble": plan.bubble,
        "estimated_seconds": plan.seconds,
        "fits": plan.fits(gpu_memory),
    }
