"""Checks of a recipe against its world size and its model. All run before anything is loaded."""

from __future__ import annotations

from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.errors import UsageError, UserError
from megatron_embed.bridge.layout import Layout, check_layout
from megatron_embed.recipes.config.schema import LossSection, RecipeConfig


def layout_of(cfg: RecipeConfig) -> Layout:
    """Return the recipe's parallel sizes."""
    model = cfg.model
    return Layout(
        tp=model.tensor_model_parallel_size,
        pp=model.pipeline_model_parallel_size,
        cp=model.context_parallel_size,
        vpp=model.virtual_pipeline_model_parallel_size,
    )


def start_of(cfg: RecipeConfig) -> tuple[str, str]:
    """Return the key that names a run's first weights, and its value; the value is empty if no key names any."""
    if cfg.checkpoint.pretrained_checkpoint:
        return "checkpoint.pretrained_checkpoint", cfg.checkpoint.pretrained_checkpoint
    if cfg.checkpoint.load and not cfg.model.hf_model:
        return "checkpoint.load", cfg.checkpoint.load
    return "model.hf_model", cfg.model.hf_model or ""


def loss_mode(wanted: str, pp: int) -> str:
    """Resolve ``loss.mode`` as far as the pipeline decides it: return ``direct``, ``cached`` or ``auto``.

    ``auto`` becomes ``cached`` on several pipeline stages, because a single micro-batch would leave all stages but one
    idle. Otherwise it stays ``auto``, which is direct where a batch fits into one micro-batch.
    """
    return "cached" if wanted == "auto" and pp > 1 else wanted


def validate(cfg: RecipeConfig, world_size: int, *, inputs: bool = True) -> None:
    """Refuse a recipe that cannot run on ``world_size`` ranks; ``inputs=False`` allows a recipe without model or data.

    Raises:
        UsageError: the message names the key, the value found and the value wanted.
    """
    if inputs:
        _validate_inputs(cfg)
    replicas, batch = layout_of(cfg).data_parallel_size(world_size), cfg.train.global_batch_size
    if batch < replicas:
        raise UsageError(
            f"train.global_batch_size: {batch} is smaller than the data-parallel size {replicas} "
            f"(world size {world_size}); every replica needs a query: wanted a multiple of {replicas}, or fewer ranks"
        )
    if batch % replicas:
        raise UsageError(
            f"train.global_batch_size: {batch} is not a multiple of the data-parallel size {replicas} "
            f"(world size {world_size}), such as {batch // replicas * replicas}"
        )
    _validate_values(cfg)
    if not cfg.data.negatives_per_query:
        check_candidates(cfg.loss, batch, replicas, 0, "data.negatives_per_query 0")


def check_candidates(loss: LossSection, batch: int, replicas: int, negatives: int, why: str) -> None:
    """Refuse batches that score a query against its positive alone, because their loss is always 0.

    Args:
        batch: queries in a step, over all ranks.
        replicas: data-parallel ranks.
        negatives: most hard negatives that a query has.
        why: the reason for that number, for the message.

    Raises:
        UserError: the message names the key that leaves a single candidate.
    """
    if negatives or loss.embedding_distillation_weight:
        return
    if not loss.in_batch_negatives:
        key, way = "loss.in_batch_negatives: false", "set it to true"
    elif batch == 1:
        key, way = "train.global_batch_size: 1", "raise it"
    elif not loss.cross_rank_negatives and batch == replicas:
        key = f"loss.cross_rank_negatives: false, and train.global_batch_size {batch} is one query a rank,"
        way = "raise the batch"
    else:
        return
    raise UsageError(
        f"{key} with {why} leaves nothing to tell a positive from: the loss would be 0 at every step; "
        f"{way}, or train with hard negatives"
    )


def without_negatives(cfg: RecipeConfig, count: int) -> str:
    """Return the message about queries of a batch whose loss is constant because they have no negative."""
    off = next((key for key in ("in_batch_negatives", "cross_rank_negatives") if not getattr(cfg.loss, key)), None)
    return (
        f"{count} of {cfg.train.global_batch_size} queries have no negative and train nothing: their rows have none, "
        f"or every candidate is masked as a known positive, as the text of one, or by loss.false_negative_margin; "
        f"give them hard negatives, {f'set loss.{off}=true' if off else 'raise train.global_batch_size'}, "
        f"or leave them out"
    )


