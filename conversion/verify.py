"""Compare an HF folder with a Megatron checkpoint or with another HF folder: tensors, and embeddings of a few texts."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_embed.bridge import mapping
from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.errors import UserError
from megatron_embed.bridge.families import is_vlm
from megatron_embed.conversion import checkpoint_folder
from megatron_embed.conversion.checkpoint_weights import KEPT, CheckpointWeights
from megatron_embed.conversion.embedding import SENTENCES, checkpoint_embedder, hf_embedder
from megatron_embed.conversion.hf_folder import HFFolder
from megatron_embed.conversion.progress import byte_bar
from megatron_embed.conversion.sentence_files import read_sentence_settings
from megatron_embed.conversion.tensor_stream import CheckpointReader
from megatron_embed.conversion.tokenizer_files import has_tokenizer

#: embeddings are compared where the model fits easily into any machine's memory
EMBEDDING_LIMIT = 4 << 30
#: of the largest value; both sides compute in fp32
EMBEDDING_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Difference:
    """One tensor (or the embeddings) that is not the same on both sides."""

    name: str
    what: str
    largest: float


@dataclass(frozen=True)
class Verification:
    """The outcome of a comparison; it is true where nothing differs."""

    compared: int
    equal: int
    differences: list[Difference] = field(default_factory=list)
    #: largest difference of the embeddings; None: not compared, ``notes`` says why
    embeddings: float | None = None
    notes: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return not self.differences


def verify(
    hf_model: str | os.PathLike[str],
    *,
    megatron_path: str | os.PathLike[str] | None = None,
    hf_path: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Verification:
    """Compare a source with what was made of it.

    Tensors are compared in the dtype of the other side: what a conversion with ``--torch-dtype`` rounds is rounded here
    too, and must then be the same bit for bit. Where the model is small both sides also embed a few texts: folders with
    transformers, checkpoints with the Megatron encoder in this process.

    Args:
        hf_model: the source, a folder or hub id.
        megatron_path, hf_path: the other side; exactly one of them.

    Raises:
        UserError: one side cannot be read, or they are of different shapes.
    """
    if (megatron_path is None) == (hf_path is None):
        raise UserError("give either --megatron-path or --hf-path to compare with")
    source = HFFolder(hf_model, revision=revision, trust_remote_code=trust_remote_code)
    config = source.encoder_config()
    source.check(config)
    notes: list[str] = list(source.notes)
    other: HFFolder | CheckpointWeights
    if megatron_path is not None:
        iter_dir = checkpoint_folder.resolve(megatron_path)
        other = CheckpointWeights(
            CheckpointReader(iter_dir), _of_checkpoint(checkpoint_folder.encoder_config(iter_dir), config)
        )
        pairs = _with_checkpoint(source, other, config)
    else:
        assert hf_path is not None
        other = HFFolder(hf_path, trust_remote_code=trust_remote_code)
        pairs = _with_folder(source, other, config)
    compared, differences = _compare(pairs, source, progress)
    equal = compared - len(differences)
    if isinstance(other, HFFolder):
        differences += _missing(source, other)
    largest = None
    if (reason := _cannot_embed(source, other)) is not None:
        notes.append(f"embeddings not compared: {reason}")
    else:
        largest, scale = _compare_embeddings(source, other)
        if not largest <= EMBEDDING_TOLERANCE * scale:
            differences.append(Difference("embeddings", f"{len(SENTENCES)} texts", largest))
    return Verification(compared, equal, differences, largest, notes)


#: (name, the source's tensor, the other side's, in any dtype), read when its turn comes
Pair = tuple[str, Callable[[], Tensor], Callable[[], Tensor]]


def _compare(pairs: Iterator[Pair], source: HFFolder, progress: bool) -> tuple[int, list[Difference]]:
    count, differences = 0, []
    total = sum(source.nbytes(name) for name in source.names())
    with byte_bar("verify", total, enabled=progress) as advance:
        for name, left, right in pairs:
            a, b = left(), right()
            count += 1
            if (difference := _difference(name, a, b)) is not None:
                differences.append(difference)
            advance(a.nbytes)
    return count, differences


def _difference(name: str, a: Tensor, b: Tensor) -> Difference | None:
    if a.shape != b.shape:
        return Difference(name, f"shape {list(a.shape)} against {list(b.shape)}", float("inf"))
    rounded = a.to(b.dtype)
    if torch.equal(_bits(rounded), _bits(b)):
        return None
    largest = float((rounded.float() - b.float()).abs().nan_to_num(nan=float("inf")).max())
    return Difference(name, f"{list(a.shape)} {str(b.dtype).removeprefix('torch.')}", largest)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _of_checkpoint(stated: EncoderConfig | None, source: EncoderConfig) -> EncoderConfig:
    """The checkpoint's own config where its weights have the source's shapes; else the source's, which says why not."""
    if stated is None or list(mapping.weights(stated)) != list(mapping.weights(source)):
        return source
    return stated


