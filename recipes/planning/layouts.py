"""Plans of a recipe over a world: memory, traffic and bubble of each layout, and the recommended one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.errors import UserError
from megatron_embed.bridge.layout import Layout, pipeline_split
from megatron_embed.recipes.config.checks import layout_of, validate, validate_layout
from megatron_embed.recipes.config.schema import RecipeConfig
from megatron_embed.recipes.planning.activations import Activations, in_flight
from megatron_embed.recipes.planning.flops import model_flops
from megatron_embed.recipes.planning.state import FP32, WIDTHS, chunk_parameters, chunks_of, states
from megatron_embed.recipes.planning.step import Step, Traffic, bubble, loss_bytes, step_of, traffic

GIB = 1 << 30
RECOMPUTE = ("none", "selective", "full")

#: Share of a GPU's memory that a plan may fill. CUDA itself, NCCL's buffers and fragmentation take the rest.
USABLE = 0.92
#: Assumptions about each GPU (of an H100's order) behind the estimate of a step's time, which compares layouts: matrix
#: multiplication in operations a second, traffic inside a node and between nodes in bytes a second.
FLOPS, INSIDE, OUTSIDE = 4e14, 3e11, 4e10
#: Times that differ by less than this share count as equal; the simpler layout is then better.
TOLERANCE = 0.05


@dataclass(frozen=True)
class Memory:
    """Bytes of memory on the fullest rank of a pipeline stage.

    Attributes:
        optimizer, optimizer_sharded, optimizer_whole: the optimizer's state as the recipe sets it; with the distributed
            optimizer; without it.
        activations: recomputation → activations of all micro-batches in flight.
        kept: recomputation → those of the micro-batches that pass 1 keeps while the loss is computed.
        loss: the loss and the step's embeddings.
        working: recomputation → bytes that backward holds for a while: the recomputed layer and the largest gradients.
        direct: True if the loss is computed while activations are kept.
    """

    parameters: int
    gradients: int
    optimizer: int
    optimizer_sharded: int
    optimizer_whole: int
    activations: dict[str, int]
    kept: dict[str, int]
    loss: int
    working: dict[str, int]
    direct: bool

    def total(self, recompute: str) -> int:
        """Return the bytes at the peak of a step."""
        state = self.parameters + self.gradients + self.optimizer
        backward = self.activations[recompute] + self.working[recompute]
        if self.direct:
            return state + backward + self.loss
        # Of the loss, pass 2 keeps only the embeddings' gradient.
        return state + max(backward, self.loss + self.kept[recompute])


@dataclass(frozen=True)
class Plan:
    """The plan of one layout with one choice of recomputation.

    Attributes:
        stages: memory of each pipeline rank.
        sent: traffic of each pipeline rank.
        seconds: estimated time of a step; it ranks the layouts.
    """

    layout: Layout
    replicas: int
    sequence_parallel: bool
    recompute: str
    layers: list[int]
    step: Step
    stages: list[Memory]
    sent: list[Traffic]
    bubble: float
    seconds: float

    @property
    def worst(self) -> Memory:
        return max(self.stages, key=lambda memory: memory.total(self.recompute))

    @property
    def busiest(self) -> Traffic:
        return max(self.sent, key=lambda sent: sent.total)

    @property
    def total(self) -> int:
        """Bytes of the fullest rank."""
        return self.worst.total(self.recompute)

    @property
    def dimensions(self) -> int:
        """Number of kinds of model parallelism that the layout uses."""
        return sum((self.layout.tp > 1, self.layout.pp > 1, self.layout.cp > 1, bool(self.layout.vpp)))

    def fits(self, gpu_memory: float) -> bool:
        """Return whether every rank fits into ``gpu_memory`` GiB."""
        return self.total <= USABLE * gpu_memory * GIB


def plan_layout(
    cfg: RecipeConfig, config: EncoderConfig, world_size: int, *, gpus_per_node: int = 8
) -> dict[str, Plan]:
    """Return the plans of the recipe's own layout: recomputation → plan.

    Raises:
        UserError: the layout is impossible, as in training.
    """
    validate(cfg, world_size, inputs=False)
    validate_layout(cfg, config)
    cfg = cfg.resolved()
    layout = layout_of(cfg)
    replicas = layout.data_parallel_size(world_size)
    step = step_of(cfg, layout, replicas)
    memory = [_memory(cfg, config, layout, step, replicas, pp_rank) for pp_rank in range(layout.pp)]
    idle = bubble(layout, len(step.micro_batches))
    plans = {}
    for recompute in RECOMPUTE:
        sent = [
            traffic(
                cfg,
                config,
                layout,
                step,
                chunks_of(config, layout, pp_rank),
                replicas=replicas,
                recompute=recompute,
                parameters=memory[pp_rank].parameters,
                gradients=memory[pp_rank].gradients,
            )
            for pp_rank in range(layout.pp)
        ]
        plans[recompute] = Plan(
            layout,
            replicas,
            bool(cfg.model.sequence_parallel),
            recompute,
            pipeline_split(config.num_hidden_layers, layout.pp * (layout.vpp or 1)),
            step,
            memory,
            sent,
            idle,
            _seconds(config, layout, step, sent, idle, recompute, world_size, gpus_per_node),
        )
    return plans


def plan_world(
    cfg: RecipeConfig,
    config: EncoderConfig,
    world_size: int,
    *,
    gpu_memory: float,
    recompute: str | None = None,
    gpus_per_node: int = 8,
) -> list[Plan]:
    """Return the plans of all layouts that the world and the model allow: fitting ones first, then the quickest first.

    Layouts that training would refuse are left out. :func:`choose_recompute` explains ``recompute``.

    Raises:
        UserError: no layout is left; the message says why the first one was refused.
    """
    plans: list[Plan] = []
    refusals: list[UserError] = []
    for layout in layouts(config, world_size):
        changed = cfg.model_copy(deep=True)
        changed.model.tensor_model_parallel_size = layout.tp
        changed.model.pipeline_model_parallel_size = layout.pp
        changed.model.context_parallel_size = layout.cp
        changed.model.virtual_pipeline_model_parallel_size = layout.vpp
        try:
            by_recompute = plan_layout(changed, config, world_size, gpus_per_node=gpus_per_node)
        except UserError as error:
            refusals.append(error)
            continue
        plans.append(choose_recompute(by_recompute, gpu_memory, recompute))
    if not plans:
        first = refusals[0]
        raise type(first)(f"no layout of {world_size} ranks can run this recipe; {first}")
    return sorted(plans, key=lambda plan: (0, plan.seconds) if plan.fits(gpu_memory) else (1, plan.total))


def recommend(plans: list[Plan], gpu_memory: float) -> Plan | None:
    """Return the plan to recommend, or None if none fits.

    Among the plans that fit and whose time is within :data:`TOLERANCE` of the least, it is the simplest one, and among
    equally simple ones the one that sends least.
    """
    fitting = [plan for plan in plans if plan.fits(gpu_memory)]
    if not fitting:
        return None
    limit = (1 + TOLERANCE) * min(plan.seconds for plan in fitting)
    quick = [plan for plan in fitting if plan.seconds <= limit]
    return min(quick, key=lambda plan: (plan.dimensions, plan.busiest.total, plan.seconds))


def choose_recompute(by_recompute: dict[str, Plan], gpu_memory: float, wanted: str | None = None) -> Plan:
    """Return the plan with the ``wanted`` recomputation, else with the least that fits (with the most if none fits)."""
    if wanted is not None:
        return by_recompute[wanted]
    plans = [by_recompute[recompute] for recompute in RECOMPUTE]
    return next((plan for plan in plans if plan.fits(gpu_memory)), min(plans, key=lambda plan: plan.total))


def layouts(config: EncoderConfig, world_size: int) -> Iterator[Layout]:
    """Yield every TP × PP × CP that divides the world, plain and with each number of interleaved stages."""
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    for tp in divisors:
        for pp in (n for n in divisors if world_size % (tp * n) == 0 and n <= config.num_hidden_layers):
            for cp in (n for n in divisors if world_size % (tp * pp * n) == 0):
                yield Layout(tp, pp, cp)
                if pp > 1:
                    for vpp in range(2, config.num_hidden_layers // pp + 1):
                        yield Layout(tp, pp, cp, vpp)


def _memory(
    cfg: RecipeConfig, config: EncoderConfig, layout: Layout, step: Step, replicas: int, pp_rank: int
) -> Memory:
    model = cfg.model
    by_sharding = {
        distributed: max(
            states(
                config,
                layout,
                pp_rank,
                precision=model.precision,
                distributed=distributed,
                replicas=replicas,
                learn_temperature=cfg.loss.learn_temperature,
                overlap=cfg.optimizer.overlap_grad_reduce,
            ),
            key=lambda state: state.optimizer,
        )
        for distributed in (False, True)
    }
    own = by_sharding[cfg.optimizer.distributed]
    device = "cpu" if cfg.device == "cpu" else "cuda"
    activations = Activations(config, layout, model.precision, bool(model.sequence_parallel), device)
    shape, chunks = step.largest, chunks_of(config, layout, pp_rank)
    width = WIDTHS[model.precision]
    # Backward holds one weight's gradient before adding it to the buffer, and the MLP's two widest gradients.
    largest = max(size for chunk in chunks for size in chunk_parameters(config, layout, chunk)) * width
    gradients = 4 * shape.tokens // layout.cp * config.intermediate_size // layout.tp * width
    has_last = any(chunk.last for chunk in chunks)
    # Pass 2 keeps the step's embeddings and their gradient beside its activations.
    embeddings = 2 * FP32 * step.texts * config.hidden_size if has_last and step.mode == "cached" else 0
    by_chunk = {recompute: [activations.chunk(chunk, shape, recompute) for chunk in chunks] for recompute in RECOMPUTE}
    kept = {recompute: step.kept * sum(sizes) for recompute, sizes in by_chunk.items()}
    return Memory(
        own.parameters,
        own.gradients,
        own.optimizer,
        by_sharding[True].optimizer,
        by_sharding[False].optimizer,
        # Pass 2 starts with the kept micro-batches and frees each before it computes one more.
        activations={
            recompute: max(kept[recompute], in_flight(sizes, layout.pp, pp_rank, len(step.micro_batches)))
            for recompute, sizes in by_chunk.items()
        },
        kept=kept,
        loss=loss_bytes(cfg.loss, config, step, replicas) if has_last else 0,
        working={
            recompute: largest + gradients + embeddings + activations.recomputed(shape, recompute)
            for recompute in RECOMPUTE
        },
        direct=step.mode == "direct",
    )


def _seconds(
    config: EncoderConfig,
    layout: Layout,
    step: Step,
    sent: list[Traffic],
    idle: float,
    recompute: str,
    world_size: int,
    gpus_per_node: int,
) -> float:
    """Estimate the seconds of a step: the slowest stage, its bubble and the busiest rank's traffic, without overlap."""
    forward = model_flops(config, tokens=step.tokens, squared_lengths=step.squared_lengths) / 3
    passes = step.forwards + 2 + (recompute == "full")
    split = pipeline_split(config.num_hidden_layers, layout.pp * (layout.vpp or 1))
    slowest = max(sum(split[pp_rank :: layout.pp]) for pp_rank in range(layout.pp)) / config.num_hidden_layers
    compute = forward * passes * slowest / (layout.tp * layout.cp) / FLOPS * (1 + idle)

    def rate(span: int) -> float:
        return INSIDE if span <= gpus_per_node else OUTSIDE

    # Ranks are numbered tensor parallel first, then context, data and pipeline parallel.
    inside = layout.tp * layout.cp
    data = world_size // layout.pp
    seconds = [
        each.tensor / rate(layout.tp)
        + each.context / rate(inside)
        + (each.data + each.loss) / rate(data)
        + each.pipeline / rate(world_size)
        for each in sent
    ]
    return compute + max(seconds)
