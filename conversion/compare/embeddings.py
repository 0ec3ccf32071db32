"""Comparison of embeddings: both sides of a conversion embed a few texts in fp32, so equal tensors give equal vectors.

The comparison goes one layer at a time: a model of a single layer takes each layer's weights in turn, and the hidden
states are kept between layers. So a model of any size needs only the memory of its largest layer, and both sides'
states can be compared after each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_embed.bridge import mapping
from megatron_embed.bridge.config import EncoderConfig, stock_text_config
from megatron_embed.bridge.cpu import host
from megatron_embed.bridge.errors import UserError
from megatron_embed.bridge.layout import Layout
from megatron_embed.bridge.mapping import Weight
from megatron_embed.bridge.parallel import parallel_world, select_device
from megatron_embed.conversion.compare.tokenizers import load_tokenizer
from megatron_embed.conversion.hf.folder import HFFolder
from megatron_embed.conversion.hf.tokenizer_files import has_tokenizer
from megatron_embed.conversion.mcore.weights import CheckpointWeights

SENTENCES = (
    "query: how do plants turn light into sugar?",
    "passage: Photosynthesis stores the energy of light in the bonds of carbohydrates.",
    "passage: The railway between the two towns was opened in 1869.",
)

#: yields every text's states ``[tokens, hidden]`` after each layer but the last, then every text's vector ``[hidden]``
Layers = Generator[list[Tensor], None, None]


class Distance(NamedTuple):
    """Distance between the vectors of two sides.

    Attributes:
        texts: for each text the largest difference of two values.
        scale: the largest value.
        layer: number (from 1) of the first layer after which the states differ by more than the tolerance; None: none.
    """

    texts: list[float]
    scale: float
    layer: int | None


def compare_layers(found: Layers, wanted: Layers, *, tolerance: float, on_layer: Callable[[], object]) -> Distance:
    """Run both sides layer by layer, and return their distance.

    Args:
        tolerance: limit relative to the largest value of the states.
    """
    first, scale = None, 0.0
    apart: list[float] = []
    with torch.no_grad(), closing(found), closing(wanted):
        for number, (left, right) in enumerate(zip(found, wanted, strict=True), 1):
            pairs = list(zip(left, right, strict=True))
            apart = [float((a - b).abs().nan_to_num(nan=float("inf")).max()) for a, b in pairs]
            scale = max(float(b.abs().max()) for _, b in pairs)
            if first is None and not max(apart) <= tolerance * scale:
                first = number
            on_layer()
    return Distance(apart, scale, first)


def hf_layers(
    folder: HFFolder,
    config: EncoderConfig,
    texts: Sequence[Sequence[int]],
    *,
    causal: bool,
    dtype_of: Callable[[Weight, str], torch.dtype] | None = None,
) -> Layers:
    """Run transformers' stock model of the folder's own config, one text at a time, and pool its states.

    Args:
        config: names the weights and states the pooling.
        texts: token ids.
        causal: whether a token sees only the tokens before it.
        dtype_of: gives the dtype to which a weight's tensor is rounded first; None rounds no tensor.
    """
    from transformers import AutoModel

    select_device()
    device = host.device()
    hf = stock_text_config(folder.config)
    hf.num_hidden_layers, hf.is_causal = 1, causal
    with torch.device("meta"):
        model: Any = AutoModel.from_config(hf, dtype=torch.float32).eval()
    model.rotary_emb = type(model.rotary_emb)(hf).to(device)  # no file holds its frequencies
    norm, model.norm = model.norm, torch.nn.Identity()
    (first, *_), *layers, (last, *_) = _by_layer(config)

    def read(weight: Weight, name: str, index: Sequence[slice] | None = None) -> Tensor:
        tensor = folder.read(folder.prefix + name, index)
        return (tensor if dtype_of is None else tensor.to(dtype_of(weight, name))).float().to(device)

    states = [torch.cat([read(first, first.hf[0], [slice(i, i + 1)]) for i in ids]) for ids in texts]
    for number, weights in enumerate(layers):
        own = f"layers.{number}."
        filled = {name.removeprefix(own): read(weight, name) for weight in weights for name in weight.hf}
        model.layers[0].load_state_dict(filled, strict=True, assign=True)
        states = [model(inputs_embeds=text[None], use_cache=False).last_hidden_state[0] for text in states]
        model.layers[0].to("meta")  # free the memory for the next layer of either side
        del filled
        if number < len(layers) - 1:
            yield [text.cpu() for text in states]
    norm.load_state_dict({"weight": read(last, last.hf[0])}, strict=True, assign=True)
    yield [_pool(norm(text), config).cpu() for text in states]


def checkpoint_layers(weights: CheckpointWeights, texts: Sequence[Sequence[int]]) -> Layers:
    """Run the Megatron encoder of a checkpoint in a world of one process, with all texts in one padded batch.

    Each layer is a pipeline stage of its own, which is built in its turn.
    """
    from megatron_embed.bridge.encoder import EncoderStage, transformer_config
    from megatron_embed.bridge.layer_spec import local_layers
    from megatron_embed.bridge.sequences import TokenBatch

    select_device()
    used = sorted({token for ids in texts for token in ids})  # the only rows of the embedding that are read
    rows = {token: row for row, token in enumerate(used)}
    config = weights.config
    single = config.replace(num_hidden_layers=1, vocab_size=len(used))
    batch = TokenBatch.pad([[rows[token] for token in ids] for ids in texts], pad_id=0).to(host.device())
    with parallel_world(Layout()):
        transformer = transformer_config(single, Layout(), dtype=torch.float32)
        states: Tensor | None = None
        for layer in range(config.num_hidden_layers):
            last = layer == config.num_hidden_layers - 1
            stage = EncoderStage(
                single, transformer, pre_process=not layer, post_process=last, layers=local_layers()
            ).eval()
            for _, parameter, weight in mapping.parameters_with_weights(stage, config, layer_offset=layer):
                if weight.kind == "vocab":
                    parameter.zero_()[: len(used)] = weights.read_rows(weight, used)
                else:
                    parameter.copy_(weights.read(weight))
            if states is not None:
                stage.set_input_tensor(states)
            states = stage(batch)
            assert states is not None
            del stage
            yield list(states.cpu()) if last else [states[: len(ids), row].cpu() for row, ids in enumerate(texts)]


def _by_layer(config: EncoderConfig) -> list[list[Weight]]:
    """Return the embedding's weights, each layer's weights, and the final norm's weights."""
    table = list(mapping.weights(config))
    layers = [[weight for weight in table if weight.layer == n] for n in range(config.num_hidden_layers)]
    return [table[:1], *layers, table[-1:]]


