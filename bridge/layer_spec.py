"""Choice of a model's layers, made once: Transformer Engine's, megatron-core's own on CUDA, or those for a CPU.

This is the only file that knows of Transformer Engine.
"""

from __future__ import annotations

import copy
import functools
import logging
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from megatron_embed.bridge import te_import
from megatron_embed.bridge.attention import CoreAttention, SequenceInfo
from megatron_embed.bridge.cpu import host
from megatron_embed.bridge.cpu.layers import cpu_layers
from megatron_embed.bridge.layers import LayerKind, Layers, SwiGLU, cuda_layers
from megatron_embed.bridge.mapping import LOCAL_ALIASES

_logger = logging.getLogger(__name__)


def transformer_engine_is_usable() -> bool:
    """Return whether layers use Transformer Engine: this process computes on CUDA, and its import succeeds.

    On CUDA the log says once which layers were chosen, and why.

    Raises:
        UserError: an unsupported version is installed.
    """
    if host.cuda_is_hidden():
        return False
    problem = te_import.problem()
    _log_choice(problem)
    return problem is None


@functools.cache  # once per process; every pipeline stage chooses
def _log_choice(problem: str | None) -> None:
    if problem is None:
        _logger.info("layers: Transformer Engine's")
    else:
        level = logging.INFO if problem == te_import.NOT_INSTALLED else logging.WARNING
        _logger.log(level, "layers: megatron-core's own; Transformer Engine is not used, because %s", problem)


def choose_layers(kind: LayerKind | None = None) -> Layers:
    """Return the classes of a model's layers; no code asks for the device after this.

    Args:
        kind: None means ``transformer_engine`` where it can run, else ``cuda``, or ``cpu`` in a process without CUDA.
    """
    if kind is None:
        kind = "transformer_engine" if transformer_engine_is_usable() else local_layers()
    return {"transformer_engine": _transformer_engine_layers, "cuda": cuda_layers, "cpu": cpu_layers}[kind]()


def local_layers() -> LayerKind:
    """Return the kind of layers that this process uses without Transformer Engine."""
    return "cpu" if host.cuda_is_hidden() else "cuda"


def block_spec(num_layers: int, layers: Layers, *, qk_norm: bool = False) -> TransformerBlockSubmodules:
    """Return the spec of a stage's transformer block.

    Args:
        num_layers: layers on this stage.
        layers: from :func:`choose_layers`.
        qk_norm: whether each head of queries and keys passes a norm before rope.
    """
    norms: dict[str, Any] = {}
    if not layers.norm_in_column:
        # Checkpoints use Transformer Engine's names, in which the norm belongs to the linear layer behind it.
        aliases = {local.removesuffix("weight"): te.removesuffix("weight") for local, te in LOCAL_ALIASES.items()}
        norms = {
            "input_layernorm": layers.norm,
            "pre_mlp_layernorm": layers.norm,
            "sharded_state_dict_keys_map": aliases,
        }
    attention = SelfAttentionSubmodules(
        linear_qkv=layers.column,
        core_attention=layers.attention,
        linear_proj=layers.row,
        q_layernorm=layers.norm if qk_norm else None,
        k_layernorm=layers.norm if qk_norm else None,
    )
    mlp = MLPSubmodules(linear_fc1=layers.column, activation_func=layers.activation, linear_fc2=layers.row)
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=SelfAttention, params={"attn_mask_type": AttnMaskType.padding}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            mlp=ModuleSpec(module=MLP, submodules=mlp),
            mlp_bda=get_bias_dropout_add,
            **norms,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=layers.norm)


def _transformer_engine_layers() -> Layers:
    from megatron.core.extensions import transformer_engine as te

    return Layers(
        kind="transformer_engine",
        column=te.TELayerNormColumnParallelLinear,
        row=te.TERowParallelLinear,
        attention=TransformerEngineAttention,
        activation=SwiGLU,
        norm=te.TENorm,
        norm_in_column=True,
    )


class TransformerEngineAttention(CoreAttention):
    """Transformer Engine's attention."""

    def __init__(self, config: TransformerConfig, layer_number: int, *args: Any, **kwargs: Any):
        super().__init__(config, layer_number, *args, **kwargs)
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        # CoreAttention gathers keys and values: a bidirectional model does not need Transformer Engine's zigzag.
        # A rank's queries are then fewer than its keys, which Transformer Engine calls cross-attention: for "self" it
        # takes the lengths and masks of the queries for those of the keys.
        self.fewer_queries = config.context_parallel_size > 1
        if self.fewer_queries:
            kwargs["attention_type"] = "cross"
            config = copy.copy(config)
            config.context_parallel_size = 1
        self.attention = TEDotProductAttention(config, layer_number, *args, **kwargs)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, info: SequenceInfo) -> Tensor:
        """See :meth:`CoreAttention.attend`."""
        if info.runs is None:
            if info.key_mask is None or info.query_mask is None:  # there is no padding
                return self.attention(query, key, value, None, attn_mask_type=AttnMaskType.no_mask)
            # Transformer Engine's masks are True where a token is left out.
            mask = (~info.query_mask, ~info.key_mask) if self.fewer_queries else ~info.key_mask
            kind = AttnMaskType.padding
            return self.attention(query, key, value, mask, attn_mask_type=kind)
        query, key, value = (x.squeeze(1) for x in (query, key, value))
        output = self.attention(
            query, key, value, None, attn_mask_type=AttnMaskType.padding, packed_seq_params=info.thd
        )
        return output.reshape(output.shape[0], 1, -1)
