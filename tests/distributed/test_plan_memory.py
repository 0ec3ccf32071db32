"""What the planner says of memory, against what a rank really allocates: to the byte, and activations within 0.5 %."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.tiny_families import tiny_qwen3_config
from support.tiny_models import tiny_config
from support.worlds import run_world
from torch import Tensor

from megatron_embed.bridge import EncoderConfig
from megatron_embed.bridge.layout import Layout
from megatron_embed.bridge.parallel import parallel_world
from megatron_embed.bridge.sequences import TokenBatch
from megatron_embed.recipes.config.schema import OptimizerSection
from megatron_embed.recipes.planning import gradient_buckets
from megatron_embed.recipes.planning.activations import Activations, Shape, in_flight
from megatron_embed.recipes.planning.state import State, chunks_of, states

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
#: What activations may be off by. Context-parallel ranks differ in the keys that they look at: the plan is that of the
#: rank with most.
LIMIT = 0.005
#: so that the small model's gradients make several buckets
SMALL_BUCKET = (2000, 0)
#: ragged, and together no multiple of 4
LENGTHS = (9, 40, 40, 31, 64, 5, 64, 64, 22)


@dataclass(frozen=True)
class Case:
    layout: Layout
    precision: str
    distributed: bool = False
    learn_temperature: bool = False
    overlap: bool = False
    family: str = "ministral3"


@dataclass(frozen=True)
class ActivationCase:
    layout: Layout
    precision: str
    recompute: str
    packed: bool
    lengths: tuple[int, ...] = LENGTHS
    sequence_parallel: bool = True
    kv_heads: int = 4
    family: str = "ministral3"


def config(family: str = "ministral3", **sizes: Any) -> EncoderConfig:
    # 5 layers: uneven stages; 997 ids: padded vocabulary; 24 hidden: parameters that end off every alignment;
    # originals of 16: the Llama-4 scale acts
    rope = {"original_max_position_embeddings": 16}
    if family == "qwen3":
        return EncoderConfig.from_hf(
            tiny_qwen3_config(**{"num_hidden_layers": 5, "hidden_size": 24, **sizes}), temperature=0.05
        )
    hf = tiny_config(**{"num_hidden_layers": 5, "hidden_size": 24, "rope_parameters": rope, **sizes})
    return EncoderConfig.from_hf(hf, temperature=0.05)


def state_cases(world: int) -> list[Case]:
    layouts = {
        1: [Layout()],
        2: [Layout(), Layout(tp=2), Layout(pp=2), Layout(pp=2, vpp=2), Layout(cp=2)],
        4: [Layout(tp=2, pp=2), Layout(tp=2), Layout(pp=2), Layout(cp=2), Layout()],
    }[world]
    return [
        Case(layout, precision, distributed, learn_temperature=number % 2 == 0, overlap=precision == "bf16")
        for number, layout in enumerate(layouts)
        for precision in ("fp32", "bf16")
        for distributed in (False, True)
    ] + [Case(layouts[0], "fp16", True, learn_temperature=True), Case(layouts[-1], "bf16", True, family="qwen3")]


def activation_cases(world: int) -> list[ActivationCase]:
    layouts = {1: [Layout()], 2: [Layout(tp=2), Layout(pp=2), Layout(cp=2), Layout(pp=2, vpp=2)]}
    layouts[4] = [Layout(tp=2, pp=2), Layout(tp=2, cp=2)]
    cases = [
        ActivationCase(layout, precision, recompute, packed)
        for layout in layouts[world]
        for precision in ("fp32", "bf16")
        for recompute in ("none", "selective", "full")
        for packed in (False, True)
    ]
    even = [
        ActivationCase(layout, precision, "none", False, lengths=(48,) * 6)
        for layout in layouts[world]
        for precision in ("fp32", "bf16")
    ]
    first = layouts[world][0]
    other = [
        ActivationCase(first, "fp32", "none", True, sequence_parallel=False),
        ActivationCase(first, "bf16", "selective", True, kv_heads=first.tp),
        ActivationCase(first, "fp32", "none", True, kv_heads=first.tp, family="qwen3"),
        ActivationCase(first, "bf16", "selective", True, kv_heads=first.tp, family="qwen3"),
        *(
            ActivationCase(first, precision, recompute, packed, family="qwen3")
            for precision in ("fp32", "bf16")
            for recompute in ("none", "selective")
            for packed in (False, True)
        ),
    ]
    return [*cases, *even, *other]


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address → bytes of each distinct storage."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def allocated(case: Case) -> tuple[int, int, State]:
    """(pipeline rank, rank among those that share gradients, bytes) after one step."""
    from megatron.core import parallel_state

    from megatron_embed.bridge.encoder import build_stages, transformer_config
    from megatron_embed.recipes.training.optimizer import set_up_training

    transformer = transformer_config(config(case.family), case.layout, dtype=DTYPES[case.precision])
    encoders = build_stages(config(case.family), transformer, learn_temperature=case.learn_temperature)
    for parameter in (p for encoder in encoders for p in encoder.parameters()):
        torch.nn.init.normal_(parameter, std=0.02)
    gradient_buckets.BUCKET = SMALL_BUCKET
    section = OptimizerSection(distributed=case.distributed, overlap_grad_reduce=case.overlap)
    state = set_up_training(encoders, section, train_iters=10)
    for stage in state.stages:
        stage.zero_grad_buffer()
    updated, _, _ = state.optimizer.step()
    assert updated
    parameters = storages(p for encoder in encoders for p in encoder.parameters())
    of_optimizer: list[Tensor] = []
    for optimizer in getattr(state.optimizer, "chained_optimizers", [state.optimizer]):
        inner = optimizer.optimizer
        of_optimizer += [p for group in inner.param_groups for p in group["params"]]
        of_optimizer += [value for values in inner.state.values() for value in values.values()]
    kept = storages(t for t in of_optimizer if t.numel())
    return (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
        State(
            sum(parameters.values()),
            sum(storages(buffer.grad_data for stage in state.stages for buffer in stage.buffers).values()),
            # fp32 parameters are their own main parameters
            sum(size for address, size in kept.items() if address not in parameters),
        ),
    )


def token_batch(case: ActivationCase) -> TokenBatch:
    build = TokenBatch.pack if case.packed else TokenBatch.pad
    return build([[5] * n for n in case.lengths], pad_id=11, multiple_of=case.layout.tp * case.layout.cp)


def of_activations(case: ActivationCase) -> EncoderConfig:
    return config(
        case.family,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=4,
        head_dim=16,
        num_key_value_heads=case.kv_heads,
    )


def saved(case: ActivationCase) -> tuple[int, list[int]]:
    """(pipeline rank, bytes that autograd keeps of one micro-batch on each of its stages)."""
    from megatron.core import parallel_state

    from megatron_embed.bridge.encoder import build_stages, transformer_config

    encoder_config, layout, dtype = of_activations(case), case.layout, DTYPES[case.precision]
    batch = token_batch(case)
    transformer = transformer_config(
        encoder_config, layout, dtype=dtype, recompute=case.recompute, sequence_parallel=case.sequence_parallel
    )
    found = []
    for encoder in build_stages(encoder_config, transformer):
        for parameter in encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        encoder.train()
        rows, columns = batch.input_ids.shape
        columns //= layout.cp * (layout.tp if transformer.sequence_parallel else 1)
        if not encoder.pre_process:
            states = torch.randn(columns, rows, encoder_config.hidden_size, dtype=dtype)
            encoder.set_input_tensor(states.requires_grad_())
        kept: list[Tensor] = []

        def pack(tensor: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(tensor)  # alive, so that no address is used twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = encoder(batch)
        parameters = storages(encoder.parameters())
        if not (encoder.post_process or transformer.deallocate_pipeline_outputs):
            kept.append(output)  # the schedule keeps it for backward
        found.append(sum(n for address, n in storages(kept).items() if address not in parameters))
        assert output.requires_grad
    return parallel_state.get_pipeline_model_parallel_rank(), found


class Kept:
    """Counts the storages that autograd (and the schedule) keeps at a time, and the most that were ever kept."""

    def __init__(self, apart: Iterable[Tensor]):
        self._users: dict[int, int] = {}
        self._apart = storages(apart)
        self.now = self.most = 0

    def pack(self, tensor: Tensor) -> Held:
        self.add(*next(iter(storages([tensor]).items())))
        return Held(self, tensor)

    def output(self, module: Any, _: Any, tensor: Tensor) -> None:
        """A forward hook of stages whose outputs the schedule keeps until their backward."""
        if tensor.requires_grad and not module.post_process:
            address, size = next(iter(storages([tensor]).items()))
            self.add(address, size)
            weakref.finalize(tensor, self.release, address, size)

    def add(self, address: int, size: int) -> None:
        if address not in self._apart:
            self._users[address] = self._users.get(address, 0) + 1
            self.now += size if self._users[address] == 1 else 0
            self.most = max(self.most, self.now)

    def release(self, address: int, size: int) -> None:
        if address not in self._apart:
            self._users[address] -= 1
            self.now -= size if self._users[address] == 0 else 0


class Held:
    """What autograd keeps in a tensor's place; it lets go of it after backward."""

    def __init__(self, kept: Kept, tensor: Tensor):
        self.kept, self.tensor = kept, tensor

    def __del__(self) -> None:
        self.kept.release(*next(iter(storages([self.tensor]).items())))


