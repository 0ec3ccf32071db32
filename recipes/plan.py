"""Memory, communication and pipeline bubble of a recipe's layouts: ``python -m megatron_embed.recipes.plan RECIPE``.

Needs neither weights nor GPUs: a model's ``config.json`` is enough, and the hub ids of the recipes are known.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_embed.conversion.arguments import positive, whole
from megatron_embed.recipes.cli import FirstRankParser, read_words, run_program
from megatron_embed.recipes.config import RecipeConfig

if TYPE_CHECKING:
    from rich.table import Table

    from megatron_embed.recipes.planning import Plan

_LAYOUT_KEYS = (
    "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size",
    "model.context_parallel_size",
    "model.virtual_pipeline_model_parallel_size",
)


@dataclass(frozen=True)
class PlanArguments:
    """What the command line asks for.

    Attributes:
        given: whether the overrides say the layout.
        recompute: as the overrides say it; None: they do not, and the least that fits is taken.
    """

    cfg: RecipeConfig
    given: bool
    recompute: str | None
    world_size: int
    gpu_memory: float
    gpus_per_node: int
    top: int
    json: Path | None
    debug: bool


def parse_arguments(argv: Sequence[str] | None = None) -> PlanArguments:
    """Bad arguments end the program with status 2 and one message."""
    parser = FirstRankParser(
        prog="megatron_embed.recipes.plan",
        description="Memory, communication and bubble of a recipe's layouts: of the one that the keys "
        "model.*_parallel_size say, or of all that the world allows.",
        usage="%(prog)s RECIPE --world-size W [--gpu-memory GIB] [--json FILE] [section.key=value …]",
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs="*", metavar="RECIPE | section.key=value", help="what to plan")
    parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="plan this run_config.yaml")
    parser.add_argument("--world-size", type=positive, required=True, metavar="W", help="ranks")
    parser.add_argument("--gpu-memory", type=_size, default=80.0, metavar="GIB", help="of each GPU (80)")
    parser.add_argument("--gpus-per-node", type=positive, default=8, metavar="N", help="with fast links (8)")
    parser.add_argument("--top", type=whole, default=25, metavar="N", help="layouts in the table (25); 0: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there too, in bytes")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_intermixed_args(argv)
    cfg, words = read_words(args)
    keys = {word.partition("=")[0] for word in words}
    return PlanArguments(
        cfg,
        given=not keys.isdisjoint(_LAYOUT_KEYS),
        recompute=cfg.model.recompute if "model.recompute" in keys else None,
        world_size=args.world_size,
        gpu_memory=args.gpu_memory,
        gpus_per_node=args.gpus_per_node,
        top=args.top,
        json=args.json,
        debug=args.debug,
    )


def _size(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise argparse.ArgumentTypeError(f"found {text!r}; wanted a number above 0")
    return size


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Exit status 0: done; 1: failed, with one message; 2: bad arguments."""
    args = parse_arguments(argv)
    run_program(lambda: _report(args), debug=args.debug)


def _report(args: PlanArguments) -> None:
    from rich.console import Console

    from megatron_embed.recipes.planning import choose, plan_layout, plan_world
    from megatron_embed.recipes.sizes import encoder_of

    config = encoder_of(args.cfg)
    own: Plan | None = None
    if args.given:
        of_layout = plan_layout(args.cfg, config, args.world_size, gpus_per_node=args.gpus_per_node)
        own = choose(of_layout, args.gpu_memory, args.recompute)
    plans = plan_world(
        args.cfg,
        config,
        args.world_size,
        gpu_memory=args.gpu_memory,
        recompute=args.recompute,
        gpus_per_node=args.gpus_per_node,
    )
    console = Console()
    console.width = console.width if console.is_terminal else 200
    if own is not None:
        console.print(_stage_table(own))
        console.print(_traffic_table(own))
    else:
        shown = plans[: args.top] if args.top > 0 else plans
        console.print(_memory_table(args, shown))
        console.print(_step_table(shown))
        if len(plans) > len(shown):
            console.print(f"{len(plans) - len(shown)} more layouts: --top 0 shows all", highlight=False)
    for line in _notes(args, plans, own):
        console.print(line, highlight=False, soft_wrap=True)
    if args.json is not None:
        args.json.write_text(json.dumps(_as_json(args, plans, own), indent=1) + "\n", encoding="utf-8")


