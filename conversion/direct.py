"""Direct start: a Megatron model's parameters filled straight from an HF folder, each rank reading its own slices."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_embed.bridge import mapping, transforms
from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.checkpoint_weights import pack, read_slices
from megatron_embed.conversion.hf_folder import HFFolder


def load_hf_weights(
    encoder: torch.nn.Module | Sequence[tuple[torch.nn.Module, int]],
    folder: HFFolder,
    config: EncoderConfig,
    *,
    tp_rank: int = 0,
    tp_size: int = 1,
    layer_offset: int = 0,
) -> None:
    """Fill every parameter of this rank's part of the model.

    Only the bytes of this rank's slices are read (``folder.bytes_requested`` counts them).

    Args:
        encoder: the stage's module, or with interleaved stages a list of (module, its layer offset).
        layer_offset: global index of the stage's first layer.

    Raises:
        UserError: the folder does not fit the config, or a parameter has no row in the table or another shape.
    """
    folder.check(config)
    table = {weight.megatron: weight for weight in mapping.weights(config)}
    stages = [(encoder, layer_offset)] if isinstance(encoder, torch.nn.Module) else list(encoder)
    with torch.no_grad():
        for module, offset in stages:
            for name, parameter in module.named_parameters():
                if name in mapping.OWN_PARAMETERS:
                    continue  # starts from the recipe
                weight = table.get(mapping.checkpoint_name(name, layer_offset=offset))
                if weight is None:
                    raise UserError(f"parameter {name}: no weight of the source belongs to it")
                tensor = pack(
                    weight,
                    read_slices(folder, weight, config, tp_rank=tp_rank, tp_size=tp_size),
                    config,
                    tp_size=tp_size,
                )
                if weight.kind == "vocab":
                    rows = transforms.padded_vocab_size(config.vocab_size, world=tp_size) // tp_size
                    tensor = transforms.pad_vocab(tensor, rows=rows)
                if tensor.shape != parameter.shape:
                    raise UserError(
                        f"parameter {name}: has shape {list(parameter.shape)}, but its slice of the source has "
                        f"{list(tensor.shape)} (tensor-parallel rank {tp_rank} of {tp_size})"
                    )
                parameter.copy_(tensor)
