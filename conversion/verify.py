"""Comparison of a source with a Megatron checkpoint or HF folder made from it: configs, files, tensors, embeddings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_embed.bridge import mapping
from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.errors import UserError
from megatron_embed.bridge.families import is_vlm
from megatron_embed.bridge.mapping import Weight
from megatron_embed.conversion.compare.configs import (
    compare_attention,
    compare_configs,
    compare_encoders,
    compare_processors,
    compare_stated_dtype,
    stated_causality,
)
from megatron_embed.conversion.compare.differences import ComparedSection, Difference
from megatron_embed.conversion.compare.embeddings import (
    SENTENCES,
    checkpoint_layers,
    compare_layers,
    hf_layers,
    token_ids,
)
from megatron_embed.conversion.compare.settings import compare_folder_settings, compare_settings
from megatron_embed.conversion.compare.tensors import (
    Pair,
    compare_tensors,
    missing_tensors,
    with_checkpoint,
    with_folder,
)
from megatron_embed.conversion.compare.tokenizers import compare_tokenizers, reads_control_tokens
from megatron_embed.conversion.files.checksums import DamagedCheckpoint
from megatron_embed.conversion.files.json_files import read_json
from megatron_embed.conversion.files.progress import byte_bar
from megatron_embed.conversion.hf.declared_attention import declares_causal
from megatron_embed.conversion.hf.folder import HFFolder
from megatron_embed.conversion.hf.sentence_files import read_sentence_settings
from megatron_embed.conversion.hf.tokenizer_files import has_tokenizer
from megatron_embed.conversion.mcore import folder as checkpoint_folder
from megatron_embed.conversion.mcore import statements
from megatron_embed.conversion.mcore.tensors import CheckpointReader
from megatron_embed.conversion.mcore.weights import CheckpointWeights

#: Relative to the largest value. Both sides compute in fp32, and rounding grows with depth: 3e-6 at 26 layers. A change
#: of the function changes vectors by far more, or is in a key that is compared by itself.
EMBEDDING_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Verification:
    """The outcome of a comparison; it is true if nothing differs."""

    sections: list[ComparedSection]
    #: things that were not compared, or were compared in an unexpected way
    notes: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return not self.differences

    @property
    def differences(self) -> list[Difference]:
        """Return all differences, in the order of the sections."""
        return [difference for section in self.sections for difference in section.differences]

    def section(self, name: str) -> ComparedSection | None:
        """Return the section of this name, or None if it was not compared."""
        return next((section for section in self.sections if section.name == name), None)

    @property
    def embeddings(self) -> float | None:
        """Return the largest difference of the embeddings, or None if not compared; ``notes`` then says why."""
        return embeddings.largest if (embeddings := self.section("embeddings")) else None


def verify(
    hf_model: str | os.PathLike[str],
    *,
    megatron_path: str | os.PathLike[str] | None = None,
    hf_path: str | os.PathLike[str] | None = None,
    bidirectional: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Verification:
    """Compare a source with the output of a conversion.

    Configs, ``is_causal``, sentence settings, tokenizer and processor are compared key by key. Tensors are compared in
    the dtype of the other side: values that a conversion with ``--torch-dtype`` rounds are rounded here too, and must
    then be the same bit for bit. Then both sides embed a few texts, layer by layer for any model size: folders with
    transformers, checkpoints with the Megatron encoder in this process.

    Args:
        hf_model: the source, a folder or hub id.
        megatron_path, hf_path: the other side; exactly one of them.
        bidirectional: whether the source is a ready embedder with causal attention that was taken as a base model;
            needed where the other side does not say so itself.

    Raises:
        UserError: one side cannot be read, or the shapes differ although the configs are the same.
    """
    if (megatron_path is None) == (hf_path is None):
        raise UserError("give either --megatron-path or --hf-path to compare with")
    source = HFFolder(hf_model, revision=revision, trust_remote_code=trust_remote_code)
    config = source.encoder_config()
    source.check(config)
    notes: list[str] = list(source.notes)
    other: HFFolder | Path
    if megatron_path is not None:
        other = checkpoint_folder.resolve(megatron_path)
        bidirectional = bidirectional or statements.read_section(other, "model").get("bidirectional") is True
    else:
        assert hf_path is not None
        other = HFFolder(hf_path, trust_remote_code=trust_remote_code)
    causal = declares_causal(source.path, source.config) is not None
    if causal and bidirectional:
        causal = False
        notes.append("the source is an embedder with causal attention, taken as a base model: both sides bidirectional")
    if isinstance(other, HFFolder):
        sections = _folder_files(source, other, config, notes, causal=causal)
    else:
        sections = _checkpoint_files(source, other, config, notes, causal=causal)
    try:
        opened, pairs = _open(source, other, config)
    except DamagedCheckpoint:
        raise
    except UserError as error:
        if not any(section.differences for section in sections):
            raise
        return Verification(sections, [*notes, f"tensors and embeddings not compared: {error}"])
    missing = missing_tensors(source, opened) if isinstance(opened, HFFolder) else []
    tensors, rounded = compare_tensors(pairs, source, missing, progress=progress)
    sections.append(tensors)
    notes += rounded
    if not isinstance(opened, HFFolder) and torch.distributed.is_initialized():
        notes.append("embeddings not compared: this process is part of a parallel run")
    else:
        sections.append(_embeddings(source, opened, config, causal=causal, progress=progress))
    return Verification(sections, notes)


# ---- files


def _folder_files(
    source: HFFolder, other: HFFolder, config: EncoderConfig, notes: list[str], *, causal: bool
) -> list[ComparedSection]:
    """Compare an export's files with its source's."""
    vlm = is_vlm(other.config)
    key = "config.json: text_config.is_causal" if vlm else "config.json: is_causal"
    sections = [
        compare_configs(other.config, source.config, where="config.json"),
        compare_stated_dtype(other),
        compare_attention(stated_causality(other.config), causal=causal, where=key),
    ]
    if not vlm:
        sections.append(compare_folder_settings(other, source, config))
    sections += _tokenizer(source, other.path, notes)
    if vlm and is_vlm(source.config):
        sections += compare_processors(other.path, source.path)
    return sections


def _checkpoint_files(
    source: HFFolder, iter_dir: Path, config: EncoderConfig, notes: list[str], *, causal: bool
) -> list[ComparedSection]:
    """Compare a checkpoint's config and settings, and the files that it keeps for exports, with its source's."""
    sidecars = iter_dir / checkpoint_folder.SIDECARS
    sections = []
    if (stated := statements.encoder_config(iter_dir)) is None:
        notes.append(f"config not compared: {iter_dir} does not say which model it is")
    else:
        sections.append(compare_encoders(stated, source.config, where=f"{checkpoint_folder.RUN_CONFIG}: encoder"))
    kept = read_json(sidecars / "config.json", optional=True)
    if kept:
        before = sections.pop() if sections else ComparedSection("config", 0)
        where = f"{checkpoint_folder.SIDECARS}/config.json"
        sections.append(before + compare_configs(kept, source.config, where=where))
    # a checkpoint's encoder is bidirectional, whatever was imported
    sections.append(compare_attention(False, causal=causal, where="the encoder's attention, is_causal"))
    settings = statements.sentence_settings(iter_dir, stated or config)
    sections.append(compare_settings(settings, source, config, where=f"{checkpoint_folder.RUN_CONFIG}: data"))
    sections += _tokenizer(source, sidecars, notes)
    if is_vlm(kept) and is_vlm(source.config):
        sections += compare_processors(sidecars, source.path)
    return sections


def _tokenizer(source: HFFolder, other: Path, notes: list[str]) -> list[ComparedSection]:
    if not has_tokenizer(source.path):
        notes.append(f"tokenizer not compared: {source.path} has no tokenizer.json")
        return []
    if reads_control_tokens(source.path):
        notes.append(
            "control tokens inside a text, such as [INST], stay text in what is made of this embedder; "
            "its own tokenizer reads them as control tokens"
        )
    return [compare_tokenizers(other, source.path)]


# ---- tensors and embeddings


def _open(
    source: HFFolder, other: HFFolder | Path, config: EncoderConfig
) -> tuple[HFFolder | CheckpointWeights, Iterator[Pair]]:
    if isinstance(other, HFFolder):
        return other, with_folder(source, other, config)
    stated = statements.encoder_config(other)
    weights = CheckpointWeights(CheckpointReader(other), _of_checkpoint(stated, config))
    return weights, with_checkpoint(source, weights, config)


def _of_checkpoint(stated: EncoderConfig | None, source: EncoderConfig) -> EncoderConfig:
    """Return the checkpoint's config if its weights have the source's shapes; else the source's, for its errors."""
    if stated is None or list(mapping.weights(stated)) != list(mapping.weights(source)):
        return source
    return stated


