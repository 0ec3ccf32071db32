"""A contrastive step in a small world: its loss and gradients against Hugging Face modules and hand-written InfoNCE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_embed.bridge import EncoderConfig
from megatron_embed.bridge.layers import LayerKind
from megatron_embed.bridge.layout import Layout
from megatron_embed.bridge.parallel import parallel_world
from support import oracle
from support.megatron import collect, filled_stages, merge_world
from support.tiny_families import tiny_llama_config, tiny_qwen3_config
from support.tiny_models import tiny_config
from support.worlds import run_world

QUERIES, SLOTS, TEMPERATURE = 8, 3, 0.05


@dataclass(frozen=True)
class Case:
    layout: Layout
    mode: str
    dtype: torch.dtype
    packed: bool = False
    sequence_parallel: bool | None = None
    recompute: str = "none"
    #: every product by oneDNN, however small
    onednn: bool = False
    family: str = "ministral3"
    #: micro-batches whose graphs pass 1 keeps
    kept: int = 0
    #: None: those that the process chooses
    layers: LayerKind | None = None
    #: weight gradients are added to ``main_grad`` by the product that computes them
    fused: bool = False

    def __str__(self) -> str:
        form = "packed" if self.packed else "padded"
        sequence = {None: "", True: "", False: "-no_sp"}[self.sequence_parallel]
        form += f"-kept{self.kept}" * bool(self.kept)
        form += "-onednn" * self.onednn + "-fused" * self.fused + f"-{self.family}" * (self.family != "ministral3")
        return f"{self.layout}-{self.mode}-{str(self.dtype)[6:]}-{form}{sequence}-{self.recompute}".replace(" ", "")


def config(family: str = "ministral3") -> Any:
    # 5 layers: uneven stages; 997 ids: padded vocabulary; originals of 16: the Llama-4 scale acts
    if family == "qwen3":
        return tiny_qwen3_config(num_hidden_layers=5)
    if family == "llama":
        return tiny_llama_config(num_hidden_layers=5)
    return tiny_config(num_hidden_layers=5, rope_parameters={"original_max_position_embeddings": 16})


def texts() -> tuple[list[list[int]], list[list[list[int]]]]:
    """Queries, and for each its positive and up to two hard negatives: ragged lengths, ragged counts."""
    generator = torch.Generator().manual_seed(7)

    def text() -> list[int]:
        length = int(torch.randint(3, 40, (), generator=generator))
        return torch.randint(12, 997, (length,), generator=generator).tolist()

    return [text() for _ in range(QUERIES)], [[text() for _ in range(1 + i % SLOTS)] for i in range(QUERIES)]


def wanted(
    dtype: torch.dtype, family: str = "ministral3"
) -> tuple[float, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    model = oracle.hf_model(config(family), dtype=dtype, exact_norms=dtype == torch.float64)
    queries, passages = texts()
    flat = [text for group in passages for text in group]
    positives = [sum(len(group) for group in passages[:i]) for i in range(QUERIES)]
    log_temperature = torch.tensor([TEMPERATURE], dtype=dtype).log().requires_grad_()
    loss = oracle.info_nce(oracle.embed(model, queries), oracle.embed(model, flat), positives, log_temperature.exp())
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    gradients["log_temperature"] = log_temperature.grad
    return loss.item(), gradients, model.state_dict()


def run_cases(cases: list[Case], states: dict[Any, dict[str, torch.Tensor]]) -> list[Any]:
    return [run_case(case, states[case.dtype, case.family]) for case in cases]


def run_case(case: Case, state: dict[str, torch.Tensor]) -> Any:
    from megatron.core import parallel_state

    from megatron_embed.bridge.cpu import linear
    from megatron_embed.recipes.config.schema import LossSection
    from megatron_embed.recipes.encoding.micro_batches import BatchingPlan
    from megatron_embed.recipes.planning import gradient_buckets
    from megatron_embed.recipes.training.loss import ContrastiveLoss
    from megatron_embed.recipes.training.optimizer import gradients, wrap_ddp
    from megatron_embed.recipes.training.step import contrastive_step
    from megatron_embed.recipes.training.targets import Targets

    encoder_config = EncoderConfig.from_hf(config(case.family), temperature=TEMPERATURE)
    with parallel_world(case.layout):
        encoders = filled_stages(
            encoder_config,
            case.layout,
            state,
            case.dtype,
            learn_temperature=True,
            sequence_parallel=case.sequence_parallel,
            recompute=case.recompute,
            layers=case.layers,
            gradient_accumulation_fusion=case.fused,
        )
        linear.onednn_takes = lambda x, weight: case.onednn
        gradient_buckets.BUCKET = (2000, 0)  # many buckets, reduced while backward goes on
        stages = wrap_ddp(encoders, overlap=case.packed)
        for stage in stages:
            stage.zero_grad_buffer()
        rank, world = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        mine = slice(rank * QUERIES // world, (rank + 1) * QUERIES // world)
        queries, passages = texts()
        queries, passages = queries[mine], passages[mine]
        valid = torch.tensor([[slot < len(group) for slot in range(SLOTS)] for group in passages])
        sequences = [*queries, *(text for group in passages for text in group)]
        plan = BatchingPlan(
            pad_id=11,
            packed=case.packed,
            max_texts=None if case.mode == "direct" else 5,
            multiple_of=case.layout.tp * case.layout.cp,
            count_multiple_of=case.layout.pp if case.layout.vpp else 1,
            max_tokens=100_000,
        )
        loss = contrastive_step(
            stages,
            plan.split(sequences),
            Targets(len(queries), valid),
            ContrastiveLoss(LossSection(temperature=TEMPERATURE), group=parallel_state.get_data_parallel_group()),
            mode=case.mode,
            kept=case.kept,
        ).loss.item()
        return loss, collect(gradients(stages))


def failures_of(world: int, cases: list[Case], run: Callable[..., list[Any]] = run_world) -> list[str]:
    """Run the cases in one world, started by ``run``; a line for each that differs from one process."""
    answers = {key: wanted(*key) for key in {(case.dtype, case.family) for case in cases}}
    results = run(run_cases, world, cases, {key: answer[2] for key, answer in answers.items()})
    failures = []
    plain: dict[Case, dict[str, torch.Tensor]] = {}
    for number, case in enumerate(cases):
        loss, gradients, _ = answers[case.dtype, case.family]
        limit = 1e-5 if case.dtype == torch.float32 else 1e-10
        of_ranks = [result[number] for result in results]
        if any(abs(found / loss - 1) > limit for found, _ in of_ranks):
            failures.append(f"{case}: losses {[found for found, _ in of_ranks]}, wanted {loss}")
        collected = [item for _, item in of_ranks]
        merged = merge_world(EncoderConfig.from_hf(config(case.family)), collected)
        last = [tensors["log_temperature"] for *_, tensors in collected if "log_temperature" in tensors]
        assert all(torch.equal(tensor, last[0]) for tensor in last)
        merged["log_temperature"] = last[0]
        assert merged.keys() == gradients.keys()
        worst = max(gradients, key=lambda name: oracle.relative_error(merged[name], gradients[name]))
        error = oracle.relative_error(merged[worst], gradients[worst])
        if not error <= limit:
            failures.append(f"{case}: gradient of {worst} is off by {error:.1e}")
        # what is computed again, or kept, is the same, bit by bit
        same = plain.setdefault(replace(case, recompute="none", kept=0), merged)
        failures += [
            f"{case}: {name} differs from its plain run" for name in same if not same[name].equal(merged[name])
        ]
    return failures
