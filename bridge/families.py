"""What differs between the model families. Everything else in this package is common to them. Pure data.

Their decoder layers have the same form (grouped attention without biases, gated MLP, RMSNorm before each), so the
weight table and the layers are shared; a family is the names that transformers gives it and what its config may ask.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of stock Hugging Face models.

    Attributes:
        name: ``model_type`` of the stock config, and ``EncoderConfig.family``.
        title: what people call it.
        config_class, model_class: names in transformers; the model is the bare one, without a head.
        bidirectional_model_type: ``model_type`` of NeMo AutoModel's own form, from before the stock classes honoured
            ``is_causal: false``; its config also states ``pooling`` and ``temperature``.
        vlm_model_type: of the vision-language model that holds this one as its ``text_config``.
        rope_types: kinds of rotary frequencies that do not change with the length of the batch.
        fixed: config keys that change the function, with the only value that the encoder computes.
        query_scale: whether attention multiplies queries by the Llama-4 scale (where the config states its beta).
        ignored: tensors of this family alone that an embedder has no place for, by name and with the reason.
    """

    name: str
    title: str
    config_class: str
    model_class: str
    bidirectional_model_type: str
    vlm_model_type: str | None = None
    rope_types: tuple[str, ...] = ("default", "linear", "yarn", "llama3")
    fixed: Mapping[str, Any] = field(hash=False)
    query_scale: bool = False
    ignored: tuple[tuple[re.Pattern[str], str], ...] = ()


_COMMON_FIXED = {"hidden_act": "silu", "attention_dropout": 0.0, "partial_rotary_factor": 1.0}

MINISTRAL3 = Family(
    name="ministral3",
    title="Ministral 3",
    config_class="Ministral3Config",
    model_class="Ministral3Model",
    bidirectional_model_type="ministral3_bidirec",
    vlm_model_type="mistral3",
    fixed={**_COMMON_FIXED, "sliding_window": None},
    query_scale=True,
    ignored=(
        (re.compile(r"(model\.)?vision_tower\..+"), "the vision tower takes no part in text embedding"),
        (re.compile(r"(model\.)?multi_modal_projector\..+"), "the projector takes no part in text embedding"),
    ),
)

LLAMA = Family(
    name="llama",
    title="Llama",
    config_class="LlamaConfig",
    model_class="LlamaModel",
    bidirectional_model_type="llama_bidirec",
    # pretraining_tp > 1 sums partial products in another order; transformers no longer computes it either
    fixed={**_COMMON_FIXED, "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
)

FAMILIES: dict[str, Family] = {family.name: family for family in (MINISTRAL3, LLAMA)}

#: AutoModel's own form → family
BIDIRECTIONAL: dict[str, Family] = {family.bidirectional_model_type: family for family in FAMILIES.values()}

#: vision-language model → family of its text_config
VLMS: dict[str, Family] = {family.vlm_model_type: family for family in FAMILIES.values() if family.vlm_model_type}

#: Poolings of AutoModel's own form that ours call otherwise. Its ``weighted_avg`` is a plain sum, which points where
#: the mean does; its ``cls_last`` takes the first token.
BIDIRECTIONAL_POOLINGS: dict[str, str] = {"weighted_avg": "avg", "mean": "avg", "cls_last": "cls"}


def is_vlm(config: Mapping[str, Any]) -> bool:
    """Whether the contents of a ``config.json`` are those of a vision-language model."""
    return config.get("model_type") in VLMS


def accepted() -> str:
    """The model types that are accepted, for messages."""
    vlms = [f"{vlm!r} with a {family.name!r} text_config (the VLM)" for vlm, family in VLMS.items()]
    return ", ".join([*vlms, *map(repr, FAMILIES), *map(repr, BIDIRECTIONAL)])
