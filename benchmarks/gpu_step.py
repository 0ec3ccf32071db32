"""Training steps at a real shape on one GPU: model FLOPs utilisation, and sentence-transformers beside it.

    python benchmarks/gpu_step.py --config MODEL_FOLDER_OR_CONFIG.json [--steps 10] [--peak-tflops 989]

Random weights at the shape of the config, bf16, packed, random tokens with the lengths of real questions and
paragraphs. Try it at a small size on a CPU: ``--layers 2 --hidden 256 --batch 4``. No result is written: commit what
you measured with the machine's name.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from common import machine, timed

from megatron_embed.bridge import EncoderConfig, host
from megatron_embed.bridge.encoder import build_stages, transformer_config
from megatron_embed.bridge.layout import Layout
from megatron_embed.bridge.parallel import parallel_world, select_device
from megatron_embed.recipes.batching import BatchingPlan
from megatron_embed.recipes.config import LossSection, OptimizerSection
from megatron_embed.recipes.loss import ContrastiveLoss
from megatron_embed.recipes.metrics import model_flops, peak_memory_bytes
from megatron_embed.recipes.optimizer import set_up_training
from megatron_embed.recipes.step import contrastive_step
from megatron_embed.recipes.targets import Targets


def texts(options: argparse.Namespace, vocab: int) -> list[list[int]]:
    """Queries of 8 to 32 tokens, then passages of which most are at the maximal length."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return torch.randint(12, vocab, (length,), generator=generator).tolist()

    queries = [draw(8, 32) for _ in range(options.batch)]
    return queries + [draw(options.length // 4, options.length) for _ in range(options.batch * (1 + options.negatives))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--layers", type=int, help="fewer layers than the config says")
    parser.add_argument("--hidden", type=int, help="a smaller hidden size, for trying this on a CPU")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--negatives", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--micro-batch-tokens", type=int, default=16384)
    parser.add_argument("--recompute", default="none", choices=["none", "selective", "full"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bf16 peak; H100/H200: 989")
    options = parser.parse_args()
    device = select_device("auto")
    config = EncoderConfig.from_hf(options.config)
    small: dict[str, Any] = {}
    if options.layers:
        small["num_hidden_layers"] = options.layers
    if options.hidden:
        small |= {"hidden_size": options.hidden, "intermediate_size": 3 * options.hidden, "vocab_size": 4096}
    config = config.replace(**small)
    with parallel_world(Layout()):
        transformer = transformer_config(config, Layout(), dtype=torch.bfloat16, recompute=options.recompute)
        encoders = build_stages(config, transformer)
        with torch.no_grad():
            for parameter in encoders[0].parameters():
                parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
        state = set_up_training(encoders, OptimizerSection(lr=1e-6, distributed=False), train_iters=1000)
        sequences = texts(options, config.vocab_size)
        plan = BatchingPlan(pad_id=11, packed=True, max_tokens=options.micro_batch_tokens)
        targets = Targets(options.batch, torch.ones(options.batch, 1 + options.negatives, dtype=torch.bool))
        loss = ContrastiveLoss(LossSection())
        whole = plan.holds(sequences)
        groups = plan.join(sequences) if whole else plan.split(sequences)

        def step() -> None:
            state.stages[0].zero_grad_buffer()
            state.optimizer.zero_grad()
            contrastive_step(state.stages, groups, targets, loss, mode="direct" if whole else "cached")
            state.optimizer.step()
            if not host.cuda_is_hidden():
                torch.cuda.synchronize()

        step()
        seconds = statistics.median(timed(step) for _ in range(options.steps))
    tokens = sum(map(len, sequences))
    flops = model_flops(config, tokens=tokens, squared_lengths=sum(len(ids) ** 2 for ids in sequences))
    where = machine() if device.type == "cpu" else torch.cuda.get_device_name()
    result = {
        "device": where,
        "mode": "direct" if whole else "cached",
        "tokens a step": tokens,
        "micro-batches": len(groups),
        "seconds a step": round(seconds, 3),
        "tokens/s": round(tokens / seconds),
        "model TFLOP/s": round(flops / seconds / 1e12, 2),
        "model FLOPs utilisation": round(flops / seconds / 1e12 / options.peak_tflops, 4),
        "peak memory GiB": round(peak_memory_bytes() / 2**30, 1),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