def token_ids(folder: Path, texts: Sequence[str], config: EncoderConfig) -> list[list[int]]:
    """Return the token ids that training and an export's tokenizer give; fixed ids where there is no tokenizer.

    Raises:
        UserError: the tokenizer gives an id for which the embedding has no row.
    """
    if not has_tokenizer(folder):
        return [[(7 + 31 * row + 11 * n * n) % config.vocab_size for n in range(12 + row)] for row in range(len(texts))]
    tokenizer = load_tokenizer(folder, edited=True)
    found: list[list[int]] = [tokenizer(text)["input_ids"] for text in texts]
    if (highest := max(max(ids) for ids in found)) >= config.vocab_size:
        raise UserError(
            f"{folder / 'tokenizer.json'}: gives id {highest}, but the model's vocab_size is {config.vocab_size}; "
            f"wanted the model's own tokenizer"
        )
    return found


def _pool(states: Tensor, config: EncoderConfig) -> Tensor:
    """Pool one text's states ``[tokens, hidden]``, without padding, to ``[hidden]``."""
    positions = torch.arange(1, len(states) + 1, dtype=states.dtype, device=states.device)[:, None]
    pooled = {
        "avg": lambda: states.mean(0),
        "cls": lambda: states[0],
        "last": lambda: states[-1],
        "weighted_avg": lambda: (states * positions).sum(0) / positions.sum(),
    }[config.pooling]()
    return torch.nn.functional.normalize(pooled, dim=0) if config.normalize else pooled
