"""The recipe: its sections, keys, defaults, and the checks that need nothing but the values.

Every key is a field below; strict throughout, so that a typo or a value of the wrong type never trains silently.
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


# Strict integers: 1.0, "1" and true are mistakes. Floats accept "5e-6", which YAML takes for a string.
Count = Annotated[int, Field(strict=True, ge=1)]
CountOrZero = Annotated[int, Field(strict=True, ge=0)]
Number = Annotated[float, BeforeValidator(_no_bool)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Flag = Annotated[bool, Field(strict=True)]


class Section(BaseModel):
    """Keys are closed and values are checked, at construction and at every assignment.

    Raises:
        UsageError: an unknown key or a bad value, by either of which pydantic's own error never surfaces.
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

    # With this mark pydantic validates sections inside of others itself, and so knows where in the whole an error is.
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
    """What is trained, and how it is laid out over the ranks."""

    hf_model: str | None = None
    """Hugging Face folder or id; weights are read straight from it unless checkpoint.pretrained_checkpoint is set."""
    tensor_model_parallel_size: Count = 1
    """Ranks that share every layer; TP × PP × CP divides the world, the rest is data parallel."""
    pipeline_model_parallel_size: Count = 1
    """Pipeline stages; uneven stages are chosen automatically."""
    context_parallel_size: Count = 1
    """Ranks that share every sequence."""
    virtual_pipeline_model_parallel_size: Count | None = None
    """Interleaved stages a rank; null: none."""
    sequence_parallel: Flag | None = None
    """Activations outside the matrices split over the TP ranks; null: true where TP > 1."""
    pooling: Pooling = "avg"
    """avg, cls, last or weighted_avg, over the real tokens."""
    normalize: Flag = True
    """L2-normalise the embeddings."""
    bidirectional: Flag = False
    """Train a ready embedder with causal attention bidirectionally, as a base model; without it one is refused."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Of weights and activations; the optimizer and the loss are fp32."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass instead of kept."""


#: the keys that say how a model is laid out over the ranks
LAYOUT_KEYS = (
    "model.tensor_model_parallel_size",
    "model.pipeline_model_parallel_size",
    "model.context_parallel_size",
    "model.virtual_pipeline_model_parallel_size",
)


class LossSection(Section):
    """The contrastive objective."""

    temperature: Positive = 0.02
    """Scores are divided by it."""
    learn_temperature: Flag = False
    """Train the temperature too."""
    mode: Literal["auto", "direct", "cached"] = "auto"
    """The same gradient in one pass (direct) or two (cached). direct needs the per-rank batch in one micro-batch."""
    in_batch_negatives: Flag = True
    """Other queries' passages are negatives."""
    cross_rank_negatives: Flag = True
    """So are the passages of the other data-parallel ranks."""
    symmetric: Flag = False
    """Add the passage → query direction: the mean of the two."""
    query_query_negatives: Flag = False
    """Other queries are negatives of a query too; then all directions share one softmax."""
    passage_passage_negatives: Flag = False
    """Other queries' passages are negatives of a positive too; then all directions share one softmax."""
    false_negative_margin: Number | None = None
    """A negative scoring above positive + margin is masked; null: none is."""
    matryoshka_dims: list[Count] = []
    """Prefixes of the embedding that are trained beside all of it: the loss is the mean over these widths."""
    score_distillation_weight: NonNegative = 0.0
    """Weight of the KL divergence to the teacher scores in the data."""
    embedding_distillation_weight: NonNegative = 0.0
    """Weight of the cosine distance to the teacher embeddings in the data."""

    @field_validator("matryoshka_dims")
    @classmethod
    def _each_once(cls, dims: list[int]) -> list[int]:
        twice = [dim for number, dim in enumerate(dims) if dim in dims[:number]]
        if twice:
            raise ValueError(f"each width once; {twice[0]} stands there twice")
        return dims

    def widths(self, hidden_size: int) -> list[int]:
        """The widths that the loss is the mean over: the whole embedding's first, then ``matryoshka_dims``."""
        return [hidden_size, *(dim for dim in self.matryoshka_dims if dim != hidden_size)]


class DataSource(Section):
    """One source of training pairs."""

    path: str
    """JSONL, JSON or Parquet file, BEIR folder, or hf://org/name."""
    weight: Positive | None = None
    """Share of the batches drawn from it; null for every source: as many as it has rows."""
    query_prompt: str | None = None
    """null: data.query_prompt."""
    passage_prompt: str | None = None
    """null: data.passage_prompt."""

    def stated(self) -> set[str]:
        """The keys that were given a value here, and did not get it from elsewhere."""
        return {name for name in self.model_fields_set if getattr(self, name) is not None}


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | Mapping | DataSource) else value


