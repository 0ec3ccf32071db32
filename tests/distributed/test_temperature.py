"""A learned temperature: its own rate, no decay, logged; as torch's AdamW with parameter groups would have it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import oracle
from support.runs import read_metrics, recipe, write_pairs
from support.tiny_models import save_model
from support.worlds import run_world

from megatron_embed.bridge.cpu import host
from megatron_embed.recipes import train
from megatron_embed.recipes.config.schema import OptimizerSection, RecipeConfig

STEPS, WARMUP, HALF = 12, 2, 6
LEARN = [
    "loss.temperature=0.05",
    "loss.learn_temperature=true",
    "optimizer.temperature_lr=3e-2",
    "optimizer.min_lr=2e-5",
    "optimizer.weight_decay=0.5",  # on the temperature it would be seen at once
    f"optimizer.warmup_iters={WARMUP}",
    f"train.train_iters={STEPS}",
    f"train.save_interval={HALF}",
]
PLAIN, PP2 = "optimizer.distributed=false", "model.pipeline_model_parallel_size=2"


def make_folder(folder: Path) -> None:
    save_model(folder / "model", num_hidden_layers=2)
    write_pairs(folder / "train.jsonl", 120, negatives=None)


def course(step: int, highest: float, lowest: float) -> float:
    """The documented course of a rate; steps from 0."""
    if step <= WARMUP:
        return highest * step / WARMUP
    return lowest + (highest - lowest) * (1 - (step - WARMUP) / (STEPS - WARMUP))


def by_torch(cfg: RecipeConfig, rate: Callable[[int], float]) -> list[float]:
    """The temperatures by which each step divides: Hugging Face's model, torch's AdamW, ``rate`` of each step."""
    from transformers import AutoConfig, AutoModel

    from megatron_embed.recipes.datasets.pairs import PairDataset
    from megatron_embed.recipes.datasets.sampler import GlobalBatchSampler
    from megatron_embed.recipes.datasets.tokenization import TextTokenizer

    data, opt = cfg.data, cfg.optimizer
    config = AutoConfig.from_pretrained(cfg.model.hf_model)
    config.is_causal = False
    model = AutoModel.from_pretrained(cfg.model.hf_model, config=config)
    dataset = PairDataset(data.sources())
    sampler = GlobalBatchSampler(dataset, cfg.train.global_batch_size, cfg.train.seed)
    lengths = {"query_max_length": data.query_max_length, "passage_max_length": data.passage_max_length}
    prompts = {"query_prompt": data.query_prompt, "passage_prompt": data.passage_prompt}
    tokenizer = TextTokenizer.from_folder(Path(str(cfg.model.hf_model)), **prompts, **lengths)
    log_temperature = torch.tensor([cfg.loss.temperature]).log().requires_grad_()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": opt.weight_decay},
        {"params": norms, "weight_decay": 0.0},
        {"params": [log_temperature], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.999), eps=1e-8)
    found = []
    for step in range(STEPS):
        found.append(log_temperature.exp().item())
        examples = [dataset[i] for i in sampler.batch(step)]
        passages = [[e.positive, *e.negatives] for e in examples]
        first = [sum(map(len, passages[:i])) for i in range(len(passages))]
        queries = oracle.embed(model, tokenizer.tokenize([e.query for e in examples], "query"))
        flat = oracle.embed(model, tokenizer.tokenize([text for group in passages for text in group], "passage"))
        optimizer.zero_grad()
        oracle.info_nce(queries, flat, first, log_temperature.exp()).backward()
        torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], opt.clip_grad)
        for group in optimizer.param_groups[:2]:
            group["lr"] = course(step, opt.lr, opt.min_lr)
        optimizer.param_groups[2]["lr"] = rate(step)
        optimizer.step()
    return found


def own_rate(step: int) -> float:
    return course(step, 3e-2, 3e-2 * 2e-5 / 1e-4)


def temperatures(folder: Path) -> list[float]:
    return [record["temperature"] for record in read_metrics(folder)]


@pytest.mark.parametrize("distributed", [True, False])
def test_twelve_steps_are_those_of_torchs_adamw_with_its_own_group(tmp_path: Path, distributed: bool) -> None:
    host.run_on_cpu()
    make_folder(tmp_path)
    cfg = recipe(
        tmp_path, "run", *LEARN, *([] if distributed else [PLAIN]), "logger.tensorboard=true", "train.log_interval=5"
    )
    train(cfg)
    wanted = by_torch(cfg, own_rate)
    found = {record["step"]: record["temperature"] for record in read_metrics(tmp_path / "run")}
    assert found == pytest.approx({step: wanted[step - 1] for step in found}, rel=1e-6)
    assert abs(wanted[-1] / wanted[0] - 1) > 0.1
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload().Scalars("temperature")
    assert {event.step: event.value for event in events} == pytest.approx(found, rel=1e-6)


def test_a_fixed_temperature_is_not_logged(tmp_path: Path) -> None:
    host.run_on_cpu()
    make_folder(tmp_path)
    train(recipe(tmp_path, "run", "train.train_iters=1"))
    assert all("temperature" not in record for record in read_metrics(tmp_path / "run"))


def test_groups_that_are_empty_on_the_first_rank_get_the_count_and_rates_again() -> None:
    """As Transformer Engine's optimizer leaves them: it counts nothing for an empty group."""
    from megatron_embed.recipes.training.optimizer import reset_groups

    old = {"max_lr": 9.0, "min_lr": 9.0}
    groups: list[dict[str, Any]] = [
        {"is_decoupled_lr": False, "step": 7, **old},
        {"is_decoupled_lr": True, **old},
        {"is_decoupled_lr": True, "step": 3, **old},
    ]
    section = OptimizerSection(lr=1e-3, min_lr=1e-4, temperature_lr=1e-2)
    optimizer: Any = SimpleNamespace(param_groups=groups)
    reset_groups(optimizer, section)
    rates = [(group["step"], group["max_lr"], pytest.approx(group["min_lr"])) for group in groups]
    assert rates == [(7, 1e-3, 1e-4), (7, 1e-2, 1e-3), (7, 1e-2, 1e-3)]