def _table(title: str, columns: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        name = column == "layout"
        table.add_column(column, justify="left" if name else "right", no_wrap=name)
    return table


def _memory_table(args: PlanArguments, plans: Sequence[Plan]) -> Table:
    columns = ["layout", "params", "grads", "Adam: sharded", "whole", "activ.: none", "selective", "full", "loss"]
    title = f"{args.cfg.recipe} on {args.world_size} rank{'s' if args.world_size > 1 else ''}: GiB on the fullest rank"
    table = _table(title, [*columns, "recompute", "total"])
    for plan in plans:
        memory, fits = plan.worst, plan.fits(args.gpu_memory)
        sizes = [memory.parameters, memory.gradients, memory.optimizer_sharded, memory.optimizer_whole]
        sizes += [*memory.activations.values(), memory.loss]
        total = f"{_gib(plan.total)}{'' if fits else ' !'}"
        table.add_row(_short(plan), *map(_gib, sizes), plan.recompute, total, style=None if fits else "dim")
    return table


def _step_table(plans: Sequence[Plan]) -> Table:
    columns = ["layout", "loss", "micro-batches", "TP", "PP", "CP", "DP", "loss", "total", "bubble", "time"]
    table = _table("GiB that the busiest rank sends in a step; bubble and time of a step", columns)
    for plan in plans:
        step, sent = plan.step, plan.busiest
        volumes = map(_gib, (sent.tensor, sent.pipeline, sent.context, sent.data, sent.loss, sent.total))
        times = (f"{plan.bubble:.0%}", f"{plan.seconds:.3g} s")
        table.add_row(_short(plan), step.mode, str(len(step.micro_batches)), *volumes, *times)
    return table


def _stage_table(plan: Plan) -> Table:
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


def _traffic_table(plan: Plan) -> Table:
    of_tensor = "all-gather, reduce-scatter" if plan.sequence_parallel else "all-reduce"
    columns = ["PP rank", f"TP: {of_tensor}", "PP: point to point", "CP: keys and values", "DP: gradients"]
    table = _table("GiB that a rank sends in a step", [*columns, "loss: embeddings", "total"])
    for pp_rank, sent in enumerate(plan.sent):
        volumes = (sent.tensor, sent.pipeline, sent.context, sent.data, sent.loss, sent.total)
        table.add_row(str(pp_rank), *map(_gib, volumes))
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
    """The overrides that choose a plan."""
    layout = plan.layout
    sizes = (layout.tp, layout.pp, layout.cp, layout.vpp or "null")
    words = [f"{key}={size}" for key, size in zip(_LAYOUT_KEYS, sizes, strict=True)]
    return " ".join([*words, f"model.recompute={plan.recompute}"])


def _notes(args: PlanArguments, plans: Sequence[Plan], own: Plan | None) -> list[str]:
    """What the figures mean, and the recommendation."""
    cfg = args.cfg
    on = "a CPU" if cfg.device == "cpu" else "GPUs with fused kernels; Transformer Engine may differ"
    assumed = (
        f"Every text at its greatest length ({cfg.data.query_max_length}, {cfg.data.passage_max_length} tokens), "
        f"{cfg.model.precision}, activations of {on}; time: an estimate to compare layouts by."
    )
    notes = [assumed]
    if own is not None:
        step, fits = own.step, "fits" if own.fits(args.gpu_memory) else "does not fit"
        notes.append(
            f"{_name(own)}: {len(step.micro_batches)} micro-batches of at most {step.largest.tokens} tokens, loss.mode "
            f"{step.mode} (forward passes: {step.forwards}), bubble {own.bubble:.1%} of the computing time, "
            f"about {own.seconds:.3g} s a step; {_gib(own.total)} GiB with recompute {own.recompute} {fits} into "
            f"{args.gpu_memory:g} GiB."
        )
    return [*notes, _recommendation(args, plans)]


def _recommendation(args: PlanArguments, plans: Sequence[Plan]) -> str:
    from megatron_embed.recipes.planning import TOLERANCE, recommend

    best, fitting = recommend(list(plans), args.gpu_memory), sum(plan.fits(args.gpu_memory) for plan in plans)
    if best is None:
        nearest = plans[0]
        return (
            f"Recommended: none of {len(plans)} layouts fits into {args.gpu_memory:g} GiB; {_name(nearest)} comes "
            f"nearest with {_gib(nearest.total)} GiB: more ranks, or a smaller train.micro_batch_tokens"
        )
    return (
        f"Recommended: {_name(best)}, recompute {best.recompute}: of {fitting} layouts (of {len(plans)}) that fit into "
        f"{args.gpu_memory:g} GiB the simplest within {TOLERANCE:.0%} of the quickest, with {_gib(best.total)} GiB on "
        f"the fullest rank, {_gib(best.busiest.total)} GiB sent a step, bubble {best.bubble:.0%}: {_keys(best)}"
    )


def _as_json(args: PlanArguments, plans: Sequence[Plan], own: Plan | None) -> dict[str, Any]:
    from megatron_embed.recipes.planning import recommend

    best = recommend(list(plans), args.gpu_memory)
    return {
        "recipe": args.cfg.recipe,
        "model": args.cfg.model.hf_model,
        "world_size": args.world_size,
        "gpu_memory_gib": args.gpu_memory,
        "recommended": None if best is None else _plan_as_json(best, args.gpu_memory),
        "layouts": [_plan_as_json(plan, args.gpu_memory) for plan in ([own] if own is not None else plans)],
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


if __name__ == "__main__":
    main()
