"""The recipe: its sections, keys and defaults, and the checks that need only the values.

Every key is a field below. All fields are strict, so a typo or a value of the wrong type never trains silently.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from megatron_embed.bridge.config import Pooling
from megatron_embed.bridge.errors import UsageError
from megatron_embed.recipes.config.messages import explain_validation_error


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number")
    return value


# Integers are strict: 1.0, "1" and true are errors. Floats accept "5e-6", which YAML reads as a string.
Count = Annotated[int, Field(strict=True, ge=1)]
CountOrZero = Annotated[int, Field(strict=True, ge=0)]
Number = Annotated[float, BeforeValidator(_no_bool)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Flag = Annotated[bool, Field(strict=True)]


class Section(BaseModel):
    """A section with a closed set of keys, whose values are checked at construction and at every assignment.

    Raises:
        UsageError: a key is unknown or a value is bad; pydantic's own error never surfaces.
    """

    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise self._refused(error) from None

    # With this mark pydantic validates nested sections itself, so its errors have the full path of the key.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            raise self._refused(error) from None

    @classmethod
    def _refused(cls, error: ValidationError) -> UsageError:
        sections = {field.annotation: name for name, field in RecipeConfig.model_fields.items()}
        sections[DataSource] = "data.train"
        return UsageError(explain_refusal(error, prefix=sections.get(cls, "")))


class ModelSection(Section):
    """The model to train, and its layout over the ranks."""

    hf_model: str | None = None
    """Hugging Face folder or id; its weights are read directly unless checkpoint.pretrained_checkpoint is set."""
    tensor_model_parallel_size: Count = 1
    """Ranks that share every layer; TP × PP × CP divides the world, the rest is data parallel."""
    pipeline_model_parallel_size: Count = 1
    """Pipeline stages; uneven stages are chosen automatically."""
    context_parallel_size: Count = 1
    """Ranks that share every sequence."""
    virtual_pipeline_model_parallel_size: Count | None = None
    """Interleaved stages of each rank; null: no interleaving."""
    sequence_parallel: Flag | None = None
    """Split activations outside the matrix products over the TP ranks; null: true if TP > 1."""
    pooling: Pooling = "avg"
    """Pooling over the real tokens: avg, cls, last or weighted_avg."""
    normalize: Flag = True
    """L2-normalise the embeddings."""
    bidirectional: Flag = False
    """Train a ready embedder with causal attention as a bidirectional base model; false: refuse such an embedder."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Precision of weights and activations; the optimizer and the loss are fp32."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations to compute again in the backward pass instead of keeping them."""


#: keys that set the layout of a model over the ranks
LAYOUT_KEYS = (
    "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size",
    "model.context_parallel_size",
    "model.virtual_pipeline_model_parallel_size",
)


class LossSection(Section):
    """The contrastive objective."""

    temperature: Positive = 0.02
    """Divisor of the scores."""
    learn_temperature: Flag = False
    """Train the temperature too."""
    mode: Literal["auto", "direct", "cached"] = "auto"
    """One pass (direct, needs the per-rank batch in one micro-batch) or two (cached); the gradient is the same."""
    kept_micro_batches: CountOrZero | Literal["auto"] = "auto"
    """Micro-batches whose graphs pass 1 of a cached step keeps, so that pass 2 does not compute them again; auto: as
    many as the memory holds that the second step leaves free."""
    in_batch_negatives: Flag = True
    """Use other queries' passages as negatives."""
    cross_rank_negatives: Flag = True
    """Use the passages of the other data-parallel ranks as negatives too."""
    symmetric: Flag = False
    """Add the passage → query direction; the loss is the mean of the two directions."""
    query_query_negatives: Flag = False
    """Use other queries as negatives of a query too; all directions then share one softmax."""
    passage_passage_negatives: Flag = False
    """Use other queries' passages as negatives of a positive too; all directions then share one softmax."""
    false_negative_margin: Number | None = None
    """Mask negatives that score above positive + margin; null: mask none."""
    matryoshka_dims: list[Count] = []
    """Widths of embedding prefixes to train beside the whole embedding; the loss is the mean over all widths."""
    score_distillation_weight: NonNegative = 0.0
    """Weight of the KL divergence to the teacher scores in the data."""
    embedding_distillation_weight: NonNegative = 0.0
    """Weight of the cosine distance to the teacher embeddings in the data."""

    @field_validator("matryoshka_dims")
    @classmethod
    def _each_once(cls, dims: list[int]) -> list[int]:
        twice = [dim for number, dim in enumerate(dims) if dim in dims[:number]]
        if twice:
            raise ValueError(f"each width once; {twice[0]} is listed twice")
        return dims

    def widths(self, hidden_size: int) -> list[int]:
        """Return the widths that the loss averages over: the whole embedding's first, then ``matryoshka_dims``."""
        return [hidden_size, *(dim for dim in self.matryoshka_dims if dim != hidden_size)]


