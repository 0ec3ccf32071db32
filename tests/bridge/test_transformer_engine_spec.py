"""The Transformer Engine spec, built of stand-ins that record what they are given and compute in plain torch.

It shows the wiring (names, shapes, masks, packed lengths), not Transformer Engine itself.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from support import oracle
from support.megatron import forbid_questions
from support.tiny_families import tiny_qwen3_config
from support.tiny_models import tiny_config
from torch import Tensor

from megatron_embed.bridge import EncoderConfig
from megatron_embed.bridge.cpu import host
from megatron_embed.bridge.encoder import EncoderStage, transformer_config
from megatron_embed.bridge.layout import Layout
from megatron_embed.bridge.mapping import checkpoint_name, weights
from megatron_embed.bridge.parallel import parallel_world
from megatron_embed.bridge.sequences import TokenBatch
from megatron_embed.bridge.transforms import pack_gate_up, pack_qkv


class StandInNorm(torch.nn.Module):
    def __init__(self, config: Any, hidden_size: int, eps: float):
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.empty(hidden_size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class StandInLinear(torch.nn.Module):
    def __init__(self, inputs: int, outputs: int, *, config: Any, **given: Any):
        super().__init__()
        assert not given["bias"]
        self.weight = torch.nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.linear(x, self.weight), None


class StandInNormLinear(StandInLinear):
    def __init__(self, inputs: int, outputs: int, *, config: Any, **given: Any):
        super().__init__(inputs, outputs, config=config, **given)
        self.layer_norm_weight, self.eps = torch.nn.Parameter(torch.empty(inputs)), config.layernorm_epsilon

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps))


class StandInAttention(torch.nn.Module):
    """Speaks Transformer Engine's terms: a mask is True on what is left out; thd comes with cu_seqlens."""

    seen: ClassVar[list[tuple[AttnMaskType, str]]] = []

    def __init__(self, config: Any, layer_number: int, attn_mask_type: AttnMaskType, **_given: Any):
        super().__init__()
        assert attn_mask_type == AttnMaskType.padding

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, attn_mask_type: Any, packed_seq_params: Any = None
    ) -> Tensor:
        StandInAttention.seen.append((attn_mask_type, packed_seq_params.qkv_format if packed_seq_params else "sbhd"))
        if packed_seq_params is None:
            assert (mask is not None) == (attn_mask_type == AttnMaskType.padding)
            return self._attend(q, k, v, None if mask is None else ~mask)
        assert packed_seq_params.cu_seqlens_q.dtype == torch.int32
        ends = packed_seq_params.cu_seqlens_q.tolist()
        assert packed_seq_params.max_seqlen_q == max(b - a for a, b in pairwise(ends))
        parts = [self._attend(*(x[a:b, None] for x in (q, k, v)), None) for a, b in pairwise(ends)]
        return torch.cat(parts).squeeze(1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
        repeats = q.shape[2] // k.shape[2]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, *(x.repeat_interleave(repeats, 2) for x in (k, v))))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep).permute(2, 0, 1, 3).flatten(2)


CONFIGS = {"ministral3": tiny_config, "qwen3": tiny_qwen3_config}


@pytest.fixture(params=CONFIGS)
def encoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    host.run_on_cpu()
    import megatron.core.extensions.transformer_engine as te

    stand_ins = {
        "TELayerNormColumnParallelLinear": StandInNormLinear,
        "TERowParallelLinear": StandInLinear,
        "TENorm": StandInNorm,
        "TEDotProductAttention": StandInAttention,
    }
    for name, stand_in in stand_ins.items():
        assert hasattr(te, name)
        monkeypatch.setattr(te, name, stand_in)
    StandInAttention.seen.clear()
    config = EncoderConfig.from_hf(CONFIGS[request.param]())
    with parallel_world(Layout()):
        yield EncoderStage(
            config, transformer_config(config, Layout(), dtype=torch.float32), layers="transformer_engine"
        )


def test_every_parameter_has_its_row_and_shape(encoder: EncoderStage) -> None:
    found = {checkpoint_name(name): tuple(parameter.shape) for name, parameter in encoder.named_parameters()}
    assert found == {weight.megatron: weight.megatron_shape for weight in weights(encoder.encoder_config)}


def test_padded_and_packed_equal_hugging_face(encoder: EncoderStage) -> None:
    model = oracle.hf_model(CONFIGS[encoder.encoder_config.family]())
    state, config = model.state_dict(), encoder.encoder_config
    table = {weight.megatron: weight for weight in weights(config)}
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            weight = table[checkpoint_name(name)]
            parts = [state[part] for part in weight.hf]
            if weight.kind == "qkv":
                parts = [pack_qkv(*parts, groups=config.num_key_value_heads, head_dim=config.head_dim)]
            parameter.copy_(pack_gate_up(*parts) if weight.kind == "gate_up" else parts[0])
        texts = [list(range(20, 20 + n)) for n in (70, 3, 9, 9)]
        wanted = oracle.embed(model, texts)
        torch.testing.assert_close(encoder(TokenBatch.pad(texts, pad_id=11)), wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(encoder(TokenBatch.pad(texts[2:], pad_id=11)), wanted[2:], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            encoder(TokenBatch.pack(texts, pad_id=11, multiple_of=64)), wanted, rtol=1e-5, atol=1e-6
        )
    assert {(AttnMaskType.padding, "sbhd"), (AttnMaskType.no_mask, "sbhd"), (AttnMaskType.padding, "thd")} == set(
        StandInAttention.seen
    )


def test_layers_ask_for_no_device_while_computing(encoder: EncoderStage, monkeypatch: pytest.MonkeyPatch) -> None:
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    forbid_questions(monkeypatch)
    for batch in (TokenBatch.pack([[1, 2, 3], [4]], pad_id=11), TokenBatch.pad([[1, 2, 3], [4]], pad_id=11)):
        encoder(batch).sum().backward()
