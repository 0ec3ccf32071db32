"""The model, and how its weights correspond to Hugging Face's. Knows nothing of training.

The ``…Bidirectional…`` classes import transformers, and register themselves with ``AutoConfig`` and ``AutoModel``, when
they are first asked for.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# torch's own switch for large pages, read at its first allocation. On a CPU every big tensor is fresh memory, and
# faulting it in by pages of 4 KiB takes longer than computing it (an fp32 SwiGLU of 8192 tokens: 33 ms against 5).
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# How many kernels oneDNN keeps. Each new shape takes one (0.3 ms to make), each length of text several; with its own
# default of 1024 a second pass over a corpus finds hardly one of them again.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")

from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.errors import UserError
from megatron_embed.bridge.quiet import ignore_expected_warnings

if TYPE_CHECKING:
    from megatron_embed.bridge.bidirectional import (
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

ignore_expected_warnings()  # before megatron-core is imported: it warns while it is


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("megatron_embed.bridge.bidirectional"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
