"""Layout of a Megatron checkpoint, and ways to inspect it without running anybody's code.

``DIR/latest_checkpointed_iteration.txt`` names the newest ``DIR/iter_0000000/``, which holds megatron-core's files
(``.metadata``, ``*.distcp``, ``common.pt``, ``metadata.json``) and ours: ``run_config.yaml`` and ``hf/``, the source's
files beside the weights, so that export does not depend on files that may have moved. ``checksums.json`` holds the
checksums of all of them, see :mod:`megatron_embed.conversion.files.checksums`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.checkpoint.metadata import Metadata

from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.files.atomic import atomic_file
from megatron_embed.conversion.files.checksums import CHECKSUMS, Checksums, DamagedCheckpoint
from megatron_embed.conversion.hf import declared_attention
from megatron_embed.conversion.hf.folder import read_json
from megatron_embed.conversion.hf.model_card import is_export
from megatron_embed.conversion.hf.sentence_files import (
    SentenceSettings,
    default_settings,
    read_sentence_settings,
    with_the_recipes,
)
from megatron_embed.conversion.hf.sidecars import copy_files, sidecars
from megatron_embed.conversion.mcore.safe_loading import load_common, safe_metadata

TRACKER, RUN_CONFIG, SIDECARS = "latest_checkpointed_iteration.txt", "run_config.yaml", "hf"


# ---- locations


def iteration_folder(root: Path, iteration: int) -> Path:
    """Return ``root/iter_0000100`` for iteration 100."""
    return root / f"iter_{iteration:07d}"


def iterations(root: Path) -> list[int]:
    """Return the numbers of the ``iter_…`` folders of ``root`` that hold a checkpoint, in order."""
    folders = [path for path in root.glob("iter_*") if (path / ".metadata").is_file() or (path / CHECKSUMS).is_file()]
    return sorted(number for path in folders if (number := _number(path)) is not None)


def write_tracker(root: Path, iteration: int) -> None:
    """Make ``iteration`` the current one of ``root``, by an atomic replacement."""
    with atomic_file(root / TRACKER) as file:
        file.write(f"{iteration}\n".encode())


def resolve(path: str | os.PathLike[str]) -> Path:
    """Return the iteration folder that ``path`` means.

    Args:
        path: a checkpoint folder with a tracker, one of its ``iter_…`` folders, or a training run's ``save_dir``.

    Raises:
        UserError: ``path`` is none of these; the message says what was found.
        DamagedCheckpoint: a file is cut short, missing (the tracker too), or has other contents than were written
            (tensors are checked later, while they are read); the message names the newest sound checkpoint before it.
    """
    folder = _locate(path)
    try:
        checks = Checksums.read(folder)
        if checks is not None:
            checks.check_files()
    except DamagedCheckpoint as error:
        raise with_older(error, folder) from None
    return folder


def _locate(path: str | os.PathLike[str]) -> Path:
    root = Path(path).expanduser()
    if not root.is_dir():
        raise UserError(f"{path}: no such folder; wanted a Megatron checkpoint (a folder with {TRACKER})")
    if (root / ".metadata").is_file() or (root / CHECKSUMS).is_file():
        return root
    if not (root / TRACKER).is_file() and not iterations(root):
        inner = root / "checkpoints"
        root = inner if (inner / TRACKER).is_file() or iterations(inner) else root
    if not (root / TRACKER).is_file():
        numbers = iterations(root)
        if len(numbers) == 1 and (iteration_folder(root, numbers[0]) / ".metadata").is_file():
            # A checkpoint gets its name when it is complete, the tracker after that: a first save ended in between.
            return iteration_folder(root, numbers[0])
        if numbers:
            listed = ", ".join(iteration_folder(root, number).name for number in numbers[-6:])
            error = DamagedCheckpoint(
                f"{root}: no {TRACKER} in it (found {listed}); wanted the number of the newest complete iter_… folder "
                f"there: write {numbers[-1]} into {root / TRACKER}"
            )
            raise with_older(error, root / "iter_")
        found = ", ".join(sorted(p.name for p in root.iterdir())[:6]) or "nothing"
        raise UserError(
            f"{path}: not a Megatron checkpoint: no {TRACKER} in it (found {found}); "
            f"wanted a folder written by `import` or by training, or one of its iter_… folders"
        )
    text = (root / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
    if not text.isdecimal():
        error = DamagedCheckpoint(f"{root / TRACKER}: holds {text[:40]!r}, wanted an iteration number")
        raise with_older(error, root / "iter_")
    folder = iteration_folder(root, int(text))
    if not (folder / ".metadata").is_file() and not (folder / CHECKSUMS).is_file():
        error = DamagedCheckpoint(
            f"{root / TRACKER}: names iteration {text}, but {folder} holds no checkpoint (.metadata is missing); "
            f"write the number of a complete iter_… folder into the tracker"
        )
        raise with_older(error, folder)
    return folder


def has_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Return whether :func:`resolve` would find a checkpoint."""
    try:
        _locate(path)
    except UserError:
        return False
    return True


# ---- soundness


