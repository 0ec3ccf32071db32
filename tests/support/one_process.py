"""Training by the book: a stock Hugging Face model, InfoNCE written out, torch's AdamW, one process, no project code
but the order of the examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import Ministral3Model

from megatron_embed.recipes.config.schema import RecipeConfig
from megatron_embed.recipes.datasets.pairs import PairDataset
from megatron_embed.recipes.datasets.sampler import GlobalBatchSampler
from support import oracle


@dataclass(frozen=True)
class Texts:
    """Token ids of a step: queries, and of each its positive followed by its hard negatives."""

    queries: oracle.Ids
    passages: list[oracle.Ids]

    @property
    def flat(self) -> oracle.Ids:
        return [ids for group in self.passages for ids in group]


def texts_of(cfg: RecipeConfig) -> list[Texts]:
    """What each of a recipe's steps trains on."""
    cfg = cfg.resolved()
    dataset = PairDataset(cfg.data.sources())
    sampler = GlobalBatchSampler(dataset, cfg.train.global_batch_size, cfg.train.seed)
    tokenizer = Tokenizer.from_file(f"{cfg.model.hf_model}/tokenizer.json")

    def ids(texts: list[str], prompt: str, length: int) -> oracle.Ids:
        tokenizer.enable_truncation(length)
        return [tokenizer.encode(prompt + text).ids for text in texts]

    steps = []
    for step in range(cfg.train.train_iters):
        examples = [dataset[i] for i in sampler.batch(step)]
        queries = ids([e.query for e in examples], "query: ", cfg.data.query_max_length)
        groups = [[e.positive, *e.negatives[: cfg.data.negatives_per_query]] for e in examples]
        passages = [ids(group, "passage: ", cfg.data.passage_max_length) for group in groups]
        steps.append(Texts(queries, passages))
    return steps


def train_by_the_book(cfg: RecipeConfig, dtype: torch.dtype = torch.float32) -> list[dict[str, float]]:
    """``loss``, ``grad_norm`` (before clipping) and ``learning_rate`` of every step of a recipe without frills."""
    model = Ministral3Model.from_pretrained(cfg.model.hf_model, dtype=dtype)
    model.config.is_causal = False
    if dtype == torch.float64:
        oracle.use_exact_norms(model)
    optimizer = torch.optim.AdamW(_groups(model, cfg), lr=0.0, betas=(0.9, 0.999), eps=1e-8)
    records = []
    for step, texts in enumerate(texts_of(cfg)):
        learning_rate = linear_with_warm_up(step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        firsts = [sum(map(len, texts.passages[:i])) for i in range(len(texts.passages))]
        queries, passages = oracle.embed(model, texts.queries), oracle.embed(model, texts.flat)
        loss = oracle.info_nce(queries, passages, firsts, cfg.loss.temperature)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.optimizer.clip_grad)
        optimizer.step()
        records.append({"loss": loss.item(), "grad_norm": norm.item(), "learning_rate": learning_rate})
    return records


def linear_with_warm_up(step: int, cfg: RecipeConfig) -> float:
    """The learning rate of a step (from 0): up to ``lr`` in a line, and down to ``min_lr`` in another."""
    optimizer, warm_up = cfg.optimizer, cfg.optimizer.warmup_iters
    assert warm_up
    assert optimizer.lr_decay_style == "linear"
    if step <= warm_up:
        return optimizer.lr * step / warm_up
    left = 1 - (step - warm_up) / (cfg.train.train_iters - warm_up)
    return optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * left


def _groups(model: torch.nn.Module, cfg: RecipeConfig) -> list[dict[str, Any]]:
    """Matrices decay, vectors (the norms' weights) do not."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    return [
        {"params": matrices, "weight_decay": cfg.optimizer.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