class DataSource(Section):
    """One source of training pairs."""

    path: str
    """JSONL, JSON or Parquet file, BEIR folder, or hf://org/name."""
    weight: Positive | None = None
    """Share of the batches drawn from this source; null for every source: proportional to their rows."""
    query_prompt: str | None = None
    """Prompt of its queries; null: data.query_prompt."""
    passage_prompt: str | None = None
    """Prompt of its passages; null: data.passage_prompt."""

    def stated(self) -> set[str]:
        """Return the keys whose values this entry itself sets."""
        return {name for name in self.model_fields_set if getattr(self, name) is not None}


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | Mapping | DataSource) else value


class DataSection(Section):
    """The data to read, and the way texts become tokens."""

    train: list[DataSource] | None = None
    """Path, list of paths, or list of {path, weight, query_prompt, passage_prompt}."""
    query_prompt: str = "query: "
    """Prefix of every query, exactly as written."""
    passage_prompt: str = "passage: "
    """Prefix of every passage, exactly as written."""
    query_max_length: Count = 512
    """Most tokens of a query, BOS and EOS included."""
    passage_max_length: Count = 512
    """Most tokens of a passage, BOS and EOS included."""
    negatives_per_query: CountOrZero = 4
    """Most hard negatives of a query, if the data has them."""
    packing: Flag = True
    """Lay sequences end to end instead of padding them."""
    eval: list[str] | None = None
    """BEIR folder or folders, evaluated every train.eval_interval steps."""

    @field_validator("train", mode="before")
    @classmethod
    def _sources(cls, value: Any) -> Any:
        value = _as_list(value)
        if isinstance(value, list):
            return [{"path": item} if isinstance(item, str) else item for item in value]
        return value

    @field_validator("eval", mode="before")
    @classmethod
    def _folders(cls, value: Any) -> Any:
        return _as_list(value)

    def sources(self) -> list[DataSource]:
        """Return the training sources with their prompts filled in."""
        return [
            DataSource.model_construct(
                source.stated(),  # the copy keeps the keys that the entry itself set
                path=source.path,
                weight=source.weight,
                query_prompt=self.query_prompt if source.query_prompt is None else source.query_prompt,
                passage_prompt=self.passage_prompt if source.passage_prompt is None else source.passage_prompt,
            )
            for source in self.train or []
        ]


class TrainSection(Section):
    """Batches, steps and the folder of the run."""

    global_batch_size: Count = 128
    """Queries in a step, over all ranks."""
    micro_batch_size: Count | None = None
    """Texts in a micro-batch, packed or padded; if set, it replaces micro_batch_tokens."""
    micro_batch_tokens: Count = 16384
    """Most tokens in a micro-batch."""
    train_iters: Count = 1000
    """Number of optimizer steps."""
    eval_interval: Count = 200
    """Steps between evaluations on data.eval."""
    save_interval: Count = 200
    """Steps between checkpoints; the last step is always saved."""
    log_interval: Count = 10
    """Steps between lines of metrics.jsonl."""
    save_dir: str | None = None
    """Folder of the run; null: $SAVE_DIR, or runs/<recipe>."""
    seed: CountOrZero = 42
    """Seed of the data order."""
    timeout_minutes: Positive = 10.0
    """Minutes that ranks wait for a silent rank. Then every rank ends and says which one it was and where it stood."""


