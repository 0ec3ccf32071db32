"""Writer of safetensors files, tensor by tensor: first the header, from the known shapes, then the bytes in turn."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_embed.bridge import mapping
from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.files.block_writer import BlockWriter
from megatron_embed.conversion.files.json_files import write_json
from megatron_embed.conversion.files.prefetch import fault_in, one_ahead
from megatron_embed.conversion.files.progress import byte_bar
from megatron_embed.conversion.files.stored import Values, write_values
from megatron_embed.conversion.hf.stored_tensors import DTYPES, INDEX, SINGLE

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class TensorSpec:
    """Facts about a tensor that are known before it is read."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def tower_specs(config: EncoderConfig, dtype: torch.dtype, *, prefix: str = "") -> list[TensorSpec]:
    """Return the encoder's tensors in the table's order, under their HF names behind a prefix."""
    return [
        TensorSpec(prefix + name, shape, dtype)
        for weight in mapping.weights(config)
        for name, shape in zip(weight.hf, weight.hf_shapes, strict=True)
    ]


def parse_size(text: str) -> int:
    """Parse a size into bytes: ``"5GB"``, ``"500MiB"``, ``"1000"`` (KB is 1000, KiB 1024).

    Raises:
        UserError: the text is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    unit = match[2].upper().removesuffix("B") + "B" if match and match[2] else ""
    if match is None or unit not in {**_UNITS, "B": 1} or float(match[1]) <= 0:
        raise UserError(f"--max-shard-size: {text!r} is not a size; wanted something like 5GB or 500MB")
    return max(1, int(float(match[1]) * _UNITS.get(unit, 1)))


def write_sharded(
    specs: Sequence[TensorSpec],
    tensors: Iterable[tuple[str, Values]],
    out: Path,
    *,
    max_shard_size: str = "5GB",
    progress: bool = False,
) -> int:
    """Write tensors into folder ``out``; read each tensor while the previous one is written.

    Args:
        specs: names, shapes and dtypes, in the order in which ``tensors`` yields them.
        tensors: names and values, in the specs' dtypes.
        max_shard_size: such as ``"5GB"``; a larger single tensor gets a file of its own.
        progress: show a bar.

    Returns:
        Total bytes of the tensors. One file is called ``model.safetensors``; several come with their index.
    """
    shards = _plan(specs, parse_size(max_shard_size))
    files = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    )
    total = sum(spec.nbytes for spec in specs)
    with (
        ThreadPoolExecutor(1, "disk") as disk,
        closing(one_ahead((name, fault_in(values)) for name, values in tensors)) as source,
        byte_bar("export", total, enabled=progress) as advance,
    ):
        for file, shard in zip(files, shards, strict=True):
            with BlockWriter(out / file, disk) as stream:
                stream.write(_header(shard))
                for spec in shard:
                    name, values = next(source)
                    assert name == spec.name, (name, spec.name)
                    write_values(stream, values, spec.shape, spec.dtype)
                    del values
                    advance(spec.nbytes)
        assert next(source, None) is None, "more tensors than were announced"
    if len(shards) > 1:
        weight_map = {spec.name: file for file, shard in zip(files, shards, strict=True) for spec in shard}
        parameters = sum(math.prod(spec.shape) for spec in specs)
        metadata = {"total_parameters": parameters, "total_size": total}
        write_json(out / INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
    return total


def _plan(specs: Sequence[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    """Fill shards in order; each holds at least one tensor."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


def _header(shard: Sequence[TensorSpec]) -> bytes:
    """Return the length (8 bytes, little endian) and the JSON, padded with spaces to put tensors at a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for spec in shard:
        offsets = [position, position + spec.nbytes]
        entries[spec.name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        position = offsets[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