def with_older(
    error: DamagedCheckpoint, iter_dir: Path, check: Callable[[Path], bool] | None = None
) -> DamagedCheckpoint:
    """Return the error with the newest sound checkpoint before ``iter_dir`` in its message.

    All of that checkpoint's files are read.

    Args:
        iter_dir: the damaged checkpoint; a name without a number comes after all others.
        check: function in place of :func:`is_sound`, such as one that shares the work among ranks.
    """
    root, damaged = iter_dir.parent, _number(iter_dir)
    numbers = {number: path for path in root.glob("iter_*") if (number := _number(path)) is not None}
    older = [numbers[number] for number in sorted(numbers, reverse=True) if damaged is None or number < damaged]
    found = next(filter(check or is_sound, older), None)
    if found is None:
        advice = f"there is no sound checkpoint before it in {root}"
    else:
        advice = (
            f"the newest sound checkpoint before it is {found}; name that one, "
            f"or let the run go on from it with checkpoint.allow_fallback=true"
        )
    complete = DamagedCheckpoint(f"{error}; {advice}")
    complete.damage, complete.older = error.damage, found
    return complete


def is_sound(iter_dir: Path, *, part: int = 0, parts: int = 1) -> bool:
    """Return whether a checkpoint's files, or the ``part``-th of ``parts`` shares of them, are all as written.

    Without checksums, return whether all files exist with the lengths that ``.metadata`` states.
    """
    try:
        checks = Checksums.read(iter_dir)
        if checks is None:
            check_lengths(iter_dir, safe_metadata(iter_dir))
            load_common(iter_dir)
        else:
            checks.check_all(part=part, parts=parts)
    except UserError:
        return False
    return True


def check_lengths(iter_dir: Path, metadata: Metadata) -> None:
    """Check that the tensors' files of a checkpoint without checksums have the lengths that its metadata states.

    Raises:
        DamagedCheckpoint: a file is shorter, or missing.
    """
    lengths: dict[str, int] = {}
    for info in (metadata.storage_data or {}).values():
        if (name := str(info.relative_path)) != Path(name).name:
            continue  # the reader refuses it
        lengths[name] = max(lengths.get(name, 0), info.offset + info.length)
    for name, wanted in lengths.items():
        path = iter_dir / name
        if not path.is_file():
            raise DamagedCheckpoint(f"{path}: no such file, though tensors lie in it")
        if (found := path.stat().st_size) < wanted:
            raise DamagedCheckpoint(f"{path}: damaged: found {found:,} bytes, wanted at least {wanted:,}")


def _number(iter_dir: Path) -> int | None:
    match = re.fullmatch(r"iter_(\d+)", iter_dir.name)
    return int(match[1]) if match else None


# ---- the checkpoint's own statements


def write_run_config(iter_dir: Path, values: Mapping[str, Any]) -> None:
    """Write ``run_config.yaml``. Prompts keep their exact white space (YAML quotes them)."""
    text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
    (iter_dir / RUN_CONFIG).write_text(text, encoding="utf-8")


def read_run_config(iter_dir: Path) -> dict[str, Any]:
    """Return the contents of ``run_config.yaml``; empty where there is none (a checkpoint of another program).

    Raises:
        UserError: the file is not valid YAML, or does not consist of sections.
    """
    path = iter_dir / RUN_CONFIG
    if not path.is_file():
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        # Megatron-Bridge's run_config.yaml has tags for Python classes; none of it is needed here
        return {}
    return values if isinstance(values, dict) else {}


def encoder_config(iter_dir: Path) -> EncoderConfig | None:
    """Return a checkpoint's encoder, from ``run_config.yaml`` or else ``hf/config.json``; None if neither states it."""
    values = read_run_config(iter_dir).get("encoder")
    if isinstance(values, dict):
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
        run = read_run_config(folder)
        for section, key in (("model", "hf_model"), ("checkpoint", "pretrained_checkpoint"), ("checkpoint", "load")):
            value = run[section].get(key) if isinstance(run.get(section), dict) else None
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
    if recorded.count("/") > 1 or recorded.startswith((".", "/", "~")):
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
    run = read_run_config(iter_dir)
    kept, data = run.get("sentence"), run.get("data")
    if kept is None and "train" not in run and (ready := read_sentence_settings(iter_dir / SIDECARS)) is not None:
        return replace(ready, pooling=config.pooling, normalize=config.normalize)
    data = data if isinstance(data, dict) else {}
    names = ("query_prompt", "passage_prompt", "query_max_length", "passage_max_length")
    stated = {name: data[name] for name in names if data.get(name) is not None}
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
    run, sidecars = read_run_config(iter_dir), iter_dir / SIDECARS
    model = run.get("model")
    if isinstance(model, dict) and model.get("bidirectional") is True:
        return True
    config = read_json(sidecars / "config.json") if (sidecars / "config.json").is_file() else {}
    agreed = bidirectional or "train" in run
    return declared_attention.made_bidirectional(sidecars, config, bidirectional=agreed, consent=consent)


# ---- the files beside the weights


def write_sidecars(iter_dir: Path, hf_folder: Path) -> None:
    """Keep the model's own files beside its weights in ``iter_dir/hf``."""
    copy_files(sidecars(hf_folder), hf_folder, iter_dir / SIDECARS)


# ---- megatron-core's own small files


def write_common(iter_dir: Path, iteration: int) -> None:
    """Write ``common.pt`` and ``metadata.json``, without which dist_checkpointing sees no checkpoint."""
    torch.save({"iteration": iteration, "checkpoint_version": 3.0}, iter_dir / "common.pt")
    backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
    versions = {f"{key}_version": 1 for key in backends}
    (iter_dir / "metadata.json").write_text(json.dumps(backends | versions), encoding="utf-8")