def in_a_step(layout: Layout) -> tuple[int, int]:
    """(pipeline rank, most bytes of activations at a time) in a cached step of six equal micro-batches."""
    from megatron.core import parallel_state

    from megatron_embed.bridge.encoder import build_stages, transformer_config
    from megatron_embed.recipes.config.schema import LossSection
    from megatron_embed.recipes.encoding.micro_batches import BatchingPlan
    from megatron_embed.recipes.training.loss import ContrastiveLoss
    from megatron_embed.recipes.training.optimizer import wrap_ddp
    from megatron_embed.recipes.training.step import contrastive_step
    from megatron_embed.recipes.training.targets import Targets

    case = in_a_step_case(layout)
    encoder_config = of_activations(case)
    with parallel_world(layout):
        stages = wrap_ddp(build_stages(encoder_config, transformer_config(encoder_config, layout, dtype=torch.float32)))
        parameters = [parameter for stage in stages for parameter in stage.parameters()]
        for parameter in parameters:
            torch.nn.init.normal_(parameter, std=0.02)
        for stage in stages:
            stage.zero_grad_buffer()
        micro_batches = BatchingPlan(pad_id=11, packed=True, max_texts=len(case.lengths)).split(
            [[5 + number] * case.lengths[0] for number in range(6 * len(case.lengths))]
        )
        kept = Kept(parameters)
        for stage in stages if not stages[0].config.deallocate_pipeline_outputs else []:
            stage.module.register_forward_hook(kept.output)
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda held: held.tensor):
            contrastive_step(
                stages,
                micro_batches,
                Targets(12, torch.ones(12, 1, dtype=torch.bool)),
                ContrastiveLoss(LossSection(), group=parallel_state.get_data_parallel_group()),
                mode="cached",
            )
        return parallel_state.get_pipeline_model_parallel_rank(), kept.most