LAYOUTS = {"dp2": [], "pp2_plain": [PP2, PLAIN], "dp2_plain": [PLAIN], "pp2": [PP2]}


def cut(root: Path, name: str, again: str) -> None:
    """``again`` is the run ``name`` as it stood when half of it was done."""
    import torch.distributed as dist

    if dist.get_rank() == 0:
        shutil.copytree(root / name, root / again)
        checkpoints = root / again / "checkpoints"
        shutil.rmtree(checkpoints / f"iter_{STEPS:07d}")
        (checkpoints / "latest_checkpointed_iteration.txt").write_text(f"{HALF}\n")
        config = root / again / "run_config.yaml"
        config.write_text(config.read_text().replace(f"{root}/{name}\n", f"{root}/{again}\n"))
    dist.barrier()


def runs_and_resumed_runs(folder: str, names: list[str]) -> None:
    from megatron_embed.recipes.training import optimizer

    root, group = Path(folder), optimizer.temperature_group
    for name in names:
        overrides = LAYOUTS[name]
        train(recipe(root, name, *LEARN, *overrides))
        cut(root, name, f"{name}_again")
        train(recipe(root, f"{name}_again", *LEARN, *overrides))
        optimizer.temperature_group = lambda section: {}  # as it was before there was such a group
        train(recipe(root, f"{name}_old", *LEARN, *overrides))
        optimizer.temperature_group = group
        cut(root, f"{name}_old", f"{name}_old_again")
        train(recipe(root, f"{name}_old_again", *LEARN, *overrides))
        load = f"checkpoint.load={root / name / 'checkpoints'}"  # a run that learns none goes on from one that does
        fixed = [word for word in LEARN if "learn_temperature" not in word]
        train(recipe(root, f"{name}_fixed", *fixed, *overrides, load, f"train.train_iters={STEPS + 1}"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "names", [["dp2", "pp2_plain"], pytest.param(["dp2_plain", "pp2"], marks=pytest.mark.exhaustive)]
)
def test_layouts_and_resumed_runs_old_ones_too_are_torchs_adamw(
    names: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_folder(tmp_path)
    run_world(runs_and_resumed_runs, 2, str(tmp_path), names)
    said = capfd.readouterr().err.count("from before optimizer.temperature_lr: its temperature learned at")
    cfg = recipe(tmp_path, "any", *LEARN)
    own = by_torch(cfg, own_rate)

    def late(step: int) -> float:
        return course(step, 1e-4, 2e-5) if step < HALF else own_rate(step)

    from_old = by_torch(cfg, late)
    for name in names:
        assert temperatures(tmp_path / name) == pytest.approx(own, rel=1e-6), name
        assert temperatures(tmp_path / f"{name}_again") == temperatures(tmp_path / name), name
        # lines of the old run say what it was; from HALF on its temperature has a rate of its own
        assert temperatures(tmp_path / f"{name}_old_again") == pytest.approx(from_old, rel=1e-6), name
        assert len(read_metrics(tmp_path / f"{name}_fixed")) == 1
    assert said == len(names)
