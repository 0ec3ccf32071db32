"""The model, and the mapping between its weights and Hugging Face's. This package knows nothing of training.

The ``…Bidirectional…`` classes import transformers and register themselves with ``AutoConfig`` and ``AutoModel`` on
first access.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from megatron_embed.bridge import te_import
from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.errors import UserError

te_import.guard()  # before any module of this package imports megatron-core

if TYPE_CHECKING:
    from megatron_embed.bridge.hf_bidirectional import (
        LlamaBidirectionalConfig,
        LlamaBidirectionalModel,
        Ministral3BidirectionalConfig,
        Ministral3BidirectionalModel,
    )

__all__ = [
    "EncoderConfig",
    "LlamaBidirectionalConfig",
    "LlamaBidirectionalModel",
    "Ministral3BidirectionalConfig",
    "Ministral3BidirectionalModel",
    "UserError",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("megatron_embed.bridge.hf_bidirectional"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
