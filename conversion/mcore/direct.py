"""Direct start: each rank fills a Megatron model's parameters straight from an HF folder, reading its own slices."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from megatron_embed.bridge import mapping, transforms
from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.files.casts import Casts
from megatron_embed.conversion.hf.folder import HFFolder
from megatron_embed.conversion.mcore.tensors import CheckpointReader
from megatron_embed.conversion.mcore.weights import CheckpointWeights, is_ignored, pack, read_cast, read_slices


def load_hf_weights(
    stages: Sequence[tuple[torch.nn.Module, int]],
    folder: HFFolder,
    config: EncoderConfig,
    *,
    tp_rank: int = 0,
    tp_size: int = 1,
    casts: Casts | None = None,
) -> None:
    """Fill every parameter of this rank's part of the model.

    This reads only the bytes of this rank's slices (``folder.bytes_requested`` counts them).

    Args:
        stages: (module, global index of its first layer); several with interleaved stages.
        casts: casts weights to the parameters' dtype; by default they may be rounded. The first tensor-parallel rank
            counts a weight that every rank holds, so that the ranks' counts add up.

    Raises:
        UserError: the folder does not fit the config, a parameter has no row in the table or another shape, or
            ``casts`` refuses a value.
    """
    folder.check(config)
    casts = casts or Casts(folder.path, rounding=True)
    with torch.no_grad():
        for module, offset in stages:
            for name, parameter, weight in mapping.parameters_with_weights(module, config, layer_offset=offset):
                counted = weight.tp_dim is not None or tp_rank == 0
                read = partial(read_cast, folder, casts, parameter.dtype, count=counted)
                slices = read_slices(folder, weight, config, tp_rank=tp_rank, tp_size=tp_size, read=read)
                tensor = pack(weight, slices, config, tp_size=tp_size)
                if weight.kind == "vocab":
                    rows = transforms.padded_vocab_size(config.vocab_size, world=tp_size) // tp_size
                    tensor = transforms.pad_vocab(tensor, rows=rows)
                if tensor.shape != parameter.shape:
                    raise UserError(
                        f"parameter {name}: has shape {list(parameter.shape)}, but its slice of the source has "
                        f"{list(tensor.shape)} (tensor-parallel rank {tp_rank} of {tp_size})"
                    )
                parameter.copy_(tensor)


def refuse_overflow(
    stages: Sequence[tuple[torch.nn.Module, int]], iter_dir: Path, config: EncoderConfig, casts: Casts
) -> None:
    """Refuse parameters that overflowed when they were filled from a checkpoint of a wider dtype.

    megatron-core casts while it loads, without a check.

    Args:
        stages: (module, its layer offset).
        casts: names the weight and its value in the message.

    Raises:
        UserError: a finite value of the checkpoint became infinite.
    """
    reader = CheckpointReader(iter_dir)
    stored = {reader.dtype(name) for name in reader.names() if not is_ignored(name)}
    for module, offset in stages:
        for _, parameter, weight in mapping.parameters_with_weights(module, config, layer_offset=offset):
            exact = all(torch.promote_types(dtype, parameter.dtype) == parameter.dtype for dtype in stored)
            if exact or not parameter.isinf().any():
                continue
            for part, tensor in zip(weight.hf, CheckpointWeights(reader, config).hf_parts(weight), strict=True):
                casts(part, tensor, parameter.dtype, count=False)
