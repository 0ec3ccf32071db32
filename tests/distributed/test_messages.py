"""Nothing that a message still needs is written to or freed: looked at directly, on every message of a step."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny_models import tiny_config
from support.worlds import run_world
from torch import Tensor

from megatron_embed.bridge import EncoderConfig
from megatron_embed.bridge.layout import Layout
from megatron_embed.bridge.parallel import parallel_world
from megatron_embed.recipes.planning import gradient_buckets

LAYOUTS = [Layout(pp=2), Layout(pp=2, vpp=2), Layout(pp=4), Layout(pp=4, vpp=2), Layout(tp=2, pp=2), Layout(cp=2, pp=2)]
QUERIES = 16


class Ledger:
    """What went wrong under a layout, and how much was looked at."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.messages = self.early_reductions = 0


class Message:
    """A request for a message, which looks whether what it sends is still there when somebody waits for its end."""

    def __init__(self, request: Any, what: str, sent: list[Tensor], ledger: Ledger):
        self.request, self.what, self.sent, self.ledger = request, what, sent, ledger
        self.before = [(tensor.data_ptr(), tensor.detach().clone()) for tensor in sent]
        ledger.messages += len(sent)

    def wait(self) -> None:
        for tensor, (address, values) in zip(self.sent, self.before, strict=True):
            if tensor.data_ptr() != address:
                self.ledger.faults.append(f"{self.what}: freed before it was sent")
            elif not torch.equal(tensor, values):
                self.ledger.faults.append(f"{self.what}: written to before it was sent")
        self.request.wait()


class LateReduction:
    """Puts a reduction of gradients off to the moment when it must have ended; until then nothing may be added."""

    def __init__(self, group: Any, start: Callable[..., None], ledger: Ledger):
        self.group, self.start, self.ledger = group, start, ledger
        self.before = [bucket.grad_data.clone() for bucket in group.buckets]
        ledger.early_reductions += not group.is_first_batch

    def wait(self) -> None:
        for bucket, values in zip(self.group.buckets, self.before, strict=True):
            if not torch.equal(bucket.grad_data, values):
                self.ledger.faults.append("gradients: added to a bucket whose reduction had begun")
        self.group.grad_reduce_handle = None
        self.start(self.group)
        self.group.grad_reduce_handle.wait()


def watch(patch: pytest.MonkeyPatch, ledger: Ledger) -> None:
    """Let megatron-core's messages between stages and its overlapped reductions pass through the ledger."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as BucketGroup
    from megatron.core.pipeline_parallel import p2p_communication

    single, batched, start = p2p_communication._p2p_ops, p2p_communication._batched_p2p_ops, BucketGroup.start_grad_sync

    def one_by_one(**message: Any) -> dict[str, Any]:
        def sent(name: str) -> list[Tensor]:
            return [message[f"tensor_{name}"]] if name.startswith("send") else []

        return {name: Message(request, name, sent(name), ledger) for name, request in single(**message).items()}

    def together(**message: Any) -> list[Any]:
        sent = [tensor for name, tensor in message.items() if "tensor_send" in name and tensor is not None]
        return [Message(request, "batch", sent, ledger) for request in batched(**message)]

    def reduce(group: Any, force_all_reduce: bool = False) -> None:
        assert group.grad_reduce_handle is None or group.is_first_batch
        if group.grad_reduce_handle is None:
            group.grad_reduce_handle = LateReduction(group, start, ledger)

    def shapes(*_: Any) -> Any:
        raise AssertionError("the shape of a message was sent, though every stage knows it")

    patch.setattr(p2p_communication.P2PCommunicator, "_communicate_shapes", shapes)
    patch.setattr(p2p_communication, "_p2p_ops", one_by_one)
    patch.setattr(p2p_communication, "_batched_p2p_ops", together)
    patch.setattr(BucketGroup, "start_grad_sync", reduce)


def three_steps(layout: Layout) -> Ledger:
    """Steps of ragged micro-batches with overlapped reduction; the first one learns what a bucket waits for."""
    from megatron.core import parallel_state

    from megatron_embed.bridge.encoder import build_stages, transformer_config
    from megatron_embed.recipes.config.schema import LossSection
    from megatron_embed.recipes.encoding.micro_batches import BatchingPlan
    from megatron_embed.recipes.encoding.schedule import encode_micro_batches
    from megatron_embed.recipes.training.loss import ContrastiveLoss
    from megatron_embed.recipes.training.optimizer import wrap_ddp
    from megatron_embed.recipes.training.step import contrastive_step
    from megatron_embed.recipes.training.targets import Targets

    config = EncoderConfig.from_hf(tiny_config(num_hidden_layers=8), temperature=0.05)
    gradient_buckets.BUCKET = (2000, 0)  # many buckets
    ledger = Ledger()
    with parallel_world(layout), pytest.MonkeyPatch.context() as patch:
        watch(patch, ledger)
        transformer = transformer_config(config, layout, dtype=torch.float32)
        stages = wrap_ddp(build_stages(config, transformer), overlap=True)
        for parameter in (parameter for stage in stages for parameter in stage.parameters()):
            torch.nn.init.normal_(parameter, std=0.02)
        plan = BatchingPlan(
            pad_id=11,
            packed=True,
            max_tokens=64,
            multiple_of=layout.tp * layout.cp,
            count_multiple_of=layout.pp,
        )
        micro_batches = plan.split([[12 + i] * (7 + 5 * (i % 7)) for i in range(2 * QUERIES)])
        loss = ContrastiveLoss(LossSection(), group=parallel_state.get_data_parallel_group())
        gc.disable()  # what pass 1 leaves behind must not wait for the collector, which would come in pass 2
        for _ in range(3):
            for stage in stages:
                stage.zero_grad_buffer()
            encode_micro_batches(stages, micro_batches)
            if not all(group.is_last_microbatch for stage in stages for group in stage.bucket_groups):
                ledger.faults.append("forward only: gradient reduction is still held back")
            targets = Targets(QUERIES, torch.ones(QUERIES, 1, dtype=torch.bool))
            contrastive_step(stages, micro_batches, targets, loss, mode="cached", kept=2)
        gc.enable()
    return ledger


def steps_under(layouts: list[Layout]) -> list[Ledger]:
    return [three_steps(layout) for layout in layouts]


@pytest.mark.slow
def test_what_is_sent_or_reduced_stays_as_it_is_until_the_end_of_the_message() -> None:
    failures = []
    for rank, ledgers in enumerate(run_world(steps_under, 4, LAYOUTS)):
        for layout, ledger in zip(LAYOUTS, ledgers, strict=True):
            assert ledger.messages >= 48, f"{layout}: {ledger.messages}"
            assert ledger.early_reductions >= 2, f"{layout}: {ledger.early_reductions}"
            counts = Counter(ledger.faults).items()
            failures += [f"{layout}, rank {rank}: {fault} ({count} times)" for fault, count in counts]
    assert not failures, "\n".join(failures)
