"""Plans of a recipe over a world: memory, traffic, bubble of each layout, and which to take. Arithmetic only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.errors import UserError
from megatron_embed.bridge.layout import Layout, pipeline_split
from megatron_embed.recipes.config.checks import layout_of, validate, validate_layout
from megatron_embed.recipes.config.schema import RecipeConfig
from megatron_embed.recipes.planning.activations import Activations, in_flight
from megatron_embed.recipes.planning.state import FP32, WIDTHS, chunk_parameters, chunks_of, states
from megatron_embed.recipes.planning.step import Step, Traffic, bubble, loss_bytes, step_of, traffic
from megatron_embed.recipes.training.metrics import model_flops

GIB = 1 << 30
RECOMPUTE = ("none", "selective", "full")

#: Share of a GPU's memory that the plan may fill: the rest is CUDA's own, NCCL's buffers and fragmentation.
USABLE = 0.92
#: What the estimate of a step's time assumes of each GPU (an H100's order): matrix multiplications that reach this many
#: operations a second, bytes a second to its node's other GPUs and to other nodes. Layouts are compared by it.
FLOPS, INSIDE, OUTSIDE = 4e14, 3e11, 4e10
#: Estimates that differ by less than this share say nothing; then the simpler layout is better.
TOLERANCE = 0.05


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank of a pipeline stage.

    Attributes:
        optimizer, optimizer_sharded, optimizer_whole: as the recipe says; with the distributed optimizer; without.
        activations: by recomputation, of all micro-batches in flight.
        loss: of the loss and the step's embeddings.
        working: by recomputation: what backward holds for a while, the recomputed layer and the largest gradients.
        direct: whether the loss is computed while activations are kept.
    """

    parameters: int
    gradients: int
    optimizer: int
    optimizer_sharded: int
    optimizer_whole: int
    activations: dict[str, int]
    loss: int
    working: dict[str, int]
    direct: bool

    def total(self, recompute: str) -> int:
        """At the peak of a step."""
        kept = self.parameters + self.gradients + self.optimizer
        backward = self.activations[recompute] + self.working[recompute]
        # cached: pass 1 keeps no activations, and pass 2 only the embeddings' gradient of what the loss held
        return kept + (backward + self.loss if self.direct else max(backward, self.loss))


@dataclass(frozen=True)
class Plan:
    """One layout under one choice of recomputation.

    Attributes:
        stages: memory by pipeline rank; traffic by pipeline rank.
        seconds: estimate of a step, by which layouts are compared.
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
        """Kinds of model parallelism that it uses."""
        return sum((self.layout.tp > 1, self.layout.pp > 1, self.layout.cp > 1, bool(self.layout.vpp)))

    def fits(self, gpu_memory: float) -> bool:
        """Whether every rank holds its part in ``gpu_memory`` GiB."""
        return self.total <= USABLE * gpu_memory * GIB


def plan_layout(
    cfg: RecipeConfig, config: EncoderConfig, world_size: int, *, gpus_per_node: int = 8
) -> dict[str, Plan]:
    """The plan of the recipe's own layout, by recomputation.

    Raises:
        UserError: a layout that cannot hold, as training would refuse it.
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
                cfg.loss,
                config,
                layout,
                step,
                chunks_of(config, layout, pp_rank),
                replicas=replicas,
                precision=cfg.model.precision,
                distributed=cfg.optimizer.distributed,
                sequence_parallel=bool(cfg.model.sequence_parallel),
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
    """Every layout that the world and the model allow, those that fit first, the quickest of them first.

    Layouts that training would refuse are left out; see :func:`choose_recompute` for ``recompute``.

    Raises:
        UserError: no layout is left; why the first was refused.
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
    """Of those that fit and whose time is within :data:`TOLERANCE` of the least: the simplest, then who sends least."""
    fitting = [plan for plan in plans if plan.fits(gpu_memory)]
    if not fitting:
        return None
    limit = (1 + TOLERANCE) * min(plan.seconds for plan in fitting)
    quick = [plan for plan in fitting if plan.seconds <= limit]
    return min(quick, key=lambda plan: (plan.dimensions, plan.busiest.total, plan.seconds))


def choose_recompute(by_recompute: dict[str, Plan], gpu_memory: float, wanted: str | None = None) -> Plan:
    """The plan with the least recomputation that fits (with most, where none does), or with the one ``wanted``."""
    if wanted is not None:
        return by_recompute[wanted]
    plans = [by_recompute[recompute] for recompute in RECOMPUTE]
    return next((plan for plan in plans if plan.fits(gpu_memory)), min(plans, key=lambda plan: plan.total))


def layouts(config: EncoderConfig, world_size: int) -> Iterator[Layout]:
    """Every TP × PP × CP that divides the world, plain and with every number of interleaved stages."""
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
    # Backward makes a weight's gradient before it adds it to the buffer, and the MLP's two widest gradients.
    largest = max(size for chunk in chunks for size in chunk_parameters(config, layout, chunk)) * width
    gradients = 4 * shape.tokens // layout.cp * config.intermediate_size // layout.tp * width
    has_last = any(chunk.last for chunk in chunks)
    # the step's embeddings and their gradient are kept beside the activations of pass 2
    embeddings = 2 * FP32 * step.texts * config.hidden_size if has_last and step.mode == "cached" else 0
    return Memory(
        own.parameters,
        own.gradients,
        own.optimizer,
        by_sharding[True].optimizer,
        by_sharding[False].optimizer,
        activations={
            recompute: in_flight(
                [activations.chunk(chunk, shape, recompute) for chunk in chunks],
                layout.pp,
                pp_rank,
                len(step.micro_batches),
            )
            for recompute in RECOMPUTE
        },
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
    """Computation of the slowest stage, lengthened by the bubble, then all that the busiest rank sends: no overlap."""
    forward = model_flops(config, tokens=step.tokens, squared_lengths=step.squared_lengths) / 3
    passes = step.forwards + 2 + (recompute == "full")
    split = pipeline_split(config.num_hidden_layers, layout.pp * (layout.vpp or 1))
    slowest = max(sum(split[pp_rank :: layout.pp]) for pp_rank in range(layout.pp)) / config.num_hidden_layers
    compute = forward * passes * slowest / (layout.tp * layout.cp) / FLOPS * (1 + idle)

    def rate(span: int) -> float:
        return INSIDE if span <= gpus_per_node else OUTSIDE

    # ranks are numbered tensor parallel first, then context, data, pipeline
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
