"""Pooling of token states into one vector per sequence, in fp32 or in the states' dtype where that is wider.

Every mode is a weighted sum over the real tokens of a sequence, so one formula serves padded rows, packed rows and
slices of either:

* ``avg``           1/n
* ``cls``           1 on the first real token (not column 0 under left padding)
* ``last``          1 on the last real token
* ``weighted_avg``  i / Σ i with i the 1-based position (Muennighoff 2022, SGPT)
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_embed.bridge.config import Pooling
from megatron_embed.bridge.sequences import TokenBatch, to_device


def pool(states: Tensor, batch: TokenBatch, mode: Pooling, columns: slice = slice(None)) -> Tensor:
    """Pool ``states [s, b, hidden]`` into ``[n, hidden]``, fp32 or wider.

    Args:
        columns: the part of the rows that ``states`` covers; the results of all parts add up to that of the whole.
    """
    wide = torch.promote_types(states.dtype, torch.float32)
    states = states.to(wide)
    weights_BS = pooling_weights(batch, mode).to(wide)
    if not batch.packed:
        return torch.einsum("bs,sbh->bh", weights_BS[:, columns], states)
    # [n, s] with each token's weight in its sequence's row: unlike index_add, a matrix product is deterministic
    tokens = weights_BS.shape[1] - batch.padding
    lengths = to_device(batch.lengths, states.device)
    owner = torch.repeat_interleave(torch.arange(len(batch.lengths), device=states.device), lengths, output_size=tokens)
    weights_NS = torch.zeros(len(batch.lengths), weights_BS.shape[1], dtype=wide, device=states.device)
    weights_NS[owner, torch.arange(tokens, device=states.device)] = weights_BS[0, :tokens]
    return weights_NS[:, columns] @ states.squeeze(1)


def pooling_weights(batch: TokenBatch, mode: Pooling) -> Tensor:
    """Return each token's share in its sequence's vector: ``[b, s]`` fp64, 0 on padding."""
    device = batch.input_ids.device
    lengths_n = to_device(batch.lengths, device)
    if batch.packed:
        lengths_BS = torch.repeat_interleave(lengths_n, lengths_n, output_size=batch.real_tokens)[None]
        lengths_BS = torch.nn.functional.pad(lengths_BS, (0, batch.padding), value=1)
    else:
        lengths_BS = lengths_n[:, None].expand_as(batch.input_ids)
    if mode == "avg":
        weights = 1.0 / lengths_BS.double()
    elif mode == "cls":
        weights = (batch.positions == 0).double()
    elif mode == "last":
        weights = (batch.positions == lengths_BS - 1).double()
    elif mode == "weighted_avg":
        weights = (batch.positions + 1).double() * 2 / (lengths_BS * (lengths_BS + 1)).double()
    else:
        raise AssertionError(f"unknown pooling {mode!r}")
    real = torch.ones_like(batch.input_ids, dtype=torch.bool) if batch.mask is None else batch.mask
    if batch.padding:
        real = real.clone()
        real[:, -batch.padding :] = False
    return weights * real
