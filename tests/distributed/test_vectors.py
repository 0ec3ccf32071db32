"""Vectors under every layout against Hugging Face in one process, in fp32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support import oracle
from support.megatron import filled_stages
from support.tiny_models import tiny_config
from support.worlds import run_world

from megatron_embed.bridge import EncoderConfig
from megatron_embed.bridge.layout import Layout
from megatron_embed.bridge.parallel import parallel_world

LAYOUTS = {
    2: [Layout(), Layout(tp=2), Layout(pp=2), Layout(cp=2), Layout(pp=2, vpp=2)],
    4: [Layout(tp=4), Layout(tp=2, pp=2), Layout(tp=2, cp=2), Layout(pp=4), Layout(cp=4), Layout(tp=2)],
}


def config() -> Any:
    return tiny_config(num_hidden_layers=5, rope_parameters={"original_max_position_embeddings": 16})


def texts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 60, (23,), generator=generator).tolist()
    return [torch.randint(12, 997, (length,), generator=generator).tolist() for length in lengths]


def encode_all(layouts: list[Layout], state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    from megatron_embed.recipes.encoding.encoder import encode_sequences
    from megatron_embed.recipes.encoding.micro_batches import BatchingPlan

    found = {}
    for layout in layouts:
        with parallel_world(layout):
            for sequence_parallel in (True, False) if layout.tp > 1 else (False,):
                encoder_config = EncoderConfig.from_hf(config())
                stages = filled_stages(encoder_config, layout, state, sequence_parallel=sequence_parallel)
                for packed in (True, False):
                    plan = BatchingPlan(
                        pad_id=11,
                        packed=packed,
                        max_tokens=128,
                        multiple_of=layout.tp * layout.cp,
                        count_multiple_of=layout.pp if layout.vpp else 1,
                    )
                    name = f"{layout}, sequence parallel {sequence_parallel}, packed {packed}"
                    found[name] = encode_sequences(stages, plan, texts(), encoder_config.hidden_size)
    return found


@pytest.mark.parametrize("world", LAYOUTS)
def test_vectors_are_the_same_under_every_layout_and_on_every_rank(world: int) -> None:
    model = oracle.hf_model(config())
    with torch.no_grad():
        wanted = torch.cat([oracle.embed(model, [text]) for text in texts()]).numpy()
    results = run_world(encode_all, world, LAYOUTS[world], model.state_dict())
    for name in results[0]:
        for result in results:
            error = np.abs(result[name] - wanted).max() / np.abs(wanted).max()
            assert error <= 1e-6, f"{name}: off by {error:.1e} of the largest value"


def long_document(length: int, state: dict[str, torch.Tensor], overrides: dict[str, Any]) -> torch.Tensor:
    from megatron_embed.bridge.sequences import TokenBatch

    layout = Layout(cp=2)
    with parallel_world(layout), torch.no_grad():
        (encoder,) = filled_stages(EncoderConfig.from_hf(tiny_config(**overrides)), layout, state)
        return encoder(TokenBatch.pack([document(length)], pad_id=11, multiple_of=2))


def document(length: int) -> list[int]:
    return torch.randint(12, 997, (length,), generator=torch.Generator().manual_seed(2)).tolist()


def test_a_document_of_32k_tokens_over_two_context_parallel_ranks() -> None:
    overrides = {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 262144,
        "rope_parameters": {"original_max_position_embeddings": 16384},
    }
    length = 32_768
    model = oracle.hf_model(tiny_config(**overrides))
    with torch.no_grad():
        wanted = oracle.embed(model, [document(length)])
    for found in run_world(long_document, 2, length, model.state_dict(), overrides):
        assert (found - wanted).abs().max() / wanted.abs().max() <= 1e-5
