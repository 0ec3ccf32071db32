"""The layers of CUDA without Transformer Engine, computed on a CPU: Hugging Face's vectors and gradients."""

from __future__ import annotations

import ast

import pytest
import torch
from support import oracle
from support.megatron import collect, filled_stages, forbid_questions, merge_world
from support.places import ROOT
from support.tiny_families import tiny_qwen3_config
from support.tiny_models import tiny_config

from megatron_embed.bridge import EncoderConfig, layer_spec, te_import
from megatron_embed.bridge.cpu import host
from megatron_embed.bridge.layer_spec import choose_layers
from megatron_embed.bridge.layers import LayerKind
from megatron_embed.bridge.layout import Layout
from megatron_embed.bridge.mapping import checkpoint_name
from megatron_embed.bridge.parallel import parallel_world
from megatron_embed.bridge.sequences import TokenBatch

TEXTS = [list(range(12, 12 + n)) for n in (70, 3, 9, 9, 31)]  # beyond 64 positions the Llama-4 scale acts


CONFIGS = {"ministral3": tiny_config, "qwen3": tiny_qwen3_config}


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("kind", ["cuda", "cpu"])
@pytest.mark.parametrize("family", CONFIGS)
def test_vectors_and_every_gradient_equal_hugging_face(family: str, kind: LayerKind, packed: bool) -> None:
    host.run_on_cpu()
    config = EncoderConfig.from_hf(CONFIGS[family]())
    model = oracle.hf_model(CONFIGS[family](), dtype=torch.float64, exact_norms=True)
    weights = torch.randn(len(TEXTS), config.hidden_size, generator=torch.Generator().manual_seed(0)).double()
    with parallel_world(Layout()):
        (encoder,) = filled_stages(config, Layout(), model.state_dict(), torch.float64, layers=kind)
        assert {type(module) for module in encoder.modules()} >= {choose_layers(kind).attention}
        batch = TokenBatch.pack(TEXTS, pad_id=11) if packed else TokenBatch.pad(TEXTS, pad_id=11)
        found = encoder(batch)
        (found * weights).sum().backward()
        gradients = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
        named = {checkpoint_name(name): gradient for name, gradient in gradients.items()}
        merged = merge_world(config, [collect(named)])
    wanted = oracle.embed(model, TEXTS)
    (wanted * weights).sum().backward()
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    for name, parameter in model.named_parameters():
        assert oracle.relative_error(merged[name], parameter.grad) < 1e-10, name


def test_a_process_without_cuda_builds_layers_of_the_cpu() -> None:
    host.run_on_cpu()
    assert choose_layers().kind == "cpu"


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_layers_ask_for_no_device_while_computing(kind: LayerKind, monkeypatch: pytest.MonkeyPatch) -> None:
    host.run_on_cpu()
    config = EncoderConfig.from_hf(tiny_config())
    state = oracle.hf_model(tiny_config()).state_dict()
    with parallel_world(Layout()):
        (encoder,) = filled_stages(config, Layout(), state, layers=kind)
        forbid_questions(monkeypatch)
        for batch in (TokenBatch.pack(TEXTS, pad_id=11), TokenBatch.pad(TEXTS, pad_id=11)):
            encoder(batch).sum().backward()
            with torch.no_grad():
                encoder.eval()(batch)


#: what asks which device there is, and the files of the bridge that may: they choose, or build, and compute nothing
QUESTIONS = ("cuda_is_hidden", "is_cuda", "is_available", "device_count")
CHOOSING = {"layer_spec.py", "parallel.py", "encoder.py"}


def test_only_what_chooses_asks_for_the_device() -> None:
    for path in sorted((ROOT / "bridge").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Attribute):
                continue
            of_device = node.attr == "type" and isinstance(node.value, ast.Attribute) and node.value.attr == "device"
            if of_device or node.attr in QUESTIONS:
                assert path.name in CHOOSING, f"{path.name}:{node.lineno} asks for the device"


@pytest.mark.parametrize(
    ("cuda", "transformer_engine", "kind"),
    [(True, True, "transformer_engine"), (True, False, "cuda"), (False, True, "cpu"), (False, False, "cpu")],
)
def test_the_kind_is_chosen_by_what_the_process_has(
    cuda: bool, transformer_engine: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.run_on_cpu()
    monkeypatch.setattr(host, "cuda_is_hidden", lambda: not cuda)
    monkeypatch.setattr(te_import, "problem", lambda: None if transformer_engine else "it is not installed")
    chosen: list[str] = []
    for name in ("cuda_layers", "cpu_layers", "_transformer_engine_layers"):
        monkeypatch.setattr(layer_spec, name, lambda name=name: chosen.append(name))
    choose_layers()
    assert chosen == [{"cuda": "cuda_layers", "cpu": "cpu_layers"}.get(kind, "_transformer_engine_layers")]


def test_layers_of_cuda_are_megatron_cores_own_and_none_of_a_cpus() -> None:
    layers = choose_layers("cuda")
    assert layers.kind == "cuda"
    for of_megatron in (layers.column, layers.row, layers.table):
        assert of_megatron.__module__.startswith("megatron.core.")
    for chosen in (layers.attention, layers.activation, layers.norm):
        assert not any(".cpu." in base.__module__ for base in chosen.__mro__)
    assert layers.norm.forward is torch.nn.RMSNorm.forward
