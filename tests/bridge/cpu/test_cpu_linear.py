"""oneDNN's product and its gradients against fp64, and when it is taken."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.mlp import MLP
from support.megatron import filled_stages
from support.oracle import hf_model
from support.tiny_models import tiny_config
from torch import Tensor

from megatron_embed.bridge import EncoderConfig
from megatron_embed.bridge.cpu import host, packed_weights
from megatron_embed.bridge.cpu import linear as module
from megatron_embed.bridge.cpu.linear import ColumnParallelLinear, RowParallelLinear, linear, onednn_takes
from megatron_embed.bridge.layout import Layout
from megatron_embed.bridge.parallel import parallel_world

TOKENS, ROWS, FEATURES, OUTPUTS = 37, 3, 130, 66


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_product_and_its_gradients(transposed: bool, wanted: tuple[bool, bool]) -> None:
    x, weight = random(TOKENS, ROWS, FEATURES, seed=0), random(OUTPUTS, FEATURES, seed=1)
    if transposed:  # what a slice or a transposed view brings
        x, weight = x.transpose(0, 1), weight.t().contiguous().t()
    x, weight = (v.requires_grad_(want) for v, want in zip((x, weight), wanted, strict=True))
    output = linear(x, weight)
    share = random(*output.shape, seed=2)
    output.backward(share)
    exact = x.detach().double(), weight.detach().double()
    torch.testing.assert_close(output.double(), exact[0] @ exact[1].t(), rtol=1e-5, atol=1e-5)
    of_x = share.double() @ exact[1]
    of_weight = share.double().flatten(0, 1).t() @ exact[0].flatten(0, 1)
    for value, want, gradient in zip((x, weight), wanted, (of_x, of_weight), strict=True):
        assert (value.grad is not None) == want
        if value.grad is not None:
            torch.testing.assert_close(value.grad.double(), gradient, rtol=1e-5, atol=2e-5)


def test_what_goes_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.zeros(64, 2, 256), torch.zeros(512, 256)
    for faster in (True, False):
        monkeypatch.setattr(module, "onednn_is_faster", lambda faster=faster: faster)
        assert onednn_takes(x, weight) == faster
        for dtype in (torch.float64, torch.bfloat16):
            assert not onednn_takes(x.to(dtype), weight.to(dtype))
        assert not onednn_takes(x[:4], weight)  # too small


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_packed_weights_compute_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the layers before packing, which the parity tests hold against transformers'."""
    host.run_on_cpu()
    monkeypatch.setattr(packed_weights, "onednn_is_faster", lambda: True)
    config = tiny_config()
    with parallel_world(Layout()):
        (encoder,) = filled_stages(EncoderConfig.from_hf(config), Layout(), hf_model(config).state_dict(), dtype)
        linears = [m for m in encoder.modules() if isinstance(m, ColumnParallelLinear | RowParallelLinear)]
        assert len(linears) == 4 * config.num_hidden_layers
        # An MLP is compared as a whole: its first layer takes the activation over.
        mlps = [m for m in encoder.modules() if isinstance(m, MLP)]
        inside = {layer for mlp in mlps for layer in (mlp.linear_fc1, mlp.linear_fc2)}
        layers = mlps + [layer for layer in linears if layer not in inside]
        widths = [(m.linear_fc1 if isinstance(m, MLP) else m).weight.shape[1] for m in layers]
        inputs = [random(5, 2, width, seed=i).to(dtype) for i, width in enumerate(widths)]
        before = [layer(x)[0].detach() for layer, x in zip(layers, inputs, strict=True)]
        packed_weights.pack_weights([encoder])
        packed_weights.pack_weights([encoder])  # what is packed stays so
        if dtype == torch.float64:
            assert all(layer.packed is None and layer.packed_gate is None for layer in linears)
            return
        for layer in linears:
            assert layer.weight.untyped_storage().nbytes() == 0  # not in memory twice
            assert (layer.packed_gate is not None) == any(layer is mlp.linear_fc1 for mlp in mlps)
        for layer, x, wanted in zip(layers, inputs, before, strict=True):
            with pytest.raises(AssertionError, match="for encoding only"):
                layer(x)
            with torch.no_grad():
                found = layer(x)[0]
            limit = 2**-7 if dtype == torch.bfloat16 else 1e-6
            torch.testing.assert_close(found, wanted, rtol=limit, atol=limit)
