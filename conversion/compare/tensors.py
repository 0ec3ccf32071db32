"""Bitwise comparison of a source's tensors with those of a conversion's output, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron_embed.bridge import mapping
from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.errors import UserError
from megatron_embed.bridge.families import is_vlm
from megatron_embed.conversion.compare.differences import ComparedSection, Difference
from megatron_embed.conversion.files.casts import dtype_name
from megatron_embed.conversion.files.progress import byte_bar
from megatron_embed.conversion.hf.folder import HFFolder
from megatron_embed.conversion.hf.stored_tensors import FP8_SCALES
from megatron_embed.conversion.mcore.weights import KEPT, CheckpointWeights

#: (name, function that reads the source's tensor, function that reads the other side's in any dtype)
Pair = tuple[str, Callable[[], Tensor], Callable[[], Tensor]]

#: number of values compared at once, so that no second copy of an embedding table is made
_BLOCK = 1 << 22


def compare_tensors(
    pairs: Iterator[Pair], source: HFFolder, missing: list[Difference], *, progress: bool
) -> tuple[ComparedSection, list[str]]:
    """Compare all pairs, after rounding the source's tensor to the other side's dtype.

    Returns:
        The section, and notes on what was rounded.
    """
    count, differences = 0, []
    rounded: dict[tuple[torch.dtype, torch.dtype], int] = {}
    total = sum(source.nbytes(name) for name in source.names())
    with byte_bar("verify", total, enabled=progress) as advance:
        for name, left, right in pairs:
            a, b = left(), right()
            count += 1
            if (difference := _difference(name, a, b)) is not None:
                differences.append(difference)
            if a.dtype != b.dtype:
                rounded[a.dtype, b.dtype] = rounded.get((a.dtype, b.dtype), 0) + 1
            advance(a.nbytes)
    largest = max((difference.largest or 0.0 for difference in [*differences, *missing]), default=0.0)
    notes = [
        f"{number} tensor(s) compared as {dtype_name(b)}: the source's are {dtype_name(a)}"
        for (a, b), number in rounded.items()
    ]
    return ComparedSection("tensors", count + len(missing), [*differences, *missing], largest), notes


def _difference(name: str, wanted: Tensor, found: Tensor) -> Difference | None:
    if wanted.shape != found.shape:
        return Difference(name, f"shape {list(found.shape)}", f"shape {list(wanted.shape)}", float("inf"))
    largest, count = 0.0, 0
    for a, b in zip(_blocks(wanted), _blocks(found), strict=True):
        rounded = a.to(b.dtype)
        if not torch.equal(_bits(rounded), _bits(b)):
            apart = (rounded.double() - b.double()).abs().nan_to_num(nan=float("inf"))
            largest = max(largest, float(apart.max()))
            count += int((_bits(rounded) != _bits(b)).view(len(b), -1).any(1).sum())
    if not count:
        return None
    of = f"{dtype_name(found.dtype)} {list(found.shape)}"
    return Difference(
        name, f"{count} of {found.numel()} values differ, by at most {largest:g}", f"the source's {of}", largest
    )


def _blocks(tensor: Tensor) -> tuple[Tensor, ...]:
    return tensor.contiguous().reshape(-1).split(_BLOCK)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


# ---- pairs


def with_checkpoint(source: HFFolder, weights: CheckpointWeights, config: EncoderConfig) -> Iterator[Pair]:
    """Yield pairs of the encoder's weights, unpacked from the checkpoint, and of the tensors kept unchanged."""
    for weight in mapping.weights(config):
        parts = weights.hf_parts(weight)
        for name, part in zip(weight.hf, parts, strict=True):
            full = source.prefix + name
            yield full, lambda full=full: source.read(full), lambda part=part: part  # type: ignore[misc]
    for name in weights.kept():
        if name in source:
            yield name, lambda n=name: source.read(n), lambda n=name: weights.reader.read(KEPT + n)  # type: ignore[misc]


def with_folder(source: HFFolder, other: HFFolder, config: EncoderConfig) -> Iterator[Pair]:
    """Return pairs of the encoder's weights, and of the other tensors that both folders have.

    Raises:
        UserError: the other folder's weights do not fit its own config, or the source lacks a weight; raised at once.
    """
    other.check(other.encoder_config())
    shared = {name.removeprefix(source.prefix): name for name in source.names() if name.startswith(source.prefix)}
    theirs = {name.removeprefix(other.prefix): name for name in other.names() if name.startswith(other.prefix)}
    tower = {name for weight in mapping.weights(config) for name in weight.hf}
    for name in sorted(tower):
        if name not in theirs:
            raise UserError(f"{other.path}: {other.prefix}{name} is missing; the two models are of different shapes")

    def pairs() -> Iterator[Pair]:
        for weight in mapping.weights(config):
            for name in weight.hf:
                yield name, lambda n=name: source.read(shared[n]), lambda n=name: other.read(theirs[n])  # type: ignore[misc]
        taken = {shared[name] for name in tower}
        for name in source.names():  # tensors beside the tower that both folders have
            if name in other and name not in taken and not name.endswith(FP8_SCALES):
                yield name, lambda n=name: source.read(n), lambda n=name: other.read(n)  # type: ignore[misc]

    return pairs()


def missing_tensors(source: HFFolder, other: HFFolder) -> list[Difference]:
    """Return a difference for each tensor beside a VLM's language tower that another VLM made from it lacks."""
    if not (is_vlm(source.config) and is_vlm(other.config)):
        return []
    towers = (source.prefix, other.prefix)
    return [
        Difference(name, f"missing in {other.path}", "the source's", float("inf"))
        for name in source.names()
        if name not in other and not name.startswith(towers) and not name.endswith("rotary_emb.inv_freq")
    ]
