"""Description of a model family: its names, the config values it accepts, and its additions to the common layer form.

The common form of a decoder layer is grouped attention without biases and a gated MLP, each behind an RMSNorm. This
module holds only data.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["copy", "vocab", "qkv", "gate_up"]
Dim = Literal["vocab", "hidden", "q", "kv", "ffn", "head"]

#: bytes per value
FP32 = 4


@dataclass(frozen=True)
class Row:
    """One weight in the table. ``{layer}`` in a name stands for the global layer index, counted from 0."""

    megatron: str
    hf: tuple[str, ...]
    kind: Kind
    #: the dimension that tensor parallelism splits, the same for the HF parts and the packed weight; None if replicated
    tp_dim: int | None
    #: shape of each HF part, in dimension names
    hf_dims: tuple[tuple[Dim, ...], ...]


@dataclass(frozen=True, kw_only=True)
class LayerSize:
    """Size of one layer's work on a micro-batch on one rank, for a family's planner terms.

    Attributes:
        tokens: tokens of a context-parallel slice, padding included.
        queries, keys: their widths on a tensor-parallel rank; values are as wide as keys.
        head_dim: width of a head.
        width: bytes per activation.
        projected: bytes of the queries and keys that the projection returns, as far as nothing else keeps them.
        keeps_attention_input: whether the input of core attention is kept (selective recomputation).
    """

    tokens: int
    queries: int
    keys: int
    head_dim: int
    width: int
    projected: int
    keeps_attention_input: bool


def _nothing(_: LayerSize) -> int:
    return 0


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of stock Hugging Face models.

    Attributes:
        name: ``model_type`` of the stock config, and ``EncoderConfig.family``.
        title: name for people.
        config_class, model_class: names in transformers; the model is the bare one, without a head.
        bidirectional_model_type: ``model_type`` of NeMo AutoModel's own form, which dates from before the stock classes
            honoured ``is_causal: false``; its config also states ``pooling`` and ``temperature``. None: AutoModel has
            no such form.
        vlm_model_type: ``model_type`` of the vision-language model that holds this one as its ``text_config``.
        rope_types: kinds of rotary frequencies that do not change with the length of the batch.
        fixed: config keys that change the function, with the only value that the encoder computes.
        not_compared: config keys that change nothing where ``fixed`` holds, each with the reason.
        query_scale: whether attention multiplies queries by the Llama-4 scale (where the config states its beta).
        layer_options: additions to the common layer form, as settings of megatron-core's ``TransformerConfig``
            (``qk_layernorm``, ``add_qkv_bias``).
        layer_rows: the weights that these options add to a layer, behind the fused QKV weight and in the order in
            which the modules register them.
        layer_activations: bytes that autograd keeps for these additions between a layer's forward and its backward.
        ignored: tensors of this family alone that an embedder has no place for, by name and with the reason.
    """

    name: str
    title: str
    config_class: str
    model_class: str
    bidirectional_model_type: str | None = None
    vlm_model_type: str | None = None
    rope_types: tuple[str, ...] = ("default", "linear", "yarn", "llama3")
    fixed: Mapping[str, Any] = field(hash=False)
    not_compared: Mapping[str, str] = field(default_factory=dict, hash=False)
    query_scale: bool = False
    layer_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    layer_rows: tuple[Row, ...] = ()
    layer_activations: Callable[[LayerSize], int] = _nothing
    ignored: tuple[tuple[re.Pattern[str], str], ...] = ()


#: values that every family's config must have, where it has the key
COMMON_FIXED: Mapping[str, Any] = {"hidden_act": "silu", "attention_dropout": 0.0, "partial_rotary_factor": 1.0}
