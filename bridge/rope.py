"""Rotary frequencies and the Llama-4 query scale, both by position within a sequence.

transformers' own functions compute the inverse frequencies. They round YaRN's correction range (``truncate``), and a
port that does not round is off by a quarter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.families import FAMILIES


def inverse_frequencies(config: EncoderConfig) -> tuple[Tensor, float]:
    """Return ``[head_dim / 2]`` in fp32, and the factor on cosines and sines (1.0 for both families)."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope_type = config.rope_parameters.get("rope_type", "default")
    if rope_type == "default":
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0
    frequencies, factor = ROPE_INIT_FUNCTIONS[rope_type](config.to_hf(), device=torch.device("cpu"))
    return frequencies, float(factor)


def rope_tables(positions: Tensor, frequencies: Tensor, factor: float, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of ``positions [...]``: two ``[..., head_dim]``, fp32, then cast, as HF does."""
    angles = positions[..., None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def query_scale(positions: Tensor, config: EncoderConfig, *, dtype: torch.dtype) -> Tensor | None:
    """Return Llama-4's attention temperature ``1 + beta · log(1 + floor(position / original_max))``.

    It is shaped like ``positions`` and exactly 1 below ``original_max_position_embeddings``. Return None where the
    family or the config has no such scale.
    """
    beta = config.rope_parameters.get("llama_4_scaling_beta")
    if beta is None or not FAMILIES[config.family].query_scale:
        return None
    original = config.rope_parameters["original_max_position_embeddings"]
    return (1 + beta * torch.log(1 + torch.floor(positions / original))).to(dtype)
