"""What ``--overwrite`` may remove: an earlier conversion. A training run, or a folder with other files in it, stays."""

from __future__ import annotations

import json
import re
from pathlib import Path

from megatron_embed.bridge.errors import UserError

_TRACKER, _RUN_CONFIG = "latest_checkpointed_iteration.txt", "run_config.yaml"


def refuse_to_remove(target: Path) -> None:
    """Refuse to replace what is no earlier output: ``--overwrite`` removes a folder with all its contents.

    Raises:
        UserError: the target is a file or a link, belongs to a training run, or is no model or checkpoint.
    """
    if target.is_symlink() or not target.is_dir():
        raise UserError(f"{target}: is no folder, so --overwrite does not remove it; move it away")
    if why := _training_run(target):
        raise UserError(
            f"{target}: belongs to a training run ({why}), so --overwrite does not remove it; "
            f"give another output path, or move the run away"
        )
    checkpoint = any((target / mark).exists() for mark in (_TRACKER, ".metadata"))
    if not checkpoint and not _is_model(target):
        raise UserError(f"{target}: is no model or checkpoint folder, so --overwrite does not remove it; move it away")


def _is_model(target: Path) -> bool:
    """Return whether a folder has a model's ``config.json``, and ``modules.json`` or weights."""
    try:
        config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    named = isinstance(config, dict) and isinstance(config.get("model_type"), str)
    return named and ((target / "modules.json").is_file() or any(target.glob("*.safetensors")))


def _training_run(target: Path) -> str:
    """Return what shows that a folder is a run's, its ``checkpoints`` or one of these; empty where nothing does."""
    places = [target, *sorted(target.glob("iter_*")), *sorted(target.glob("checkpoints/iter_*"))]
    iterations = [path for path in places if re.fullmatch(r"iter_\d+", path.name)]
    for iteration in iterations:
        if int(iteration.name.removeprefix("iter_")) > 0:
            return f"{iteration.name} was written by training"
    for iteration in (target, *iterations):
        config = iteration / _RUN_CONFIG
        if config.is_file() and re.search(r"^train:", config.read_text(encoding="utf-8", errors="replace"), re.M):
            return f"{config} has a section train"
    checkpoints = target.name == "checkpoints" or bool(iterations) or (target / _TRACKER).exists()
    for run in (target, *([target.parent] if checkpoints else [])):
        if (run / _RUN_CONFIG).is_file() and (run / "metrics.jsonl").is_file():
            return f"{run} has {_RUN_CONFIG} and metrics.jsonl"
    return ""
