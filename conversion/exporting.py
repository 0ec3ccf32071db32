"""Export of a Megatron checkpoint to an HF folder: a sentence-transformers embedder, or the whole VLM."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.files.atomic import atomic_output
from megatron_embed.conversion.files.casts import Casts, torch_option
from megatron_embed.conversion.files.json_files import read_json, write_json
from megatron_embed.conversion.files.progress import Converted
from megatron_embed.conversion.hf.declared_attention import made_bidirectional
from megatron_embed.conversion.hf.folder import HFFolder
from megatron_embed.conversion.hf.model_card import model_card
from megatron_embed.conversion.hf.safetensors_writer import parse_size, tower_specs, write_sharded
from megatron_embed.conversion.hf.sentence_files import (
    SentenceSettings,
    note_on_lengths,
    read_sentence_settings,
    write_sentence_files,
)
from megatron_embed.conversion.hf.sidecars import note_on_links, refuse_to_replace
from megatron_embed.conversion.hf.tokenizer_files import has_tokenizer, write_tokenizer
from megatron_embed.conversion.importing import TEMPERATURE, torch_dtype_of
from megatron_embed.conversion.mcore import folder as checkpoint_folder
from megatron_embed.conversion.mcore import statements
from megatron_embed.conversion.mcore.tensors import CheckpointReader
from megatron_embed.conversion.mcore.weights import CheckpointWeights
from megatron_embed.conversion.vlm import find_vlm_source, write_vlm

Target = Literal["embedder", "vlm"]
TARGETS: tuple[str, ...] = get_args(Target)


def export_hf(
    megatron_path: str | os.PathLike[str],
    hf_path: str | os.PathLike[str],
    *,
    hf_model: str | os.PathLike[str] | None = None,
    target: Target = "embedder",
    torch_dtype: str | None = None,
    max_shard_size: str = "5GB",
    bidirectional: bool = False,
    overwrite: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Converted:
    """Write a checkpoint's weights as a Hugging Face model, tensor by tensor.

    Args:
        megatron_path: a checkpoint folder, one of its ``iter_…`` folders, or a run's ``save_dir``.
        hf_path: the folder to make.
        hf_model: source of the tokenizer and (for ``vlm``) the other tensors; by default the source that the
            checkpoint names.
        target: ``embedder``: bare encoder plus sentence-transformers' files. ``vlm``: the source VLM with the encoder's
            weights in its language tower.
        torch_dtype: dtype of the written encoder; by default the source's. The default rounds a checkpoint that was
            trained in a wider dtype, and the notes say how much; any other rounding needs this argument.
        max_shard_size: such as ``5GB``.
        bidirectional: whether the checkpoint is of a ready embedder with causal attention that was taken as a base
            model; needed where the checkpoint itself does not say so.
        overwrite: replace an existing model folder, but never a source, the checkpoint, or a folder that holds one.

    Raises:
        UserError: bad input; nothing is left at ``hf_path``.
    """
    if target not in TARGETS:
        raise UserError(f"target {target!r} is not one of {', '.join(TARGETS)}")
    parse_size(max_shard_size)
    iter_dir = checkpoint_folder.resolve(megatron_path)
    source = HFFolder(hf_model, revision=revision, trust_remote_code=trust_remote_code) if hf_model else None
    made = statements.was_made_bidirectional(iter_dir, bidirectional=bidirectional)
    if source is not None:
        made |= made_bidirectional(source.path, source.config, bidirectional=bidirectional or made)
    config = _config(iter_dir, source)
    if torch_dtype is not None:
        torch_dtype_of(torch_dtype)
        config = config.replace(dtype=torch_dtype)
    trained = bool(statements.read_section(iter_dir, "train"))
    casts = Casts(iter_dir, rounding=torch_dtype is not None or trained, ask=torch_option)
    weights = CheckpointWeights(CheckpointReader(iter_dir), config)
    sources = [*statements.sources(iter_dir), *([source.path] if source else [])]
    if overwrite and statements.looks_like_source(Path(hf_path).expanduser(), iter_dir):
        sources.append(Path(hf_path))
    vlm = find_vlm_source(iter_dir, weights, source) if target == "vlm" else None
    notes = [*(source.notes if source else []), *(note_on_links(vlm.files) if vlm else [])]
    with atomic_output(hf_path, overwrite=overwrite, sources=sources, refuse=refuse_to_replace) as out:
        if vlm is not None:
            write_vlm(
                out, vlm, weights, casts, torch_dtype=torch_dtype, max_shard_size=max_shard_size, progress=progress
            )
        else:
            settings = _sentence_settings(iter_dir, config, source)
            notes += note_on_lengths(settings)
            _write_embedder(
                out, iter_dir, weights, casts, source, settings, made, max_shard_size=max_shard_size, progress=progress
            )
    return Converted(Path(hf_path), [*notes, *casts.notes(None if torch_dtype else weights.dtype)])


def _config(iter_dir: Path, source: HFFolder | None) -> EncoderConfig:
    """Return the checkpoint's own config, else the given folder's (a checkpoint of another program has none)."""
    config = statements.encoder_config(iter_dir)
    if config is None and source is None:
        raise UserError(f"{iter_dir}: does not say which model it is; give --hf-model, the folder it was made from")
    if source is None or config is None:
        return config if source is None else source.encoder_config()  # type: ignore[return-value]
    statements.refuse_another_model(source.encoder_config(), config, source.path)
    return config


# ---- embedder


def _sentence_settings(iter_dir: Path, config: EncoderConfig, source: HFFolder | None) -> SentenceSettings:
    """Return the checkpoint's own settings, else the given folder's (another program's checkpoint has none)."""
    stated = read_sentence_settings(source.path) if source and statements.says_nothing(iter_dir) else None
    return stated or statements.sentence_settings(iter_dir, config)


def _write_embedder(
    out: Path,
    iter_dir: Path,
    weights: CheckpointWeights,
    casts: Casts,
    source: HFFolder | None,
    settings: SentenceSettings,
    made: bool,
    *,
    max_shard_size: str,
    progress: bool,
) -> None:
    config = weights.config
    run = statements.read_run_config(iter_dir)
    if (learned := weights.temperature()) is not None:
        config = config.replace(temperature=learned)
    elif config.temperature is None:
        stated = (run.get("loss") or {}).get("temperature")
        config = config.replace(temperature=float(stated if stated is not None else TEMPERATURE))
    write_embedder_config(out, config)
    write_tokenizer(_tokenizer_folder(iter_dir, source, run), out, max_length=settings.text_max_length)
    write_sentence_files(out, config, settings)
    card = model_card(config, settings, run, iter_dir, made_bidirectional=made)
    (out / "README.md").write_text(card, encoding="utf-8")
    dtype = torch_dtype_of(config.dtype)
    values = weights.hf_values(dtype, casts)
    write_sharded(tower_specs(config, dtype), values, out, max_shard_size=max_shard_size, progress=progress)


def write_embedder_config(out: Path, config: EncoderConfig) -> None:
    """Write ``config.json`` of the stock model, with the keys that vLLM needs and transformers ignores.

    Without ``apply_yarn_scaling: false`` vLLM multiplies attention by YaRN's own factor, 1.277 here; without
    ``llama_4_scaling`` it omits the query scale.
    """
    config.to_hf().save_pretrained(out)
    raw = read_json(out / "config.json")
    if config.temperature is not None:  # transformers treats it as a generation setting and omits it
        raw["temperature"] = config.temperature
    rope = raw["rope_parameters"]
    if rope.get("rope_type") == "yarn":
        rope["apply_yarn_scaling"] = False
    if rope.get("llama_4_scaling_beta") is not None:
        raw["llama_4_scaling"] = {
            "beta": rope["llama_4_scaling_beta"],
            "original_max_position_embeddings": rope["original_max_position_embeddings"],
        }
    raw["rope_parameters"] = dict(sorted(rope.items()))
    write_json(out / "config.json", dict(sorted(raw.items())))


def _tokenizer_folder(iter_dir: Path, source: HFFolder | None, run: dict[str, Any]) -> Path:
    if source is not None:
        return source.path
    stored = iter_dir / checkpoint_folder.SIDECARS
    if has_tokenizer(stored):
        return stored
    recorded = (run.get("model") or {}).get("hf_model")
    if isinstance(recorded, str) and has_tokenizer(Path(recorded)):
        return Path(recorded)
    raise UserError(
        f"{iter_dir}: holds no tokenizer, nor is there one at {recorded or 'its recorded source'}; "
        f"give --hf-model a folder with a tokenizer.json"
    )
