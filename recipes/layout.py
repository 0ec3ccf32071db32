"""Checks of a recipe against the world it runs in, and the pipeline's stages. All raise before anything is loaded."""

from __future__ import annotations

import json
from typing import Any

from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes.config import RecipeConfig

#: Keys whose feature does not exist yet, with the one value that they accept.
NOT_YET: dict[str, Any] = {
    "model.context_parallel_size": 1,
    "model.virtual_pipeline_model_parallel_size": None,
    "model.recompute": "none",
    "loss.learn_temperature": False,
    "loss.symmetric": False,
    "loss.false_negative_margin": None,
    "loss.matryoshka_dims": [],
    "loss.score_distillation_weight": 0.0,
    "loss.embedding_distillation_weight": 0.0,
    "data.packing": False,
}


def model_parallel_size(cfg: RecipeConfig) -> int:
    """Ranks that hold one copy of the model: TP × PP × CP."""
    model = cfg.model
    return model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size


def data_parallel_size(cfg: RecipeConfig, world_size: int) -> int:
    """Copies of the model in the world.

    Raises:
        UserError: TP × PP × CP does not divide the world.
    """
    model, size = cfg.model, model_parallel_size(cfg)
    if world_size % size:
        raise UserError(
            f"world size: found {world_size}; wanted a multiple of {size} = "
            f"model.tensor_model_parallel_size {model.tensor_model_parallel_size} × "
            f"model.pipeline_model_parallel_size {model.pipeline_model_parallel_size} × "
            f"model.context_parallel_size {model.context_parallel_size}"
        )
    return world_size // size


def validate(cfg: RecipeConfig, world_size: int, *, inputs: bool = True) -> None:
    """Refuse a recipe that cannot run on ``world_size`` ranks; ``inputs=False`` allows a model or data not yet named.

    Raises:
        UserError: naming the key, the value found and the value wanted.
    """
    if inputs:
        _validate_inputs(cfg)
    for key, neutral in NOT_YET.items():
        section, name = key.split(".")
        if (found := getattr(getattr(cfg, section), name)) != neutral:
            raise UserError(f"{key}: found {_yaml(found)}; wanted {_yaml(neutral)}, the only value supported yet")
    replicas, batch = data_parallel_size(cfg, world_size), cfg.train.global_batch_size
    if batch < replicas:
        raise UserError(
            f"train.global_batch_size: {batch} is smaller than the data-parallel size {replicas} "
            f"(world size {world_size}); every replica needs a query"
        )
    if batch % replicas:
        raise UserError(
            f"train.global_batch_size: {batch} is not a multiple of the data-parallel size {replicas} "
            f"(world size {world_size})"
        )
    _validate_values(cfg)


def _validate_inputs(cfg: RecipeConfig) -> None:
    if not cfg.model.hf_model and not cfg.checkpoint.pretrained_checkpoint and not cfg.checkpoint.load:
        raise UserError("model.hf_model: missing; wanted a Hugging Face model folder or id, model.hf_model=DIR_OR_ID")
    if not cfg.data.train:
        raise UserError("data.train: missing; wanted at least one source of training pairs, data.train=FILE.jsonl")


def _validate_values(cfg: RecipeConfig) -> None:
    train, data, optimizer, loss = cfg.train, cfg.data, cfg.optimizer, cfg.loss
    weighted = [source.weight is not None for source in data.train or []]
    if any(weighted) and not all(weighted):
        source = (data.train or [])[weighted.index(False)]
        raise UserError(f"data.train: {source.path} has no weight, others have; wanted a weight for all or for none")
    if optimizer.min_lr > optimizer.lr:
        raise UserError(f"optimizer.min_lr: {optimizer.min_lr:g} is above optimizer.lr {optimizer.lr:g}")
    if (optimizer.warmup_iters or 0) > train.train_iters:
        raise UserError(
            f"optimizer.warmup_iters: {optimizer.warmup_iters} is above train.train_iters {train.train_iters}"
        )
    if not loss.in_batch_negatives and not data.negatives_per_query:
        raise UserError(
            "loss.in_batch_negatives: false with data.negatives_per_query 0 leaves nothing to tell a positive from"
        )
    for key in ("query_max_length", "passage_max_length"):
        length = getattr(data, key)
        if length < 3:
            raise UserError(f"data.{key}: found {length}; wanted at least 3: BOS, a token of text, EOS")
        if train.micro_batch_size is None and length > train.micro_batch_tokens:
            raise UserError(
                f"data.{key}: {length} does not fit train.micro_batch_tokens {train.micro_batch_tokens}; "
                f"raise the latter or set train.micro_batch_size"
            )


def validate_layout(cfg: RecipeConfig, encoder: EncoderConfig) -> None:
    """Refuse a layout that this encoder cannot be cut into, before any weight is loaded.

    Raises:
        UserError: naming the key, the value found and what it must divide.
    """
    model, data = cfg.model, cfg.data
    tp, pp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if (count := getattr(encoder, name)) % tp:
            raise UserError(f"model.tensor_model_parallel_size: {tp} does not divide the model's {name} {count}")
    stages = pp * (model.virtual_pipeline_model_parallel_size or 1)
    if stages > encoder.num_hidden_layers:
        raise UserError(
            f"model.pipeline_model_parallel_size: {stages} stages are more than "
            f"the model's num_hidden_layers {encoder.num_hidden_layers}"
        )
    for dim in cfg.loss.matryoshka_dims:
        if dim > encoder.hidden_size:
            raise UserError(f"loss.matryoshka_dims: {dim} is above the model's hidden_size {encoder.hidden_size}")
    for key in ("query_max_length", "passage_max_length"):
        if (length := getattr(data, key)) > encoder.max_position_embeddings:
            raise UserError(
                f"data.{key}: {length} is above the model's max_position_embeddings {encoder.max_position_embeddings}"
            )


def pipeline_split(num_layers: int, stages: int) -> list[int]:
    """Layers of each pipeline stage: equal in the middle, the ends no heavier and as light as that allows.

    The slowest stage sets the pace, so the largest count comes first; among equals the ends are lightened, which
    also carry the embedding and the final norm and pooling. Equal middles are what megatron-core can express by
    `num_layers_in_first_pipeline_stage` and `num_layers_in_last_pipeline_stage`.

    >>> pipeline_split(26, 4)
    [6, 7, 7, 6]
    """
    if stages > num_layers:
        raise UserError(f"model.pipeline_model_parallel_size: {stages} stages are more than the {num_layers} layers")
    if stages == 1:
        return [num_layers]
    middle = -(-num_layers // stages)
    ends = num_layers - middle * (stages - 2)
    while ends < 2:  # rounding up left nothing for the ends (9 layers, 6 stages): thinner middles, heavier ends
        middle -= 1
        ends = num_layers - middle * (stages - 2)
    return [ends // 2, *[middle] * (stages - 2), ends - ends // 2]


def _yaml(value: Any) -> str:
    return json.dumps(value)  # null, true, false, 1, "none": as a YAML file or an override spells them