def _with_checkpoint(source: HFFolder, weights: CheckpointWeights, config: EncoderConfig) -> Iterator[Pair]:
    def pairs() -> Iterator[Pair]:
        for weight in mapping.weights(config):
            parts = weights.hf_parts(weight)
            for name, part in zip(weight.hf, parts, strict=True):
                full = source.prefix + name
                yield full, lambda full=full: source.read(full), lambda part=part: part  # type: ignore[misc]
        for name in weights.kept():
            if name in source:
                yield name, lambda n=name: source.read(n), lambda n=name: weights.reader.read(KEPT + n)  # type: ignore[misc]

    return pairs()


def _with_folder(source: HFFolder, other: HFFolder, config: EncoderConfig) -> Iterator[Pair]:
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
        for name in source.names():  # beside the tower: what both have
            if name in other and name not in taken and not name.endswith(("_scale_inv", "activation_scale")):
                yield name, lambda n=name: source.read(n), lambda n=name: other.read(n)  # type: ignore[misc]

    return pairs()


def _missing(source: HFFolder, other: HFFolder) -> list[Difference]:
    """What a VLM has beside the language tower, another made from it must have too."""
    if not (is_vlm(source.config) and is_vlm(other.config)):
        return []
    towers = (source.prefix, other.prefix)
    return [
        Difference(name, f"missing in {other.path}", float("inf"))
        for name in source.names()
        if name not in other and not name.startswith(towers) and not name.endswith("rotary_emb.inv_freq")
    ]


# ---- embeddings


def _cannot_embed(source: HFFolder, other: HFFolder | CheckpointWeights) -> str | None:
    folders = [source, other] if isinstance(other, HFFolder) else [source]
    for folder in folders:
        if not has_tokenizer(folder.path):
            return f"{folder.path} has no tokenizer.json"
    config = source.encoder_config()
    held = sum(math.prod(weight.megatron_shape) for weight in mapping.weights(config))
    if held * torch.float32.itemsize > EMBEDDING_LIMIT:
        return f"more than {EMBEDDING_LIMIT >> 30} GiB in fp32"
    if not isinstance(other, HFFolder) and torch.distributed.is_initialized():
        return "this process is part of a parallel run"
    return None


def _compare_embeddings(source: HFFolder, other: HFFolder | CheckpointWeights) -> tuple[float, float]:
    """(largest difference, largest value). A source that is no embedder yet is pooled as the other side says."""
    ours = source.encoder_config()
    theirs = other.encoder_config() if isinstance(other, HFFolder) else other.config
    if source.config.get("pooling") is None and read_sentence_settings(source.path) is None:
        ours = ours.replace(pooling=theirs.pooling, normalize=theirs.normalize)
    found = hf_embedder(source, ours.replace(dtype=theirs.dtype))(SENTENCES)
    run = hf_embedder(other, theirs) if isinstance(other, HFFolder) else checkpoint_embedder(other, source.path)
    return float((found - run(SENTENCES)).abs().max()), float(found.abs().max())
