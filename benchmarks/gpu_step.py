"""Training steps at a real shape on one GPU: model FLOPs utilisation, compared with sentence-transformers.

    python benchmarks/gpu_step.py --config MODEL_FOLDER_OR_CONFIG.json [--steps 10] [--peak-tflops 989]

The weights are random, bf16, with the shape of the config. The tokens are random, packed, with the lengths of real
questions and paragraphs. To try it at a small size on a CPU, use ``--layers 2 --hidden 256 --batch 4``. The script
writes no result file; commit your measurements with the name of the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from common import machine, timed
from torch import Tensor

from megatron_embed.bridge import EncoderConfig
from megatron_embed.bridge.cpu import host
from megatron_embed.bridge.encoder import build_stages, transformer_config
from megatron_embed.bridge.layout import Layout
from megatron_embed.bridge.parallel import parallel_world, select_device
from megatron_embed.bridge.sequences import TokenBatch
from megatron_embed.recipes.config.schema import LossSection, OptimizerSection
from megatron_embed.recipes.encoding.micro_batches import BatchingPlan
from megatron_embed.recipes.planning.flops import model_flops
from megatron_embed.recipes.training.loss import ContrastiveLoss
from megatron_embed.recipes.training.metrics import peak_memory_bytes
from megatron_embed.recipes.training.optimizer import set_up_training
from megatron_embed.recipes.training.step import contrastive_step
from megatron_embed.recipes.training.targets import Targets


def texts(options: argparse.Namespace, vocab: int) -> list[list[int]]:
    """Return the token ids of queries (8 to 32 tokens), then of passages (most of the maximal length)."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return torch.randint(12, vocab, (length,), generator=generator).tolist()

    queries = [draw(8, 32) for _ in range(options.batch)]
    return queries + [draw(options.length // 4, options.length) for _ in range(options.batch * (1 + options.negatives))]


class Tokens(torch.nn.Module):
    """transformers' model as the first module of a SentenceTransformer, from ids to token states."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        from transformers import AutoModel

        self.model = AutoModel.from_config(config.to_hf(), dtype=torch.bfloat16)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add ``token_embeddings``."""
        states = self.model(input_ids=features["input_ids"], attention_mask=features["attention_mask"])
        return {**features, "token_embeddings": states.last_hidden_state}


def our_seconds(options: argparse.Namespace, config: EncoderConfig, sequences: list[list[int]]) -> dict[str, Any]:
    """Return the median seconds of this project's step, and how it ran."""
    transformer = transformer_config(config, Layout(), dtype=torch.bfloat16, recompute=options.recompute)
    encoders = build_stages(config, transformer)
    with torch.no_grad():
        for parameter in encoders[0].parameters():
            parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    state = set_up_training(encoders, OptimizerSection(lr=1e-6, distributed=False), train_iters=1000)
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
        synchronize()

    step()
    seconds = statistics.median(timed(step) for _ in range(options.steps))
    return {"seconds": seconds, "mode": "direct" if whole else "cached", "micro-batches": len(groups)}


def their_seconds(options: argparse.Namespace, config: EncoderConfig, sequences: list[list[int]]) -> float:
    """Return the seconds of the same batch with CachedMultipleNegativesRankingLoss, bf16 weights and fused AdamW."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.models import Normalize, Pooling

    device = host.device()
    model = SentenceTransformer(
        modules=[Tokens(config), Pooling(config.hidden_size, pooling_mode="mean"), Normalize()], device=str(device)
    )
    loss = CachedMultipleNegativesRankingLoss(model, scale=50.0, mini_batch_size=options.mini_batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    slots = 1 + options.negatives
    columns = [sequences[: options.batch], *(sequences[options.batch + slot :: slots] for slot in range(slots))]

    def features(column: list[list[int]]) -> dict[str, Tensor]:
        batch = TokenBatch.pad(column, pad_id=11)
        mask = torch.ones_like(batch.input_ids, dtype=torch.bool) if batch.mask is None else batch.mask
        return {"input_ids": batch.input_ids.to(device), "attention_mask": mask.long().to(device)}

    def step() -> None:
        value = loss([features(column) for column in columns], None)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        synchronize()

    step()
    return statistics.median(timed(step) for _ in range(options.steps))


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if not host.cuda_is_hidden():
        torch.cuda.synchronize()


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
    parser.add_argument("--mini-batch", type=int, default=32, help="sentence-transformers': try several, take its best")
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
    sequences = texts(options, config.vocab_size)
    tokens = sum(map(len, sequences))
    flops = model_flops(config, tokens=tokens, squared_lengths=sum(len(ids) ** 2 for ids in sequences))
    with parallel_world(Layout()):
        ours = our_seconds(options, config, sequences)
    peak = peak_memory_bytes()  # of our side, as theirs has not run yet
    if device.type == "cuda":
        torch.cuda.empty_cache()
    theirs = their_seconds(options, config, sequences)
    seconds = ours.pop("seconds")
    result = {
        "device": machine() if device.type == "cpu" else torch.cuda.get_device_name(),
        **ours,
        "tokens a step": tokens,
        "seconds a step": round(seconds, 3),
        "tokens/s": round(tokens / seconds),
        "model TFLOP/s": round(flops / seconds / 1e12, 2),
        "model FLOPs utilisation": round(flops / seconds / 1e12 / options.peak_tflops, 4),
        "peak memory GiB": round(peak / 2**30, 1),
        "sentence-transformers, tokens/s": round(tokens / theirs),
        "ratio": round(theirs / seconds, 2),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
