"""What lies where in a Megatron checkpoint, and how to look into it without running anybody's code.

``DIR/latest_checkpointed_iteration.txt`` names the newest ``DIR/iter_0000000/``, which holds megatron-core's files
(``.metadata``, ``*.distcp``, ``common.pt``, ``metadata.json``) and ours: ``run_config.yaml`` and ``hf/``, the source's
files beside the weights, so that export needs nothing that may have moved. ``checksums.json`` says what all of them
should be, see :mod:`megatron_embed.conversion.io.checksums`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.checkpoint.metadata import Metadata

from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.hf import declared_attention
from megatron_embed.conversion.hf.folder import read_json
from megatron_embed.conversion.hf.sentence_files import (
    SentenceSettings,
    default_settings,
    read_sentence_settings,
    with_the_recipes,
)
from megatron_embed.conversion.hf.sidecars import copy_files, sidecars
from megatron_embed.conversion.io.atomic import atomic_file
from megatron_embed.conversion.io.checksums import CHECKSUMS, Checksums, DamagedCheckpoint
from megatron_embed.conversion.megatron.safe_loading import load_common, safe_metadata

TRACKER, RUN_CONFIG, SIDECARS = "latest_checkpointed_iteration.txt", "run_config.yaml", "hf"


# ---- where things are


def iteration_folder(root: Path, iteration: int) -> Path:
    """``root/iter_0000100``."""
    return root / f"iter_{iteration:07d}"


def write_tracker(root: Path, iteration: int) -> None:
    """Make ``iteration`` the one that ``root`` stands for. Replaced in one step."""
    with atomic_file(root / TRACKER) as file:
        file.write(f"{iteration}\n".encode())


def resolve(path: str | os.PathLike[str]) -> Path:
    """The iteration folder that ``path`` means.

    Args:
        path: a checkpoint folder with a tracker, one of its ``iter_…`` folders, or a training run's ``save_dir``.

    Raises:
        UserError: none of these; says what was found.
        DamagedCheckpoint: a file is cut short, missing, or (but for the tensors, which are checked as they are read)
            not as it was written; names the newest sound checkpoint before it.
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
    if not (root / TRACKER).is_file() and (root / "checkpoints" / TRACKER).is_file():
        root = root / "checkpoints"
    if not (root / TRACKER).is_file():
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
    """Whether :func:`resolve` would find a checkpoint."""
    try:
        _locate(path)
    except UserError:
        return False
    return True


# ---- which of them are sound


def with_older(
    error: DamagedCheckpoint, iter_dir: Path, check: Callable[[Path], bool] | None = None
) -> DamagedCheckpoint:
    """The error, saying also which is the newest sound checkpoint before ``iter_dir``: all of its files are read.

    Args:
        iter_dir: the damaged one; a name without a number stands behind every other.
        check: in the place of :func:`is_sound`, such as one whose work several ranks share.
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
    """Whether a checkpoint's files, or the ``part``-th of ``parts`` shares of them, are all as they were written.

    Without checksums: whether they are all there, as long as ``.metadata`` says.
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
    """That the tensors' files of a checkpoint without checksums are as long as its metadata says.

    Raises:
        DamagedCheckpoint: one is shorter, or missing.
    """
    lengths: dict[str, int] = {}
    for info in (metadata.storage_data or {}).values():
        if (name := str(info.relative_path)) != Path(name).name:
            continue  # refused when it is to be read
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


# ---- what it says of itself


def write_run_config(iter_dir: Path, values: Mapping[str, Any]) -> None:
    """Write ``run_config.yaml``. Prompts keep their exact white space (YAML quotes them)."""
    text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
    (iter_dir / RUN_CONFIG).write_text(text, encoding="utf-8")


def read_run_config(iter_dir: Path) -> dict[str, Any]:
    """Contents of ``run_config.yaml``; empty where there is none (a checkpoint of another program).

    Raises:
        UserError: not valid YAML, or not sections.
    """
    path = iter_dir / RUN_CONFIG
    if not path.is_file():
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        # Megatron-Bridge tags Python classes in its run_config.yaml; nothing of it is needed here
        return {}
    return values if isinstance(values, dict) else {}


def encoder_config(iter_dir: Path) -> EncoderConfig | None:
    """The encoder of a checkpoint, from its ``run_config.yaml`` or else ``hf/config.json``; None: it does not say."""
    values = read_run_config(iter_dir).get("encoder")
    if isinstance(values, dict):
        try:
            return EncoderConfig.from_dict(values)
        except (UserError, TypeError) as error:
            raise UserError(f"{iter_dir / RUN_CONFIG}: encoder: {error}") from None
    if (iter_dir / SIDECARS / "config.json").is_file():
        return EncoderConfig.from_hf(iter_dir / SIDECARS)
    return None


def says_nothing(iter_dir: Path) -> bool:
    """Whether a checkpoint holds neither a ``run_config.yaml`` that can be read nor its source's files."""
    return not read_run_config(iter_dir) and not (iter_dir / SIDECARS).is_dir()


def sources(iter_dir: Path) -> list[Path]:
    """Folders that must outlive an export of a checkpoint: itself, and what it says it was made from.

    That is the model that it was imported from or trained on (of a hub id its folder in the cache), the checkpoint that
    its training started from, and what that one was made from.
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


def _folders(recorded: str) -> list[Path]:
    """What a recorded source may mean: a folder, a checkpoint's newest iteration, a hub id's folder in the cache."""
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
    """Sentence settings of a checkpoint's ``run_config.yaml``, defaults where it says nothing.

    One that was imported from a ready embedder before they were all kept there has them in the embedder's own files.

    Raises:
        UserError: a setting that is not known.
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
    longest = config.max_position_embeddings  # of which imports took no notice then
    lengths = {name: min(value, longest) for name, value in stated.items() if name.endswith("_length")}
    return replace(default_settings(config), **{**stated, **lengths})


def was_made_bidirectional(iter_dir: Path, *, bidirectional: bool, consent: str = declared_attention.CONSENT) -> bool:
    """Whether a checkpoint was made, as its ``run_config.yaml`` or the user says, of an embedder of causal attention.

    Args:
        bidirectional: whether the user says so.
        consent: how the user can say so.

    Raises:
        UserError: it was, by its source's files, and neither says so: an import from before it was asked. (What was
            trained since was trained bidirectionally.)
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
    """``common.pt`` and ``metadata.json``, without which dist_checkpointing sees no checkpoint."""
    torch.save({"iteration": iteration, "checkpoint_version": 3.0}, iter_dir / "common.pt")
    backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
    versions = {f"{key}_version": 1 for key in backends}
    (iter_dir / "metadata.json").write_text(json.dumps(backends | versions), encoding="utf-8")
