"""EncoderConfig: the encoder's description, read from and written to Hugging Face configs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_embed.bridge.errors import UserError
from megatron_embed.bridge.families import BIDIRECTIONAL, BIDIRECTIONAL_POOLINGS, FAMILIES, VLMS, Family, accepted

Pooling = Literal["avg", "cls", "last", "weighted_avg"]
POOLINGS: tuple[str, ...] = get_args(Pooling)

#: HF text-config keys that are kept under their own names
_SAME_NAME = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "max_position_embeddings",
    "initializer_range",
    "rope_parameters",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """A bidirectional encoder. Sizes have transformers' names; nothing here depends on the parallel layout."""

    family: str = "ministral3"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int
    initializer_range: float = 0.02
    rope_parameters: Mapping[str, Any] = field(hash=False)
    pad_token_id: int | None = 11
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    tie_word_embeddings: bool = True
    #: dtype of the source's weights, as torch names it
    dtype: str = "bfloat16"
    pooling: Pooling = "avg"
    normalize: bool = True
    #: training divides scores by it; the exported config states it
    temperature: float | None = None

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise UserError(f"pooling: {self.pooling!r} is not one of {', '.join(POOLINGS)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads: {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )

    def replace(self, **changes: Any) -> EncoderConfig:
        """Return a copy with some fields changed."""
        return replace(self, **changes)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any] | Any, **overrides: Any) -> EncoderConfig:
        """Read a Hugging Face config.

        Args:
            config: a ``PretrainedConfig``, the contents of a ``config.json``, or the path of this file or its folder.
                Accepts text models of :data:`~megatron_embed.bridge.families.FAMILIES`, the VLM around one
                (``mistral3``), ready embedders, and AutoModel's own form of them (``ministral3_bidirec``,
                ``llama_bidirec``).
            overrides: fields to set, such as ``pooling``.

        Raises:
            UserError: another architecture, an unknown ``rope_type``, or a feature that the encoder does not compute.
        """
        where, raw = _as_mapping(config)
        family, text = _text_config(raw, where)
        _refuse_unsupported(family, text, where)
        hf = _stock_config(family, raw, text, where)
        values: dict[str, Any] = {name: getattr(hf, name) for name in _SAME_NAME}
        values["rope_parameters"] = dict(hf.rope_parameters)
        if isinstance(values["eos_token_id"], list):
            values["eos_token_id"] = values["eos_token_id"][0]
        values["tie_word_embeddings"] = hf.tie_word_embeddings
        values["family"] = family.name
        values["dtype"] = _dtype_name(raw.get("dtype") or raw.get("torch_dtype") or text.get("dtype") or "bfloat16")
        for name in ("pooling", "temperature", "normalize"):
            if raw.get(name) is not None:
                values[name] = raw[name]
        if raw["model_type"] in BIDIRECTIONAL and "pooling" in values and values.get("normalize", True):
            values["pooling"] = BIDIRECTIONAL_POOLINGS.get(values["pooling"], values["pooling"])
        return cls(**{**values, **overrides})

    def to_hf(self) -> Any:
        """Return the config of the stock Hugging Face model that computes the same: bidirectional, no head.

        Returns:
            A transformers config (such as ``Ministral3Config`` with ``is_causal=False``) that also states the pooling,
            the normalisation and, where known, the temperature.
        """
        extra: dict[str, Any] = {"is_causal": False, "pooling": self.pooling, "normalize": self.normalize}
        if self.temperature is not None:
            extra["temperature"] = self.temperature
        family = FAMILIES[self.family]
        hf = _config_class(family)(
            **{name: getattr(self, name) for name in _SAME_NAME if name != "rope_parameters"},
            rope_parameters=dict(self.rope_parameters),
            # The bare model has no head to tie; the key is explicit so that no reader's default decides.
            tie_word_embeddings=self.tie_word_embeddings,
            attention_dropout=0.0,
            use_cache=False,
            dtype=self.dtype,
            **extra,
        )
        hf.architectures = [family.model_class]
        return hf

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for YAML and JSON; :meth:`from_dict` is the inverse."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"rope_parameters": dict(self.rope_parameters)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EncoderConfig:
        """Build a config from the values that :meth:`to_dict` returns."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UserError(f"encoder config: unknown key {unknown[0]!r}; known keys: {', '.join(sorted(known))}")
        return cls(**values)


def stock_text_config(config: Mapping[str, Any] | Any) -> Any:
    """Return the language tower's config as its stock transformers class reads it.

    This does not check whether the encoder can compute what the config asks for.

    Args:
        config: as for :meth:`EncoderConfig.from_hf`.

    Raises:
        UserError: another architecture, or no valid config.
    """
    where, raw = _as_mapping(config)
    family, text = _text_config(raw, where)
    return _stock_config(family, raw, text, where)


def _stock_config(family: Family, raw: dict[str, Any], text: dict[str, Any], where: str) -> Any:
    hf = _hf_config(family, {k: v for k, v in text.items() if k not in ("model_type", "dtype")}, where)
    # transformers lets a top-level value (default: true for the VLM) override the text config's.
    default = raw["model_type"] in VLMS or hf.tie_word_embeddings
    hf.tie_word_embeddings = bool(raw.get("tie_word_embeddings", text.get("tie_word_embeddings", default)))
    return hf


def _config_class(family: Family) -> Any:
    import transformers

    return getattr(transformers, family.config_class)


def _hf_config(family: Family, values: dict[str, Any], where: str) -> Any:
    try:
        return _config_class(family)(**values)
    except Exception as error:  # transformers' validators raise a dozen kinds
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: not a valid {family.config_class} ({reason})") from None


def _as_mapping(config: Any) -> tuple[str, dict[str, Any]]:
    """Return the name of the config for messages, and its values."""
    if isinstance(config, str | Path):
        path = Path(config)
        path = path / "config.json" if path.is_dir() else path
        try:
            return str(path), json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; a Hugging Face model folder holds a config.json") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not valid JSON ({error})") from None
    if isinstance(config, Mapping):
        return "config", dict(config)
    return type(config).__name__, config.to_dict()


def _text_config(raw: dict[str, Any], where: str) -> tuple[Family, dict[str, Any]]:
    model_type = raw.get("model_type")
    text = raw.get("text_config") if model_type in VLMS else raw
    family = FAMILIES.get(str(text.get("model_type"))) if isinstance(text, Mapping) else None
    if text is raw:
        family = family or BIDIRECTIONAL.get(str(model_type))
    elif family is not VLMS[str(model_type)]:
        family = None
    if family is None or not isinstance(text, Mapping):
        found = model_type if text is raw or not isinstance(text, Mapping) else f"{model_type}/{text.get('model_type')}"
        raise UserError(f"{where}: model_type {found!r} is not supported; wanted {accepted()}")
    text = dict(text)
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(text.get(key), Mapping):  # exports carry this key for vLLM; it does not change the function
            text[key] = {name: value for name, value in text[key].items() if name != "apply_yarn_scaling"}
    return family, text


def _refuse_unsupported(family: Family, text: dict[str, Any], where: str) -> None:
    """Refuse by name each feature that would silently change the function."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    for key, value in family.fixed.items():
        for holder in (text, rope):
            if holder.get(key, value) != value:
                raise UserError(f"{where}: {key} is {holder[key]!r}; the encoder computes {value!r} only")
    for kind in text.get("layer_types") or ():
        if kind != "full_attention":
            raise UserError(f"{where}: layer_types has {kind!r}; the encoder computes 'full_attention' only")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    # dynamic and longrope change the frequencies with the length of the batch, so no fixed table can hold them
    if rope_type not in family.rope_types:
        raise UserError(f"{where}: rope_type {rope_type!r} is not supported; known: {', '.join(family.rope_types)}")


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
