"""A checkpoint's statements about itself: ``run_config.yaml``, and the files of its source in ``hf/``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.files.json_files import read_json
from megatron_embed.conversion.hf import declared_attention
from megatron_embed.conversion.hf.hub import is_hub_id
from megatron_embed.conversion.hf.model_card import is_export
from megatron_embed.conversion.hf.sentence_files import (
    OF_THE_RECIPE,
    SentenceSettings,
    default_settings,
    read_sentence_settings,
    with_the_recipes,
)
from megatron_embed.conversion.hf.sidecars import copy_files, sidecars
from megatron_embed.conversion.mcore.folder import RUN_CONFIG, SIDECARS, TRACKER, has_checkpoint, resolve


def write_run_config(iter_dir: Path, values: Mapping[str, Any]) -> None:
    """Write ``run_config.yaml``. Prompts keep their exact white space (YAML quotes them)."""
    text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
    (iter_dir / RUN_CONFIG).write_text(text, encoding="utf-8")


def read_run_config(iter_dir: Path) -> dict[str, Any]:
    """Return the contents of ``run_config.yaml``; empty where there is none, or one of another program."""
    try:
        values = yaml.safe_load((iter_dir / RUN_CONFIG).read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, yaml.YAMLError, UnicodeDecodeError):
        # Megatron-Bridge's run_config.yaml has tags for Python classes; none of it is needed here
        return {}
    return values if isinstance(values, dict) else {}


def read_section(iter_dir: Path, name: str) -> dict[str, Any]:
    """Return one section of ``run_config.yaml``; empty where it is missing."""
    section = read_run_config(iter_dir).get(name)
    return section if isinstance(section, dict) else {}


def encoder_config(iter_dir: Path) -> EncoderConfig | None:
    """Return a checkpoint's encoder, from ``run_config.yaml`` or else ``hf/config.json``; None if neither states it."""
    if values := read_section(iter_dir, "encoder"):
        try:
            return EncoderConfig.from_dict(values)
        except (UserError, TypeError) as error:
            raise UserError(f"{iter_dir / RUN_CONFIG}: encoder: {error}") from None
    if (iter_dir / SIDECARS / "config.json").is_file():
        return EncoderConfig.from_hf(iter_dir / SIDECARS)
    return None


def refuse_another_model(theirs: EncoderConfig, own: EncoderConfig, where: str | os.PathLike[str]) -> None:
    """Refuse a model whose architecture is not that of a checkpoint; settings and the dtype may differ.

    Args:
        theirs: the model's config.
        own: the checkpoint's.
        where: the model, for the message.

    Raises:
        UserError: the message names the first field that differs.
    """
    free = ("dtype", "pooling", "normalize", "temperature", "tie_word_embeddings", "initializer_range")
    for field in fields(own):
        found, wanted = getattr(theirs, field.name), getattr(own, field.name)
        if field.name not in free and found != wanted:
            raise UserError(f"{where}: {field.name} is {found!r}, but the checkpoint's model has {wanted!r}")


def says_nothing(iter_dir: Path) -> bool:
    """Return whether a checkpoint has neither a readable ``run_config.yaml`` nor its source's files."""
    return not read_run_config(iter_dir) and not (iter_dir / SIDECARS).is_dir()


def sources(iter_dir: Path) -> list[Path]:
    """Return the folders that must outlive an export of a checkpoint: itself, and those from which it was made.

    The latter are the model from which it was imported or trained (for a hub id its folder in the cache), the
    checkpoint from which its training started, and the sources of that checkpoint.
    """
    found: list[Path] = []
    waiting = [iter_dir]
    while waiting:
        folder = waiting.pop()
        if folder in found:
            continue
        found.append(folder)
        if not (folder / ".metadata").is_file():
            continue
        if (folder.parent / TRACKER).is_file():
            found.append(folder.parent)
        for section, key in (("model", "hf_model"), ("checkpoint", "pretrained_checkpoint"), ("checkpoint", "load")):
            value = read_section(folder, section).get(key)
            if isinstance(value, str) and value:
                waiting += _folders(value)
    return found