class OptimizerSection(Section):
    """Adam with betas 0.9/0.999 and eps 1e-8, and the schedule of the learning rate."""

    lr: Positive = 5e-6
    """The highest learning rate."""
    min_lr: NonNegative = 0.0
    """The learning rate at the end."""
    temperature_lr: Positive = 1e-2
    """The highest learning rate of a learned temperature's logarithm, with lr's schedule and no weight decay."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay, as in AdamW."""
    clip_grad: NonNegative = 1.0
    """Largest gradient norm; 0: no clipping."""
    warmup_iters: CountOrZero | None = None
    """Steps of linear warm-up; null: 10 % of train_iters."""
    lr_decay_style: Literal["linear", "cosine"] = "linear"
    """Shape of the learning rate's decay after the warm-up."""
    distributed: Flag = True
    """Shard the optimizer state over the data-parallel ranks."""
    overlap_grad_reduce: Flag = True
    """Reduce gradients over the data-parallel ranks during backward."""


class CheckpointSection(Section):
    """The source of weights and state."""

    pretrained_checkpoint: str | None = None
    """Start from this Megatron checkpoint's weights."""
    load: str | None = None
    """Continue from another run's checkpoint: weights, optimizer, data position."""
    resume: Flag = True
    """Continue from save_dir if it holds a checkpoint of the same model, data, loss, optimizer and seed; false: start
    anew there and move the run that it holds to save_dir/replaced-1."""
    allow_fallback: Flag = False
    """If the checkpoint to continue from is damaged, say so and continue from the newest sound one before it."""


class LoggerSection(Section):
    """Logs beside metrics.jsonl, which is always written."""

    tensorboard: Flag = True
    """Write TensorBoard logs to save_dir/tensorboard."""
    wandb_project: str | None = None
    """Weights & Biases project; null: no logging there."""


class RecipeConfig(Section):
    """The config of one training run. `train` takes it; `run_config.yaml` is its YAML form."""

    recipe: str = "custom"
    """Name of the recipe function; it names the run's folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto, cpu or cuda; auto: cuda where there are GPUs, one for each local process, and cpu where there are none."""
    model: ModelSection = ModelSection()
    loss: LossSection = LossSection()
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    optimizer: OptimizerSection = OptimizerSection()
    checkpoint: CheckpointSection = CheckpointSection()
    logger: LoggerSection = LoggerSection()

    def resolved(self) -> RecipeConfig:
        """Return a copy in which derived values replace the nulls that stand for them."""
        cfg = self.model_copy(deep=True)
        model, train, optimizer = cfg.model, cfg.train, cfg.optimizer
        if model.tensor_model_parallel_size == 1:
            model.sequence_parallel = False
        elif model.sequence_parallel is None:
            model.sequence_parallel = True
        if train.save_dir is None:
            train.save_dir = os.environ.get("SAVE_DIR") or f"runs/{cfg.recipe}"
        train.save_dir = os.path.expanduser(train.save_dir)  # a shell does not expand "~" after "train.save_dir="
        if optimizer.warmup_iters is None:
            optimizer.warmup_iters = train.train_iters // 10
        return cfg

    def to_dict(self) -> dict[str, Any]:
        """Return the plain values of each section; ``run_config.config_from_dict`` is the inverse."""
        return self.model_dump(mode="json")


def keys(model: type[Section] = RecipeConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted key with its pydantic field, in the order of the sections."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def explain_refusal(error: ValidationError, *, prefix: str = "", found: Any = None) -> str:
    """Describe a pydantic error about a recipe in one line; see :func:`explain_validation_error`."""
    known = [key for key, _ in keys()]
    return explain_validation_error(error, known, DataSource.model_fields, prefix=prefix, found=found)