class DataSection(Section):
    """What is read, and how texts become tokens."""

    train: list[DataSource] | None = None
    """Path, list of paths, or list of {path, weight, query_prompt, passage_prompt}."""
    query_prompt: str = "query: "
    """Put before every query exactly as written."""
    passage_prompt: str = "passage: "
    """Put before every passage exactly as written."""
    query_max_length: Count = 512
    """Tokens, BOS and EOS included."""
    passage_max_length: Count = 512
    """Tokens, BOS and EOS included."""
    negatives_per_query: CountOrZero = 4
    """Hard negatives used, if the data has them."""
    packing: Flag = True
    """Lay sequences end to end instead of padding them."""
    eval: list[str] | None = None
    """BEIR folder(s), evaluated every train.eval_interval."""

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
        """The training sources with their prompts filled in."""
        return [
            DataSource.model_construct(
                source.stated(),  # still
                path=source.path,
                weight=source.weight,
                query_prompt=self.query_prompt if source.query_prompt is None else source.query_prompt,
                passage_prompt=self.passage_prompt if source.passage_prompt is None else source.passage_prompt,
            )
            for source in self.train or []
        ]


class TrainSection(Section):
    """Batches, steps, where the run lives."""

    global_batch_size: Count = 128
    """Queries a step, over all ranks."""
    micro_batch_size: Count | None = None
    """Texts a micro-batch, packed or padded; set, it replaces micro_batch_tokens."""
    micro_batch_tokens: Count = 16384
    """Tokens a micro-batch."""
    train_iters: Count = 1000
    """Optimizer steps."""
    eval_interval: Count = 200
    """Steps between evaluations on data.eval."""
    save_interval: Count = 200
    """Steps between checkpoints; the last step is always saved."""
    log_interval: Count = 10
    """Steps between lines of metrics.jsonl."""
    save_dir: str | None = None
    """null: $SAVE_DIR, or runs/<recipe>."""
    seed: CountOrZero = 42
    """Of the data order."""
    timeout_minutes: Positive = 10.0
    """How long ranks wait for one that does not answer; then every rank ends, saying which and where it stood."""


class OptimizerSection(Section):
    """Adam with betas 0.9/0.999 and eps 1e-8, and the learning rate's course."""

    lr: Positive = 5e-6
    """The highest learning rate."""
    min_lr: NonNegative = 0.0
    """The learning rate at the end."""
    temperature_lr: Positive = 1e-2
    """The highest learning rate of a learned temperature's logarithm, on lr's course; it has no weight decay."""
    weight_decay: NonNegative = 0.01
    """Decoupled, as in AdamW."""
    clip_grad: NonNegative = 1.0
    """Largest gradient norm; 0: no clipping."""
    warmup_iters: CountOrZero | None = None
    """Steps of linear warm-up; null: 10 % of train_iters."""
    lr_decay_style: Literal["linear", "cosine"] = "linear"
    """After the warm-up."""
    distributed: Flag = True
    """Shard the optimizer state over the data-parallel ranks."""
    overlap_grad_reduce: Flag = True
    """Reduce gradients over the data-parallel ranks while backward goes on."""


class CheckpointSection(Section):
    """Where weights and state come from."""

    pretrained_checkpoint: str | None = None
    """Start from this Megatron checkpoint's weights."""
    load: str | None = None
    """Continue another run's checkpoint: weights, optimizer, data position."""
    resume: Flag = True
    """Continue from save_dir if it holds a checkpoint of the same model, data, loss, optimizer and seed; false: start
    afresh there, and move the run that it holds to save_dir/replaced-1."""
    allow_fallback: Flag = False
    """Where the checkpoint to continue from is damaged, say so and continue from the newest sound one before it."""


class LoggerSection(Section):
    """Beside metrics.jsonl, which is always written."""

    tensorboard: Flag = True
    """Write save_dir/tensorboard."""
    wandb_project: str | None = None
    """Weights & Biases project; null: none."""


class RecipeConfig(Section):
    """One training run. `train` takes it; `run_config.yaml` is its YAML form."""

    recipe: str = "custom"
    """The recipe function's name; names the run's folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there are at least as many GPUs as local processes, else cpu."""
    model: ModelSection = ModelSection()
    loss: LossSection = LossSection()
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    optimizer: OptimizerSection = OptimizerSection()
    checkpoint: CheckpointSection = CheckpointSection()
    logger: LoggerSection = LoggerSection()

    def resolved(self) -> RecipeConfig:
        """A copy in which every null that stands for a derived value holds that value."""
        cfg = self.model_copy(deep=True)
        model, train, optimizer = cfg.model, cfg.train, cfg.optimizer
        if model.tensor_model_parallel_size == 1:
            model.sequence_parallel = False
        elif model.sequence_parallel is None:
            model.sequence_parallel = True
        if train.save_dir is None:
            train.save_dir = os.environ.get("SAVE_DIR") or f"runs/{cfg.recipe}"
        train.save_dir = os.path.expanduser(train.save_dir)  # which no shell does behind "train.save_dir="
        if optimizer.warmup_iters is None:
            optimizer.warmup_iters = train.train_iters // 10
        return cfg

    def to_dict(self) -> dict[str, Any]:
        """Return plain values by section; ``run_config.config_from_dict`` is the inverse."""
        return self.model_dump(mode="json")


def keys(model: type[Section] = RecipeConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key with its pydantic field, in the order of the sections."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def explain_refusal(error: ValidationError, *, prefix: str = "", found: Any = None) -> str:
    """Describe a pydantic error about a recipe in one line; see :func:`explain_validation_error`."""
    known = [key for key, _ in keys()]
    return explain_validation_error(error, known, DataSource.model_fields, prefix=prefix, found=found)