def in_a_step_case(layout: Layout) -> ActivationCase:
    return ActivationCase(layout, "fp32", "none", True, lengths=(48,) * 4)


def measure(
    cases: list[Case], activation_cases: list[ActivationCase], steps: list[Layout]
) -> tuple[list[Any], list[Any], list[Any]]:
    return (
        under_layouts(allocated, cases),
        under_layouts(saved, activation_cases),
        [in_a_step(layout) for layout in steps],
    )


def under_layouts(function: Callable[[Any], Any], cases: Sequence[Any]) -> list[Any]:
    """Results in the order of the cases; process groups, which take longest, are made once a layout."""
    results = {}
    for layout in dict.fromkeys(case.layout for case in cases):
        with parallel_world(layout):
            results |= {number: function(case) for number, case in enumerate(cases) if case.layout == layout}
    return [results[number] for number in range(len(cases))]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_plan_is_what_ranks_allocate(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cases, of_micro_batch = state_cases(world), activation_cases(world)
    steps = {1: [Layout()], 2: [Layout(pp=2), Layout(pp=2, vpp=2)], 4: [Layout(pp=4)]}[world]
    results = run_world(measure, world, cases, of_micro_batch, steps)
    failures = []
    monkeypatch.setattr(gradient_buckets, "BUCKET", SMALL_BUCKET)
    for number, case in enumerate(cases):
        for of_rank, _, _ in results:
            pp_rank, rank, found = of_rank[number]
            planned = states(
                config(case.family),
                case.layout,
                pp_rank,
                precision=case.precision,
                distributed=case.distributed,
                replicas=world // case.layout.model_parallel_size,
                learn_temperature=case.learn_temperature,
                overlap=case.overlap,
            )[rank]
            if planned != found:
                failures.append(f"{case}, stage {pp_rank}, rank {rank}: planned {planned}, found {found}")
    for number, of_case in enumerate(of_micro_batch):
        encoder_config, shape = of_activations(of_case), Shape.of(token_batch(of_case))
        sequence_parallel = of_case.sequence_parallel and of_case.layout.tp > 1
        activations = Activations(encoder_config, of_case.layout, of_case.precision, sequence_parallel, "cpu")
        of_stages: dict[int, list[list[int]]] = {}
        for _, of_rank, _ in results:
            pp_rank, found = of_rank[number]
            of_stages.setdefault(pp_rank, []).append(found)
        for pp_rank, of_ranks in of_stages.items():
            most = [max(sizes) for sizes in zip(*of_ranks, strict=True)]
            for chunk, size in zip(chunks_of(encoder_config, of_case.layout, pp_rank), most, strict=True):
                planned = activations.chunk(chunk, shape, of_case.recompute)
                if abs(planned / size - 1) > LIMIT:
                    failures.append(f"{of_case}, {chunk}: planned {planned}, found {size} ({planned / size - 1:+.1%})")
    for number, layout in enumerate(steps):
        case = in_a_step_case(layout)
        encoder_config, shape = of_activations(case), Shape.of(token_batch(case))
        activations = Activations(encoder_config, layout, case.precision, False, "cpu")
        for *_, of_rank in results:
            pp_rank, kept = of_rank[number]
            planned = in_flight(
                [activations.chunk(chunk, shape, "none") for chunk in chunks_of(encoder_config, layout, pp_rank)],
                *(layout.pp, pp_rank, 6),
            )
            if abs(planned / kept - 1) > LIMIT:
                failures.append(f"{layout}, a step on stage {pp_rank}: planned {planned}, found {kept}")
    assert not failures, "\n".join(failures)
