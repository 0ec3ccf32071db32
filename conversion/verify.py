"""Compare an HF folder with a Megatron checkpoint or with another HF folder: tensors, and embeddings of a few texts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron_embed.bridge import mapping
from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.errors import UserError
from megatron_embed.bridge.families import is_vlm
from megatron_embed.conversion import checkpoint_folder
from megatron_embed.conversion.checkpoint_weights import KEPT, CheckpointWeights
from megatron_embed.conversion.hf_folder import HFFolder
from megatron_embed.conversion.progress import byte_bar
from megatron_embed.conversion.tensor_stream import CheckpointReader

SENTENCES = (
    "query: how do plants turn light into sugar?",
    "passage: Photosynthesis stores the energy of light in the bonds of carbohydrates.",
    "passage: The railway between the two towns was opened in 1869.",
)
#: embeddings are compared where the model fits easily into any machine's memory
EMBEDDING_LIMIT = 2 << 30
#: fp32 on a CPU; the two sides run the same operations
EMBEDDING_TOLERANCE = 1e-5

#: texts → ``[texts, hidden]``, for comparing a checkpoint with its source
Embed = Callable[[Sequence[str]], Tensor]


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
    embed: tuple[Embed, Embed] | None = None,
) -> Verification:
    """Compare a source with what was made of it.

    Tensors are compared in the dtype of the other side: what a conversion with ``--torch-dtype`` rounds is rounded here
    too, and must then be the same bit for bit.

    Args:
        hf_model: the source, a folder or hub id.
        megatron_path, hf_path: the other side; exactly one of them.
        embed: how the two sides embed texts, for those who can run a checkpoint; two HF folders are run with
            transformers by themselves.

    Raises:
        UserError: one side cannot be read, or they are of different shapes.
    """
    if (megatron_path is None) == (hf_path is None):
        raise UserError("give either --megatron-path or --hf-path to compare with")
    source = HFFolder(hf_model, revision=revision, trust_remote_code=trust_remote_code)
    config = source.encoder_config()
    source.check(config)
    notes: list[str] = list(source.notes)
    if megatron_path is not None:
        pairs = _with_checkpoint(source, config, Path(megatron_path))
    else:
        assert hf_path is not None
        other = HFFolder(hf_path, trust_remote_code=trust_remote_code)
        pairs = _with_folder(source, other, config)
        if embed is None and (reason := _cannot_embed(source, other)) is None:
            embed = _embedder(source, config), _embedder(other, config)
        elif embed is None:
            notes.append(f"embeddings not compared: {reason}")
    compared, differences = _compare(pairs, source, progress)
    equal = compared - len(differences)
    if hf_path is not None:
        differences += _missing(source, other)
    largest = None
    if embed is not None:
        largest = float((embed[0](SENTENCES) - embed[1](SENTENCES)).abs().max())
        if not largest <= EMBEDDING_TOLERANCE:
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


def _with_checkpoint(source: HFFolder, config: EncoderConfig, path: Path) -> Iterator[Pair]:
    iter_dir = checkpoint_folder.resolve(path)
    weights = CheckpointWeights(CheckpointReader(iter_dir), config)

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


# ---- embeddings with transformers


def _cannot_embed(*folders: HFFolder) -> str | None:
    for folder in folders:
        if not (folder.path / "tokenizer.json").is_file():
            return f"{folder.path} has no tokenizer.json"
        if sum(folder.nbytes(name) for name in folder.names()) > EMBEDDING_LIMIT:
            return "larger than 2 GiB"
        if folder.quantized:
            return f"{folder.path} is quantised"
    return None


def _embedder(folder: HFFolder, config: EncoderConfig) -> Embed:
    """The folder's language tower made bidirectional, in fp32, pooled as the source's config says."""

    def embed(texts: Sequence[str]) -> Tensor:
        from transformers import AutoModel, PreTrainedTokenizerFast

        hf_config = config.to_hf()
        weights = {name: folder.read(folder.prefix + name) for w in mapping.weights(config) for name in w.hf}
        model = AutoModel.from_config(hf_config, dtype=torch.float32)
        model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, strict=True)
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder.path / "tokenizer.json"))
        rows = []
        with torch.no_grad():
            for text in texts:
                ids = torch.tensor([tokenizer(text)["input_ids"]])
                rows.append(_pool(model.eval()(input_ids=ids).last_hidden_state[0], config))
        return torch.stack(rows)

    return embed


def _pool(states: Tensor, config: EncoderConfig) -> Tensor:
    """``[tokens, hidden]`` of one text without padding → ``[hidden]``."""
    positions = torch.arange(1, len(states) + 1, dtype=states.dtype)[:, None]
    pooled = {
        "avg": lambda: states.mean(0),
        "cls": lambda: states[0],
        "last": lambda: states[-1],
        "weighted_avg": lambda: (states * positions).sum(0) / positions.sum(),
    }[config.pooling]()
    return torch.nn.functional.normalize(pooled, dim=0) if config.normalize else pooled