def _embeddings(
    source: HFFolder, other: HFFolder | CheckpointWeights, config: EncoderConfig, *, causal: bool, progress: bool
) -> ComparedSection:
    """Embed the same token ids on both sides; pool a source that is no embedder yet as the other side states."""
    theirs = other.encoder_config() if isinstance(other, HFFolder) else other.config
    if source.config.get("pooling") is None and read_sentence_settings(source.path) is None:
        config = config.replace(pooling=theirs.pooling, normalize=theirs.normalize)
    ids = token_ids(source.path, SENTENCES, config)
    if isinstance(other, HFFolder):
        found = hf_layers(other, theirs, ids, causal=stated_causality(other.config) is not False)
    else:
        found = checkpoint_layers(other, ids)

    def stored(weight: Weight, name: str) -> torch.dtype:
        return other.tensor_dtype(other.prefix + name) if isinstance(other, HFFolder) else other.stored_dtype(weight)

    wanted = hf_layers(source, config, ids, causal=causal, dtype_of=stored)
    layers = config.num_hidden_layers
    with byte_bar("embed", layers, unit=" layers", enabled=progress) as advance:
        apart = compare_layers(found, wanted, tolerance=EMBEDDING_TOLERANCE, on_layer=lambda: advance(1))
    limit, largest = EMBEDDING_TOLERANCE * apart.scale, max(apart.texts)
    if largest <= limit:
        return ComparedSection("embeddings", len(ids), largest=largest)
    text = f"up to {largest:g} apart; the two sides part at layer {apart.layer} of {layers}"
    difference = Difference("embeddings", text, f"at most {limit:.1g} apart", largest)
    unequal = sum(not distance <= limit for distance in apart.texts)
    return ComparedSection("embeddings", len(ids), [difference], largest, unequal)
