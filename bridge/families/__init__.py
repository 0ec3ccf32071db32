"""The model families, one file each. All other code of this package is common to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_embed.bridge.families.base import Dim, Family, Kind, LayerSize, Row
from megatron_embed.bridge.families.llama import LLAMA
from megatron_embed.bridge.families.ministral3 import MINISTRAL3
from megatron_embed.bridge.families.qwen3 import QWEN3

__all__ = [
    "BIDIRECTIONAL",
    "BIDIRECTIONAL_POOLINGS",
    "FAMILIES",
    "LLAMA",
    "MINISTRAL3",
    "QWEN3",
    "VLMS",
    "Dim",
    "Family",
    "Kind",
    "LayerSize",
    "Row",
    "accepted",
    "is_vlm",
]

FAMILIES: dict[str, Family] = {family.name: family for family in (MINISTRAL3, LLAMA, QWEN3)}

#: AutoModel's own form → family
BIDIRECTIONAL: dict[str, Family] = {
    family.bidirectional_model_type: family for family in FAMILIES.values() if family.bidirectional_model_type
}

#: vision-language model → family of its text_config
VLMS: dict[str, Family] = {family.vlm_model_type: family for family in FAMILIES.values() if family.vlm_model_type}

#: AutoModel's names of poolings → ours, where they differ. AutoModel's ``weighted_avg`` is a plain sum, which has the
#: direction of the mean; its ``cls_last`` takes the first token.
BIDIRECTIONAL_POOLINGS: dict[str, str] = {"weighted_avg": "avg", "mean": "avg", "cls_last": "cls"}


def is_vlm(config: Mapping[str, Any]) -> bool:
    """Return whether ``config`` (the contents of a ``config.json``) describes a vision-language model."""
    return config.get("model_type") in VLMS


def accepted() -> str:
    """Return the accepted model types, for messages."""
    vlms = [f"{vlm!r} with a {family.name!r} text_config (the VLM)" for vlm, family in VLMS.items()]
    return ", ".join([*vlms, *map(repr, FAMILIES), *map(repr, BIDIRECTIONAL)])
