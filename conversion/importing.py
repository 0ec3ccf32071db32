"""Import of an HF folder into a Megatron checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.errors import UserError, some
from megatron_embed.bridge.families import is_vlm
from megatron_embed.bridge.layout import Layout, check_layout
from megatron_embed.conversion.files.atomic import atomic_output
from megatron_embed.conversion.files.casts import Casts, torch_option
from megatron_embed.conversion.files.checksums import write_checksums
from megatron_embed.conversion.files.progress import Converted
from megatron_embed.conversion.hf.declared_attention import made_bidirectional
from megatron_embed.conversion.hf.folder import HFFolder
from megatron_embed.conversion.hf.sentence_files import (
    OF_THE_RECIPE,
    beside_the_recipe,
    default_settings,
    read_sentence_settings,
)
from megatron_embed.conversion.hf.sidecars import note_on_links, others, refuse_to_replace
from megatron_embed.conversion.hf.stored_tensors import FP8_SCALES
from megatron_embed.conversion.hf.tokenizer_files import has_tokenizer
from megatron_embed.conversion.mcore import folder as checkpoint_folder
from megatron_embed.conversion.mcore import statements
from megatron_embed.conversion.mcore.tensors import write_chunks
from megatron_embed.conversion.mcore.weights import chunks, kept_chunks

TEMPERATURE = 0.02


def import_hf(
    hf_model: str | os.PathLike[str],
    megatron_path: str | os.PathLike[str],
    *,
    torch_dtype: str | None = None,
    tp: int = 1,
    pp: int = 1,
    with_vision: bool = False,
    bidirectional: bool = False,
    overwrite: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Converted:
    """Write a Megatron checkpoint of a Hugging Face model, tensor by tensor.

    Args:
        hf_model: local folder or hub id of the VLM, the text model, or a ready embedder.
        megatron_path: the checkpoint folder to make.
        torch_dtype: dtype of the stored weights; by default the source's (FP8 counts as bfloat16). The default refuses
            to round the source's values; an explicit dtype may round, and the notes say how much.
        tp, pp: sizes by which the tensors are cut into chunks and files; any other layout can load them as well.
        with_vision: keep the other tensors of a VLM too, so that the checkpoint alone can become a VLM again.
        bidirectional: take a ready embedder with causal attention as a base model, for bidirectional training.
        overwrite: replace an existing checkpoint, but never one that is the source, holds it or lies in it.

    Returns:
        The checkpoint folder, and notes on tensors that were left out or rounded.

    Raises:
        UserError: bad input; nothing is left at ``megatron_path``.
    """
    folder = HFFolder(hf_model, revision=revision, trust_remote_code=trust_remote_code)
    made = made_bidirectional(folder.path, folder.config, bidirectional=bidirectional)
    config = folder.encoder_config()
    if torch_dtype is not None:
        config = config.replace(dtype=torch_dtype)
    check_layout(config, Layout(tp=tp, pp=pp))
    folder.check(config)
    ignored = folder.ignored(config)
    kept = _to_keep(folder, config, ignored) if with_vision else []
    casts = Casts(folder.path, rounding=torch_dtype is not None, ask=torch_option)
    with atomic_output(megatron_path, overwrite=overwrite, sources=[folder.path], refuse=refuse_to_replace) as out:
        iter_dir = checkpoint_folder.iteration_folder(out, 0)
        iter_dir.mkdir()
        encoder = chunks(folder, config, dtype=torch_dtype_of(config.dtype), tp=tp, pp=pp, casts=casts)
        pieces = [*encoder, *kept_chunks(folder, kept)]
        sums = write_chunks(iter_dir, pieces, progress=progress)
        statements.write_sidecars(iter_dir, folder.path)
        checkpoint_folder.write_common(iter_dir, 0)
        statements.write_run_config(iter_dir, _run_config(folder, config, made, tp=tp, pp=pp))
        write_checksums(iter_dir, sums)
        checkpoint_folder.write_tracker(out, 0)
    left_out = counted_by_reason({name: reason for name, reason in ignored.items() if name not in kept})
    notes = [
        *folder.notes,
        *left_out,
        *_files_left(folder.path),
        *note_on_links(folder.path),
        *_dequantized(folder),
        *casts.notes(),
    ]
    if not has_tokenizer(folder.path):
        notes.append(
            f"no tokenizer.json in {folder.path}: the weights are whole, but training, encoding and export need one; "
            f"put the model's own there and import again"
        )
    return Converted(Path(megatron_path), notes)


def torch_dtype_of(name: str) -> torch.dtype:
    """Return torch's dtype by name: ``"bfloat16"`` → ``torch.bfloat16``.

    Raises:
        UserError: weights are not stored in this dtype.
    """
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
    if name not in known:
        raise UserError(f"dtype {name!r} is not one of {', '.join(known)}")
    return known[name]


def counted_by_reason(ignored: dict[str, str]) -> list[str]:
    """Return one line per reason, with the number of tensors, such as ``11 tensor(s) left out: the …``."""
    counts: dict[str, int] = {}
    for reason in ignored.values():
        counts[reason] = counts.get(reason, 0) + 1
    return [f"{count} tensor(s) left out: {reason}" for reason, count in counts.items()]


def _files_left(folder: Path) -> list[str]:
    if not (names := others(folder)):
        return []
    return [f"beside the weights left out, no files of a model by their names: {some(names, 6)}"]


def _dequantized(folder: HFFolder) -> list[str]:
    count = sum(folder.is_fp8(name) for name in folder.names())
    return [f"{count} FP8 weights became bfloat16: fp8 · scale, rounded once"] if count else []


def _to_keep(folder: HFFolder, config: EncoderConfig, ignored: dict[str, str]) -> list[str]:
    """Return the tensors beside a VLM's language tower, but not a tied lm_head: it is the embedding."""
    if not is_vlm(folder.config):
        raise UserError(f"{folder.path}: --with-vision: the source is {folder.architecture}, which has no vision tower")
    tied_head = [name for name in ignored if name.endswith("lm_head.weight")] if config.tie_word_embeddings else []
    return [name for name in ignored if not name.endswith(FP8_SCALES) and name not in tied_head]


def _run_config(folder: HFFolder, config: EncoderConfig, made: bool, *, tp: int, pp: int) -> dict[str, Any]:
    settings = read_sentence_settings(folder.path) or default_settings(config)
    local = Path(folder.source).expanduser().is_dir()
    return {
        "model": {
            "hf_model": str(folder.path.resolve()) if local else folder.source,
            "revision": folder.revision,
            "hf_prefix": folder.prefix,
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "pooling": config.pooling,
            "normalize": config.normalize,
            "torch_dtype": config.dtype,
            "bidirectional": made,
        },
        "data": {name: getattr(settings, name) for name in OF_THE_RECIPE},
        "sentence": beside_the_recipe(settings),
        "loss": {"temperature": config.temperature if config.temperature is not None else TEMPERATURE},
        "encoder": config.to_dict(),
    }