def looks_like_source(folder: Path, iter_dir: Path) -> bool:
    """Return whether a model folder seems to be the one that a checkpoint was made from, moved with the checkpoint.

    It lies from a training run where the recorded source lay from it, while that is gone. Or it is none of our exports,
    and has the recorded source's name where that is gone, or the files that the checkpoint keeps of it.
    """
    if not (folder / "config.json").is_file():
        return False
    run = read_run_config(iter_dir)
    model = run.get("model")
    recorded = model.get("hf_model") if isinstance(model, dict) else None
    gone = recorded if isinstance(recorded, str) and not Path(recorded).exists() else None
    if gone is not None and _moved_with(run, iter_dir, gone) == folder.resolve():
        return True
    if is_export(folder):
        return False
    kept = iter_dir / SIDECARS
    return (gone is not None and Path(gone).name == folder.name) or all(
        (kept / name).is_file()
        and (folder / name).is_file()
        and (kept / name).read_bytes() == (folder / name).read_bytes()
        for name in ("config.json", "tokenizer.json")
    )


def _moved_with(run: Mapping[str, Any], iter_dir: Path, recorded: str) -> Path | None:
    """Return where a training run's source is if it moved together with the run's folder."""
    train, directory = run.get("train"), run.get("directory")
    save_dir = train.get("save_dir") if isinstance(train, dict) else None
    if not isinstance(save_dir, str) or not isinstance(directory, str) or not os.path.isabs(recorded):
        return None
    way = os.path.relpath(recorded, os.path.realpath(Path(directory, save_dir).expanduser()))
    return (iter_dir.resolve().parent.parent / way).resolve()


def _folders(recorded: str) -> list[Path]:
    """Return the possible folders of a recorded source: a folder, a checkpoint's newest iteration, a hub cache's."""
    path = Path(recorded).expanduser()
    if has_checkpoint(path):
        return [resolve(path).resolve()]
    if path.is_dir():
        return [path.resolve()]
    if not is_hub_id(recorded):
        return []
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return [Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=recorded, repo_type="model")]


def sentence_settings(iter_dir: Path, config: EncoderConfig) -> SentenceSettings:
    """Return the sentence settings of a checkpoint's ``run_config.yaml``, with defaults for those that it lacks.

    An older import of a ready embedder does not keep all settings there; it has them in the embedder's own files.

    Raises:
        UserError: a setting is not known.
    """
    run, data = read_run_config(iter_dir), read_section(iter_dir, "data")
    kept = run.get("sentence")
    if kept is None and "train" not in run and (ready := read_sentence_settings(iter_dir / SIDECARS)) is not None:
        return replace(ready, pooling=config.pooling, normalize=config.normalize)
    stated = {name: data[name] for name in OF_THE_RECIPE if data.get(name) is not None}
    if isinstance(kept, dict):
        return with_the_recipes(kept, replace(default_settings(config), **stated), str(iter_dir / RUN_CONFIG))
    longest = config.max_position_embeddings  # imports ignored it at that time
    lengths = {name: min(value, longest) for name, value in stated.items() if name.endswith("_length")}
    return replace(default_settings(config), **{**stated, **lengths})


def was_made_bidirectional(iter_dir: Path, *, bidirectional: bool, consent: str = declared_attention.CONSENT) -> bool:
    """Return whether a checkpoint was made from an embedder with causal attention, by its own or the user's word.

    Args:
        bidirectional: whether the user says so.
        consent: the way in which the user can say so.

    Raises:
        UserError: its source's files show that it was, but neither ``run_config.yaml`` nor the user says so. This is an
            import from before consent was needed. (A model trained since then was trained bidirectionally.)
    """
    if read_section(iter_dir, "model").get("bidirectional") is True:
        return True
    files = iter_dir / SIDECARS
    config = read_json(files / "config.json", optional=True)
    agreed = bidirectional or "train" in read_run_config(iter_dir)
    return declared_attention.made_bidirectional(files, config, bidirectional=agreed, consent=consent)


def write_sidecars(iter_dir: Path, hf_folder: Path) -> None:
    """Keep the model's own files beside its weights in ``iter_dir/hf``."""
    copy_files(sidecars(hf_folder), hf_folder, iter_dir / SIDECARS)