def _validate_inputs(cfg: RecipeConfig) -> None:
    if not cfg.model.hf_model and not cfg.checkpoint.pretrained_checkpoint and not cfg.checkpoint.load:
        raise UsageError("model.hf_model: missing; wanted a Hugging Face model folder or id, model.hf_model=DIR_OR_ID")
    if not cfg.data.train:
        raise UsageError("data.train: missing; wanted at least one source of training pairs, data.train=FILE.jsonl")


def _validate_values(cfg: RecipeConfig) -> None:
    train, data, optimizer, loss = cfg.train, cfg.data, cfg.optimizer, cfg.loss
    weighted = [source.weight is not None for source in data.train or []]
    if any(weighted) and not all(weighted):
        source = (data.train or [])[weighted.index(False)]
        raise UsageError(
            f"data.train: {source.path} has no weight, but others have one; wanted a weight for all or for none"
        )
    layout = layout_of(cfg)
    if layout.vpp is not None and layout.pp == 1:
        raise UsageError(
            "model.virtual_pipeline_model_parallel_size: interleaved stages need "
            "model.pipeline_model_parallel_size of at least 2"
        )
    if layout.vpp == 1:
        raise UsageError(
            "model.virtual_pipeline_model_parallel_size: found 1; wanted the stages of each rank, 2 or more, or null "
            "for no interleaving"
        )
    if layout.vpp is not None and loss.mode == "direct":
        raise UsageError(
            "loss.mode: found direct, which is one micro-batch, but interleaved stages need several; use cached"
        )
    if optimizer.min_lr > optimizer.lr:
        raise UsageError(
            f"optimizer.min_lr: {optimizer.min_lr:g} is above optimizer.lr {optimizer.lr:g}; wanted at most that"
        )
    if (optimizer.warmup_iters or 0) > train.train_iters:
        raise UsageError(
            f"optimizer.warmup_iters: {optimizer.warmup_iters} is above train.train_iters {train.train_iters}; wanted "
            f"at most that"
        )
    precision = cfg.model.precision
    if loss.learn_temperature and not optimizer.distributed and precision != "fp32":
        raise UsageError(
            f"loss.learn_temperature: true with model.precision {precision} needs optimizer.distributed=true: "
            f"megatron-core's other optimizer cannot save the temperature, an fp32 number among 16-bit ones"
        )
    if not loss.in_batch_negatives:
        for key in ("symmetric", "query_query_negatives", "passage_passage_negatives"):
            if getattr(loss, key):
                raise UsageError(f"loss.{key}: true needs loss.in_batch_negatives, which is false; set both alike")
    for key in ("query_max_length", "passage_max_length"):
        length = getattr(data, key)
        if length < 3:
            raise UsageError(f"data.{key}: found {length}; wanted at least 3: BOS, a token of text, EOS")
        if train.micro_batch_size is None and length > train.micro_batch_tokens:
            raise UsageError(
                f"data.{key}: {length} does not fit train.micro_batch_tokens {train.micro_batch_tokens}; "
                f"raise the latter or set train.micro_batch_size"
            )


def validate_layout(cfg: RecipeConfig, encoder: EncoderConfig) -> None:
    """Refuse a layout or width that this encoder does not allow, before any weight is loaded.

    Raises:
        UserError: the message names the key, the value found and the size that it must divide or not exceed.
    """
    check_layout(encoder, layout_of(cfg))
    data = cfg.data
    for dim in cfg.loss.matryoshka_dims:
        if dim > encoder.hidden_size:
            raise UserError(
                f"loss.matryoshka_dims: {dim} is above the model's hidden_size {encoder.hidden_size}; take it out"
            )
    for key in ("query_max_length", "passage_max_length"):
        if (length := getattr(data, key)) > encoder.max_position_embeddings:
            raise UserError(
                f"data.{key}: {length} is above the model's max_position_embeddings "
                f"{encoder.max_position_embeddings}; wanted at most that"
            )
