"""Encode a corpus into a folder of vectors over all data-parallel ranks; a run can stop at any moment and resume.

Shards hold a few thousand rows each, in the order of the input. The vectors of a shard depend on nothing outside it. In
each round every model replica takes one shard, sorts it by length, packs it by token budget and writes it. A rank holds
the vectors of one shard, never those of the corpus.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_embed.bridge.cpu import host
from megatron_embed.bridge.errors import UserError
from megatron_embed.bridge.ranks import on_first_rank
from megatron_embed.conversion.files.progress import progress as show
from megatron_embed.recipes.datasets.corpus import Corpus, Texts
from megatron_embed.recipes.datasets.odd_rows import report
from megatron_embed.recipes.datasets.tokenization import Kind
from megatron_embed.recipes.encoding.encoder import Encoder, encode_here, encode_sequences
from megatron_embed.recipes.retrieval.fingerprints import fingerprint
from megatron_embed.recipes.retrieval.vectors import (
    CALIBRATION,
    DTYPES,
    MANIFEST,
    Manifest,
    Shard,
    VectorFolder,
    fingerprint_differences,
    is_whole,
    plan_shards,
    quantize,
    write_array,
    write_file,
)
from megatron_embed.recipes.retrieval.writer_lock import LOCK, writing

_CALIBRATION_ROWS = 1024


def encode_texts(
    encoder: Encoder,
    texts: Texts,
    output: str | Path,
    *,
    kind: Kind = "passage",
    dim: int | None = None,
    precision: str = "float32",
    stamp: dict[str, Any] | None = None,
    progress: bool = False,
) -> VectorFolder:
    """Encode into ``output``, or continue where an earlier call stopped. Every rank must call this.

    Args:
        dim: keep the first ``dim`` numbers (Matryoshka), normalised again if the model normalises.
        precision: ``float32``, ``float16``, ``int8`` (256 steps over the range of each dimension, measured on up to
            1024 rows spread over the input), ``binary`` or ``ubinary`` (8 signs in a byte; the names are those of
            sentence-transformers).
        stamp: the :func:`fingerprint`, if already known.

    Raises:
        UserError: ``output`` holds other files, or vectors of another model, input or setting; the disk is full.
    """
    output = Path(output)
    hidden = encoder.config.hidden_size
    if precision not in DTYPES:
        raise UserError(f"precision: found {precision!r}; wanted one of {', '.join(DTYPES)}")
    if dim is not None and not 1 <= dim <= hidden:
        raise UserError(f"dim: found {dim}; wanted 1 to the model's hidden_size {hidden}")
    shards = plan_shards(len(texts), min(max(-(-len(texts) // 32), 256), 8192))
    stamp = stamp or on_first_rank(lambda: fingerprint(encoder, texts, kind, dim, precision))
    wanted = Manifest(stamp, len(texts), dim or hidden, precision, shards)
    found = on_first_rank(lambda: _found(output, wanted))
    if found is not None and found.complete and precision != "int8":  # with int8 the calibration may be missing
        return VectorFolder(output)  # nothing to write, so no lock: other runs may read it at the same time
    with writing(output, output / LOCK):
        manifest = on_first_rank(lambda: _open_output(output, wanted))
        job = _Job(encoder, texts, output, manifest, kind)
        if precision == "int8":
            job.calibrate()
        job.run(progress=progress)
    return VectorFolder(output)


def _open_output(output: Path, wanted: Manifest) -> Manifest:
    """Return the manifest to continue from; write a new one in a new folder. The caller holds the folder's lock."""
    found = _found(output, wanted)
    for partial in output.glob("*.partial"):  # left by a killed run
        partial.unlink()
    if found is None:
        wanted.write(output)
        return wanted
    return found


def _found(output: Path, wanted: Manifest) -> Manifest | None:
    """Return the folder's manifest, with incomplete shards marked as such, or None if it has none.

    Raises:
        UserError: the folder holds other vectors or other files.
    """
    found = Manifest.read(output)
    if found is None:
        names = sorted(p.name for p in output.iterdir()) if output.is_dir() else []
        strange = [name for name in names if not name.endswith(".partial") and name != LOCK]
        if strange or output.is_file():
            raise UserError(f"{output}: holds {', '.join(strange[:3]) or 'a file'}; wanted an empty folder")
        return None
    if found.fingerprint != wanted.fingerprint:
        raise UserError(
            f"{output / MANIFEST}: holds vectors of another model, input or setting: "
            f"{'; '.join(fingerprint_differences(found.fingerprint, wanted.fingerprint))}; give another folder"
        )
    shards = [replace(shard, complete=shard.complete and is_whole(output, found, shard)) for shard in found.shards]
    return replace(found, shards=shards)


