"""A few texts embedded by either side of a conversion, in fp32, to see that equal tensors also mean equal vectors."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_embed.bridge import host, mapping, transforms
from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.layout import Layout
from megatron_embed.bridge.parallel import parallel_world, select_device
from megatron_embed.conversion.checkpoint_weights import CheckpointWeights
from megatron_embed.conversion.hf_folder import HFFolder
from megatron_embed.conversion.tokenizer_files import write_tokenizer

SENTENCES = (
    "query: how do plants turn light into sugar?",
    "passage: Photosynthesis stores the energy of light in the bonds of carbohydrates.",
    "passage: The railway between the two towns was opened in 1869.",
)

#: texts → ``[texts, hidden]``
Embed = Callable[[Sequence[str]], Tensor]


def hf_embedder(folder: HFFolder, config: EncoderConfig) -> Embed:
    """transformers' stock model of the folder's encoder, made bidirectional, one text at a time; pooled by hand.

    Args:
        config: the folder's, perhaps with another dtype, to which the weights are rounded first.
    """

    def embed(texts: Sequence[str]) -> Tensor:
        from transformers import AutoModel

        select_device()
        dtype = getattr(torch, config.dtype)
        names = [name for weight in mapping.weights(config) for name in weight.hf]
        with torch.device("meta"):
            model = AutoModel.from_config(config.to_hf(), dtype=torch.float32)
        model.to_empty(device=host.device())
        # to_empty leaves the buffers that no file holds, the rotary frequencies, without values
        model.rotary_emb = type(model.rotary_emb)(model.config).to(host.device())
        state = {name: folder.read(folder.prefix + name).to(dtype).float() for name in names}
        model.load_state_dict(state, strict=True)
        del state
        rows = []
        with torch.no_grad():
            for ids in token_ids(folder.path, texts, config):
                inputs = torch.tensor([ids], device=host.device())
                rows.append(_pool(model.eval()(input_ids=inputs).last_hidden_state[0], config))
        return torch.stack(rows).cpu()

    return embed


def checkpoint_embedder(weights: CheckpointWeights, tokenizer: Path) -> Embed:
    """The Megatron encoder of a checkpoint in a world of one process, all texts as one padded batch.

    Args:
        tokenizer: folder whose tokenizer reads the texts.
    """
    config = weights.config

    def embed(texts: Sequence[str]) -> Tensor:
        from megatron_embed.bridge.encoder import build_stages, transformer_config
        from megatron_embed.bridge.sequences import TokenBatch

        select_device()
        with parallel_world(Layout()), torch.no_grad():
            (encoder,) = build_stages(config, transformer_config(config, Layout(), dtype=torch.float32), use_te=False)
            table = {weight.megatron: weight for weight in mapping.weights(config)}
            for name, parameter in encoder.named_parameters():
                weight = table[mapping.checkpoint_name(name)]
                value = weights.read(weight)
                parameter.copy_(transforms.pad_vocab(value, rows=len(parameter)) if weight.kind == "vocab" else value)
            batch = TokenBatch.pad(token_ids(tokenizer, texts, config), pad_id=0)
            return encoder.eval()(batch.to(host.device())).float().cpu()

    return embed


def token_ids(folder: Path, texts: Sequence[str], config: EncoderConfig) -> list[list[int]]:
    """Token ids as training feeds them and as an export's tokenizer gives them."""
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory(prefix="tokenizer-") as edited:
        write_tokenizer(folder, Path(edited), max_length=config.max_position_embeddings)
        tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(edited, local_files_only=True)
    return [tokenizer(text)["input_ids"] for text in texts]


def _pool(states: Tensor, config: EncoderConfig) -> Tensor:
    """``[tokens, hidden]`` of one text without padding → ``[hidden]``."""
    positions = torch.arange(1, len(states) + 1, dtype=states.dtype, device=states.device)[:, None]
    pooled = {
        "avg": lambda: states.mean(0),
        "cls": lambda: states[0],
        "last": lambda: states[-1],
        "weighted_avg": lambda: (states * positions).sum(0) / positions.sum(),
    }[config.pooling]()
    return torch.nn.functional.normalize(pooled, dim=0) if config.normalize else pooled
