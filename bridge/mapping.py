"""THE table: the names of each weight on both sides, its packing, and the dimension that TP splits.

One row serves import, export, direct loading, verification and the tests. The ``megatron`` column holds the names of
the checkpoint, which are Transformer Engine's (its linear layers hold the norm in front of them). The local layer spec
has its own names for the two norms; ``LOCAL_ALIASES`` maps them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_embed.bridge.errors import UserError
from megatron_embed.bridge.families import FAMILIES, MINISTRAL3, Dim, Family, Kind, Row

if TYPE_CHECKING:
    import torch

    from megatron_embed.bridge.config import EncoderConfig

_ATTENTION, _MLP = "decoder.layers.{layer}.self_attention", "decoder.layers.{layer}.mlp"
_HF_ATTENTION, _HF_MLP = "layers.{layer}.self_attn", "layers.{layer}.mlp"

#: The weights of all families, whose decoder layers have the same names. A family adds its ``layer_rows``.
TABLE: tuple[Row, ...] = (
    Row("embedding.word_embeddings.weight", ("embed_tokens.weight",), "vocab", 0, (("vocab", "hidden"),)),
    Row(
        f"{_ATTENTION}.linear_qkv.layer_norm_weight",
        ("layers.{layer}.input_layernorm.weight",),
        "copy",
        None,
        (("hidden",),),
    ),
    Row(
        f"{_ATTENTION}.linear_qkv.weight",
        (f"{_HF_ATTENTION}.q_proj.weight", f"{_HF_ATTENTION}.k_proj.weight", f"{_HF_ATTENTION}.v_proj.weight"),
        "qkv",
        0,
        (("q", "hidden"), ("kv", "hidden"), ("kv", "hidden")),
    ),
    Row(f"{_ATTENTION}.linear_proj.weight", (f"{_HF_ATTENTION}.o_proj.weight",), "copy", 1, (("hidden", "q"),)),
    Row(
        f"{_MLP}.linear_fc1.layer_norm_weight",
        ("layers.{layer}.post_attention_layernorm.weight",),
        "copy",
        None,
        (("hidden",),),
    ),
    Row(
        f"{_MLP}.linear_fc1.weight",
        (f"{_HF_MLP}.gate_proj.weight", f"{_HF_MLP}.up_proj.weight"),
        "gate_up",
        0,
        (("ffn", "hidden"), ("ffn", "hidden")),
    ),
    Row(f"{_MLP}.linear_fc2.weight", (f"{_HF_MLP}.down_proj.weight",), "copy", 1, (("hidden", "ffn"),)),
    Row("decoder.final_layernorm.weight", ("norm.weight",), "copy", None, (("hidden",),)),
)

#: local layer spec → checkpoint name
LOCAL_ALIASES: dict[str, str] = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}

#: parameters of training for which no HF model has a tensor
OWN_PARAMETERS: tuple[str, ...] = ("log_temperature",)

#: HF tensors that no encoder has a place for, by name and with the reason; a family may name more. Any other unknown
#: tensor is an error.
IGNORED_HF: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(language_model\.)?lm_head\.weight"), "an embedder has no language-model head"),
    (re.compile(r"(.+\.)?rotary_emb\.inv_freq"), "rope frequencies are computed from the config"),
)

#: Beginnings of the language tower's names: the VLM on disk, the VLM in memory, a causal LM, a bare model.
HF_PREFIXES: tuple[str, ...] = ("language_model.model.", "model.language_model.", "model.", "")


@dataclass(frozen=True)
class Weight:
    """A row of the table at one layer of one model, with concrete names and shapes. ``hf`` names have no prefix."""

    row: Row
    layer: int | None
    megatron: str
    hf: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]

    @property
    def kind(self) -> Kind:
        return self.row.kind

    @property
    def tp_dim(self) -> int | None:
        return self.row.tp_dim

    @property
    def packs_rows(self) -> bool:
        """Return whether packing moves whole rows, so that it can act on their addresses; a fused bias has no rows."""
        return self.kind == "copy" or len(self.hf_shapes[0]) > 1

    @property
    def megatron_shape(self) -> tuple[int, ...]:
        """Return the shape of the whole packed weight, with the vocabulary unpadded."""
        return (sum(shape[0] for shape in self.hf_shapes), *self.hf_shapes[0][1:])


def weights(config: EncoderConfig) -> Iterator[Weight]:
    """Yield every weight of a model: the embedding, the layers in order, the final norm."""
    sizes: dict[Dim, int] = {
        "vocab": config.vocab_size,
        "hidden": config.hidden_size,
        "q": config.num_attention_heads * config.head_dim,
        "kv": config.num_key_value_heads * config.head_dim,
        "ffn": config.intermediate_size,
        "head": config.head_dim,
    }

    def at(row: Row, layer: int | None) -> Weight:
        return Weight(
            row=row,
            layer=layer,
            megatron=row.megatron.format(layer=layer),
            hf=tuple(name.format(layer=layer) for name in row.hf),
            hf_shapes=tuple(tuple(sizes[dim] for dim in dims) for dims in row.hf_dims),
        )

    per_layer = [row for row in TABLE if "{layer}" in row.megatron] + list(FAMILIES[config.family].layer_rows)
    first, last = (row for row in TABLE if "{layer}" not in row.megatron)
    yield at(first, None)
    for layer in range(config.num_hidden_layers):
        for row in per_layer:
            yield at(row, layer)
    yield at(last, None)


def checkpoint_name(parameter: str, *, layer_offset: int = 0) -> str:
    """Return the checkpoint's name of a module's parameter.

    Args:
        parameter: as in ``encoder.named_parameters()`` of either layer spec, with the stage's own layer numbers.
        layer_offset: global index of the stage's first layer.
    """
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", parameter)
    if match is None:
        return parameter
    layer, rest = int(match[1]) + layer_offset, match[2]
    return f"decoder.layers.{layer}.{LOCAL_ALIASES.get(rest, rest)}"


def parameters_with_weights(
    module: torch.nn.Module, config: EncoderConfig, *, layer_offset: int
) -> Iterator[tuple[str, torch.nn.Parameter, Weight]]:
    """Yield each parameter of a stage with its name and its row of the table, except those that the recipe sets.

    Raises:
        UserError: a parameter has no row.
    """
    table = {weight.megatron: weight for weight in weights(config)}
    for name, parameter in module.named_parameters():
        if name in OWN_PARAMETERS:
            continue
        weight = table.get(checkpoint_name(name, layer_offset=layer_offset))
        if weight is None:
            raise UserError(
                f"parameter {name}: the table of weights has no row for it; wanted one in the model's family"
            )
        yield name, parameter, weight


def hf_prefix(names: Iterable[str]) -> str | None:
    """Return the prefix of ``embed_tokens.weight`` in a folder's tensor names, or None if there is no such tensor."""
    present = set(names)
    return next((prefix for prefix in HF_PREFIXES if f"{prefix}embed_tokens.weight" in present), None)


def ignored_reason(hf_name: str, family: Family = MINISTRAL3) -> str | None:
    """Return why an encoder may leave out a tensor of the HF folder, or None if no rule allows it."""
    patterns = (*IGNORED_HF, *family.ignored)
    return next((reason for pattern, reason in patterns if pattern.fullmatch(hf_name)), None)
