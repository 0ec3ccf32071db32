"""The arithmetic of a training step, for speeds and for the estimate of its time."""

from __future__ import annotations

from megatron_embed.bridge.config import EncoderConfig


def model_flops(config: EncoderConfig, *, tokens: int, squared_lengths: int) -> float:
    """Return the floating-point operations of a training step: forward + backward = 3 × forward, no recomputation.

    A token costs 2 for each weight of the linear layers. In each layer a sequence costs
    ``4 · length² · heads · head_dim`` for the scores and the weighted sum of bidirectional attention (Narayanan et al.
    2021, without a causal half).
    """
    heads = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    linear = config.hidden_size * (2 * heads + 2 * kv + 3 * config.intermediate_size)
    forward = config.num_hidden_layers * (2 * linear * tokens + 4 * heads * squared_lengths)
    return 3.0 * forward
