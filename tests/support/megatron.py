"""Megatron encoders filled from a Hugging Face model in memory, and their gradients back under HF names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_embed.bridge import EncoderConfig
from megatron_embed.bridge.cpu import host
from megatron_embed.bridge.encoder import EncoderStage, build_stages, transformer_config
from megatron_embed.bridge.layers import LayerKind
from megatron_embed.bridge.layout import Layout
from megatron_embed.bridge.mapping import Weight, parameters_with_weights, weights
from megatron_embed.bridge.transforms import (
    pack_gate_up,
    pack_qkv,
    pad_vocab,
    padded_vocab_size,
    unpack_gate_up,
    unpack_qkv,
)

State = dict[str, Tensor]


def split_tp(full: Tensor, *, dim: int | None, world: int) -> list[Tensor]:
    """The slices of all tensor-parallel ranks; ``dim=None`` means replicated."""
    return [full] * world if dim is None else list(full.chunk(world, dim=dim))


def merge_tp(slices: Sequence[Tensor], *, dim: int | None) -> Tensor:
    """Inverse of :func:`split_tp`."""
    return slices[0] if dim is None else torch.cat(list(slices), dim=dim)


def unpad_vocab(embedding: Tensor, *, vocab_size: int) -> Tensor:
    """Inverse of :func:`megatron_embed.bridge.transforms.pad_vocab`."""
    return embedding[:vocab_size]


def forbid_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on to ask which device there is fails the test."""

    def asked(*_: Any) -> Any:
        raise AssertionError("a layer asked for the device while it computed")

    for place, name in (
        *((host, name) for name in ("cuda_is_hidden", "device")),
        *((torch.cuda, name) for name in ("current_device", "is_available", "device_count")),
    ):
        monkeypatch.setattr(place, name, asked)


def filled_stages(
    config: EncoderConfig,
    layout: Layout,
    state: State,
    dtype: torch.dtype = torch.float32,
    *,
    learn_temperature: bool = False,
    layers: LayerKind | None = None,
    **options: Any,
) -> list[EncoderStage]:
    """This rank's stages with the weights of an HF ``Ministral3Model``'s state dict."""
    transformer = transformer_config(config, layout, dtype=dtype, **options)
    encoders = build_stages(config, transformer, layers=layers, learn_temperature=learn_temperature)
    rank, world = parallel_state.get_tensor_model_parallel_rank(), layout.tp
    with torch.no_grad():
        for encoder in encoders:
            for _, parameter, weight in parameters_with_weights(encoder, config, layer_offset=encoder.layer_offset):
                parameter.copy_(_slice(weight, config, state, rank, world))
    return encoders


def _slice(weight: Weight, config: EncoderConfig, state: State, rank: int, world: int) -> Tensor:
    parts = [state[name] for name in weight.hf]
    if weight.kind == "vocab":
        parts = [pad_vocab(parts[0], rows=padded_vocab_size(config.vocab_size, world=world))]
    parts = [split_tp(part, dim=weight.tp_dim, world=world)[rank] for part in parts]
    if weight.kind == "qkv":
        return pack_qkv(*parts, groups=config.num_key_value_heads // world, head_dim=config.head_dim)
    return pack_gate_up(*parts) if weight.kind == "gate_up" else parts[0]


def merge_ranks(config: EncoderConfig, by_tp_rank: list[State]) -> State:
    """Whole tensors under HF names from the Megatron tensors of every tensor-parallel rank (all stages merged)."""
    merged: State = {}
    world = len(by_tp_rank)
    for weight in weights(config):
        slices = [tensors[weight.megatron] for tensors in by_tp_rank]
        if weight.kind == "qkv":
            groups = config.num_key_value_heads // world
            parts = [unpack_qkv(x, groups=groups, head_dim=config.head_dim) for x in slices]
        elif weight.kind == "gate_up":
            parts = [unpack_gate_up(x) for x in slices]
        else:
            parts = [(x,) for x in slices]
        for name, of_ranks in zip(weight.hf, zip(*parts, strict=True), strict=True):
            whole = merge_tp(of_ranks, dim=weight.tp_dim)
            merged[name] = unpad_vocab(whole, vocab_size=config.vocab_size) if weight.kind == "vocab" else whole
    return merged


def collect(tensors: State) -> tuple[int, int, State]:
    """(data-parallel rank, tensor-parallel rank, copies): what a rank sends home for :func:`merge_world`."""
    copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    return parallel_state.get_data_parallel_rank(), parallel_state.get_tensor_model_parallel_rank(), copies


def merge_world(config: EncoderConfig, collected: list[tuple[int, int, State]]) -> State:
    """Whole HF tensors from what all ranks of a world sent home; data-parallel copies must agree bit by bit."""
    by_tp: dict[int, State] = {}
    for _, tp_rank, tensors in sorted(collected, key=lambda item: item[0]):
        known = by_tp.setdefault(tp_rank, {})
        for name, tensor in tensors.items():
            assert name not in known or torch.equal(known[name], tensor), f"{name} differs between replicas"
            known[name] = tensor
    return merge_ranks(config, [by_tp[rank] for rank in sorted(by_tp)])
