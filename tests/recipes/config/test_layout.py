"""What is refused before anything is loaded, and how layers are dealt to pipeline stages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_models import tiny_config

from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.errors import UserError
from megatron_embed.bridge.layout import pipeline_split
from megatron_embed.recipes import RECIPES
from megatron_embed.recipes.config.checks import validate, validate_layout
from megatron_embed.recipes.config.overrides import apply_overrides
from megatron_embed.recipes.config.schema import RecipeConfig


def recipe(*overrides: str) -> RecipeConfig:
    return apply_overrides(RecipeConfig(), ["model.hf_model=m", "data.train=t.jsonl", *overrides])


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_is_valid_on_eight_gpus(name: str) -> None:
    validate(apply_overrides(RECIPES[name](), ["model.hf_model=m", "data.train=t"]), 8)


@pytest.mark.parametrize(
    ("overrides", "world", "message"),
    [
        (["model.hf_model=null"], 1, "model.hf_model: missing; wanted a Hugging Face model folder"),
        (["data.train=null"], 1, "data.train: missing; wanted at least one source"),
        (["data.train=[]"], 1, "data.train: missing"),
        (["model.tensor_model_parallel_size=2"], 3, "world size: found 3; wanted a multiple of 2 = model.tensor_mod"),
        (["train.global_batch_size=2"], 4, "train.global_batch_size: 2 is smaller than the data-parallel size 4"),
        (["train.global_batch_size=6"], 4, "train.global_batch_size: 6 is not a multiple of the data-parallel size 4"),
        (["optimizer.min_lr=1"], 1, "optimizer.min_lr: 1 is above optimizer.lr 5e-06"),
        (["optimizer.warmup_iters=2000"], 1, "optimizer.warmup_iters: 2000 is above train.train_iters 1000"),
        (["data.query_max_length=2"], 1, "data.query_max_length: found 2; wanted at least 3"),
        (["train.micro_batch_tokens=100"], 1, "data.query_max_length: 512 does not fit train.micro_batch_tokens 100"),
        (["loss.in_batch_negatives=false", "data.negatives_per_query=0"], 1, "loss.in_batch_negatives: false with"),
        (
            ["train.global_batch_size=1", "data.negatives_per_query=0"],
            1,
            "train.global_batch_size: 1 with data.negatives_per_query 0 leaves nothing to tell a positive from",
        ),
        (
            ["train.global_batch_size=4", "loss.cross_rank_negatives=false", "data.negatives_per_query=0"],
            4,
            "loss.cross_rank_negatives: false, and train.global_batch_size 4 is one query a rank, with",
        ),
        (
            ["loss.learn_temperature=true", "optimizer.distributed=false"],
            1,
            "loss.learn_temperature: true with model.precision bf16 needs optimizer.distributed=true",
        ),
        (["model.virtual_pipeline_model_parallel_size=2"], 1, "interleaved stages need model.pipeline_model"),
        (["loss.symmetric=true", "loss.in_batch_negatives=false"], 1, "loss.symmetric: true needs loss.in_batch"),
        (
            ["data.train=[{path: a, weight: 1}, b]"],
            1,
            "data.train: b has no weight, but others have one; wanted",
        ),
    ],
)
def test_refused(overrides: list[str], world: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(recipe(*overrides), world)


def test_a_micro_batch_size_replaces_the_token_budget() -> None:
    validate(recipe("train.micro_batch_tokens=100", "train.micro_batch_size=4"), 1)


@pytest.mark.parametrize(
    ("overrides", "world"),
    [
        (["train.global_batch_size=1"], 1),  # whether the data has negatives is not known yet
        (["train.global_batch_size=2", "data.negatives_per_query=0"], 2),
        (["train.global_batch_size=4", "loss.cross_rank_negatives=false", "data.negatives_per_query=0"], 2),
        (["train.global_batch_size=1", "data.negatives_per_query=0", "loss.embedding_distillation_weight=1"], 1),
        (["loss.learn_temperature=true", "optimizer.distributed=false", "model.precision=fp32"], 1),
    ],
)
def test_batches_that_have_something_to_learn_from(overrides: list[str], world: int) -> None:
    validate(recipe(*overrides), world)


def test_inputs_may_be_missing_where_nothing_is_built() -> None:
    validate(RecipeConfig(), 1, inputs=False)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.tensor_model_parallel_size=3"], "model.tensor_model_parallel_size: 3 does not divide .*_heads 8"),
        (["model.tensor_model_parallel_size=8"], "8 does not divide num_key_value_heads 4"),
        (
            ["model.pipeline_model_parallel_size=3"],
            "model.pipeline_model_parallel_size: 3 is more than the model's 2 layers",
        ),
        (["data.passage_max_length=2048"], "data.passage_max_length: 2048 is above .*max_position_embeddings 1024"),
        (["loss.matryoshka_dims=[32,64]"], "loss.matryoshka_dims: 64 is above the model's hidden_size 48"),
    ],
)
def test_layouts_that_the_model_cannot_be_cut_into(overrides: list[str], message: str) -> None:
    encoder = EncoderConfig.from_hf(tiny_config())
    validate_layout(recipe("model.tensor_model_parallel_size=4", "model.pipeline_model_parallel_size=2"), encoder)
    with pytest.raises(UserError, match=message):
        validate_layout(recipe(*overrides), encoder)


@pytest.mark.parametrize(
    ("layers", "stages", "split"),
    [
        (26, 4, [6, 7, 7, 6]),
        (34, 4, [8, 9, 9, 8]),
        (40, 4, [10, 10, 10, 10]),
        (26, 1, [26]),
        (5, 2, [2, 3]),
        (3, 3, [1, 1, 1]),
    ],
)
def test_pipeline_split(layers: int, stages: int, split: list[int]) -> None:
    assert pipeline_split(layers, stages) == split


@given(st.integers(1, 128), st.integers(1, 32))
def test_pipeline_split_deals_every_layer_evenly_and_the_ends_are_not_the_heavier(layers: int, stages: int) -> None:
    if stages > layers:
        return
    split = pipeline_split(layers, stages)
    assert (len(split), sum(split)) == (stages, layers)
    assert max(split) - min(split) <= 1
    assert split[0] == min(split)
    assert stages < 3 or split[-1] <= max(split[1:-1])
