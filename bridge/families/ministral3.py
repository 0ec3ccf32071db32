"""Ministral 3: the common form, Llama-4's query scale beyond the original positions, and a VLM around the model."""

from __future__ import annotations

import re

from megatron_embed.bridge.families.base import COMMON_FIXED, Family

MINISTRAL3 = Family(
    name="ministral3",
    title="Ministral 3",
    config_class="Ministral3Config",
    model_class="Ministral3Model",
    bidirectional_model_type="ministral3_bidirec",
    vlm_model_type="mistral3",
    fixed={**COMMON_FIXED, "sliding_window": None},
    query_scale=True,
    ignored=(
        (re.compile(r"(model\.)?vision_tower\..+"), "the vision tower takes no part in text embedding"),
        (re.compile(r"(model\.)?multi_modal_projector\..+"), "the projector takes no part in text embedding"),
    ),
)