class _Job:
    """The encoding of the missing shards, in rounds."""

    def __init__(self, encoder: Encoder, texts: Texts, output: Path, manifest: Manifest, kind: Kind) -> None:
        self.encoder, self.texts, self.output, self.manifest, self.kind = encoder, texts, output, manifest, kind
        self.ranges: np.ndarray | None = None
        # One rank of a model replica writes: the first rank of its last stage, which has the vectors.
        self.writes = (
            parallel_state.is_pipeline_last_stage(ignore_virtual=True)
            and parallel_state.get_tensor_model_parallel_rank() == 0
            and parallel_state.get_context_parallel_rank() == 0
        )

    def calibrate(self) -> None:
        """Measure the range of each dimension once, and keep it with the vectors."""
        path = self.output / CALIBRATION
        if on_first_rank(path.is_file):
            self.ranges = np.load(path, allow_pickle=False)
            return
        rows = np.unique(np.linspace(0, len(self.texts) - 1, _CALIBRATION_ROWS).astype(int)).tolist()
        sample = [self.texts.read(row, row + 1)[1][0] for row in rows]
        prompts = [prompt for row in rows for prompt in self.texts.prompts(row, row + 1) or ()]
        sequences = self.encoder.tokenizer.tokenize(sample, self.kind, prompts or None)
        vectors = encode_sequences(self.encoder.stages, self.encoder.plan, sequences, self.encoder.config.hidden_size)
        vectors = self._truncate(vectors)
        ranges = np.stack([vectors.min(0), vectors.max(0)]).astype(np.float32)
        on_first_rank(lambda: write_array(path, ranges))
        # Read the ranges from disk, so that every rank uses the same numbers, now and after a restart.
        self.ranges = np.load(path, allow_pickle=False)

    def run(self, *, progress: bool) -> None:
        """Encode the missing shards."""
        missing = [number for number, shard in enumerate(self.manifest.shards) if not shard.complete]
        rank, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        done = len(self.texts) - sum(self.manifest.shards[number].rows for number in missing)
        shown = progress and dist.get_rank() == 0
        with show("encoding", len(self.texts), done=done) if shown else nullcontext(lambda rows: None) as advance:
            for first in range(0, len(missing), replicas):
                together = missing[first : first + replicas]
                if rank < len(together):
                    self._encode(self.manifest.shards[together[rank]])
                # After this barrier every replica has written its shard. It also bounds how long a rank waits.
                dist.all_reduce(torch.zeros((), device=host.device()))
                self.manifest = self.manifest.with_complete(set(together))
                if dist.get_rank() == 0:
                    self.manifest.write(self.output)
                advance(sum(self.manifest.shards[number].rows for number in together))
        on_first_rank(lambda: None)  # a barrier: all ranks wait for the last manifest

    def _encode(self, shard: Shard) -> None:
        ids, texts = self.texts.read(shard.first, shard.first + shard.rows)
        prompts = self.texts.prompts(shard.first, shard.first + shard.rows)
        sequences = self.encoder.tokenizer.tokenize(texts, self.kind, prompts)
        vectors = encode_here(self.encoder.stages, self.encoder.plan, sequences, self.encoder.config.hidden_size)
        if not self.writes:
            return
        assert vectors is not None
        stored = quantize(self._truncate(vectors.cpu().numpy()), self.manifest.precision, self.ranges)
        write_array(self.output / shard.vectors, stored)
        text = json.dumps(ids, ensure_ascii=False)
        write_file(self.output / shard.ids, lambda file: file.write(text.encode()))

    def _truncate(self, vectors: np.ndarray) -> np.ndarray:
        dim = self.manifest.dim
        if dim == vectors.shape[1]:
            return vectors
        vectors = vectors[:, :dim]
        if not self.encoder.config.normalize:
            return vectors
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def report_oddities(texts: Corpus, *, strict: bool = False) -> None:
    """Read the whole corpus once on rank 0, and report rows that are usable but look odd.

    Raises:
        UserError: the corpus is wrong, or with ``strict`` it looks odd; raised on every rank.
    """
    on_first_rank(lambda: report([texts.odd], strict=strict))
