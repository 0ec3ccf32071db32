"""Packed rows on CUDA without Transformer Engine: one call of torch's kernel for ragged sequences.

The kernel itself wants a GPU; here its documented meaning stands in for it (torch.nn.attention.varlen).
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from support import oracle
from support.megatron import filled_stages
from support.tiny_models import tiny_config
from torch import Tensor

from megatron_embed.bridge import EncoderConfig, attention
from megatron_embed.bridge.cpu import host
from megatron_embed.bridge.encoder import transformer_config
from megatron_embed.bridge.layout import Layout
from megatron_embed.bridge.parallel import parallel_world
from megatron_embed.bridge.sequences import TokenBatch


def by_definition(
    query: Tensor, key: Tensor, value: Tensor, ends_q: Tensor, ends_k: Tensor, longest_q: int, longest_k: int, **kw: Any
) -> Tensor:
    assert ends_q.dtype == ends_k.dtype == torch.int32
    assert longest_q == int(ends_q.diff().max())
    assert longest_k == int(ends_k.diff().max())
    assert kw["enable_gqa"]
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    rows = []
    for i in range(len(ends_q) - 1):
        q, k = query[ends_q[i] : ends_q[i + 1]], key[ends_k[i] : ends_k[i + 1]]
        scores = torch.einsum("qhd,khd->hqk", q, k) * (kw["scale"] or 1 / math.sqrt(q.shape[-1]))
        rows.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[ends_k[i] : ends_k[i + 1]]))
    return torch.cat(rows)


def test_a_packed_row_goes_through_one_call_and_equals_hf(monkeypatch: pytest.MonkeyPatch) -> None:
    host.run_on_cpu()
    calls = []

    def kernel(*args: Any, **kw: Any) -> Tensor:
        calls.append(len(args[3]) - 1)
        return by_definition(*args, **kw)

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    model = oracle.hf_model(tiny_config(), dtype=torch.float32)
    texts = [list(range(12, 12 + n)) for n in (5, 9, 9, 31)]
    config = EncoderConfig.from_hf(tiny_config())
    with parallel_world(Layout()):
        (encoder,) = filled_stages(config, Layout(), model.state_dict(), layers="cuda")
        for layer in encoder.decoder.layers:
            layer.self_attention.core_attention.ragged = True  # the stand-in takes fp32, too
        found = encoder(TokenBatch.pack(texts, pad_id=11))
        gradient = torch.autograd.grad(found[:, 0].sum(), encoder.embedding.word_embeddings.weight)[0]
    wanted = oracle.embed(model, texts)
    theirs = torch.autograd.grad(wanted[:, 0].sum(), model.embed_tokens.weight)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert oracle.relative_error(gradient[: len(theirs)], theirs) < 1e-5
    assert calls == [len(texts)] * config.num_hidden_layers


@pytest.mark.parametrize(
    ("dtype", "takes"), [(torch.bfloat16, True), (torch.float16, True), (torch.float32, False)], ids=str
)
def test_only_16_bits_go_there(dtype: torch.dtype, takes: bool) -> None:
    host.run_on_cpu()
    config = EncoderConfig.from_hf(tiny_config())
    with parallel_world(Layout()):
        transformer = transformer_config(config, Layout(), dtype=dtype)
        layer = attention.CudaAttention(transformer, 1, AttnMaskType.padding, "self")
    assert layer.ragged is takes
