"""AutoModel's own form of the embedders: configs ``ministral3_bidirec`` and ``llama_bidirec``, and their models.

NeMo AutoModel wrote these before the stock classes honoured ``is_causal: false``. The classes here are thin ones over
the stock classes, so that such a folder loads with ``AutoModel`` and no remote code. Importing this module registers
them. New exports are stock models and do not need this module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, AutoModel, LlamaConfig, LlamaModel, Ministral3Config, Ministral3Model

from megatron_embed.bridge.families import LLAMA, MINISTRAL3


@dataclass(kw_only=True)
class _Bidirectional:
    """``pooling`` and ``temperature`` beside a stock config's keys; bidirectional whatever the file says."""

    pooling: str = "avg"
    temperature: float = 1.0
    is_causal: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]  # the stock config's
        self.is_causal = False


class Ministral3BidirectionalConfig(_Bidirectional, Ministral3Config):
    """A stock ``Ministral3Config`` and AutoModel's own keys."""

    model_type = MINISTRAL3.bidirectional_model_type


class LlamaBidirectionalConfig(_Bidirectional, LlamaConfig):
    """A stock ``LlamaConfig`` and AutoModel's own keys."""

    model_type = LLAMA.bidirectional_model_type


class Ministral3BidirectionalModel(Ministral3Model):
    """A stock ``Ministral3Model``; its config makes it bidirectional."""

    config_class = Ministral3BidirectionalConfig


class LlamaBidirectionalModel(LlamaModel):
    """A stock ``LlamaModel``; its config makes it bidirectional."""

    config_class = LlamaBidirectionalConfig


for _config, _model in (
    (Ministral3BidirectionalConfig, Ministral3BidirectionalModel),
    (LlamaBidirectionalConfig, LlamaBidirectionalModel),
):
    # exist_ok: AutoModel registers its own classes under these names where both packages are imported
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
