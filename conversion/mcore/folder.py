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
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.files.atomic import atomic_file
from megatron_embed.conversion.files.checksums import CHECKSUMS, Checksums, DamagedCheckpoint
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
            raise DamagedCheckpoint(f"{path}: no such file, but .metadata names it for tensors")
        if (found := path.stat().st_size) < wanted:
            raise DamagedCheckpoint(f"{path}: damaged: found {found:,} bytes, wanted at least {wanted:,}")


def _number(iter_dir: Path) -> int | None:
    match = re.fullmatch(r"iter_(\d+)", iter_dir.name)
    return int(match[1]) if match else None


# ---- megatron-core's own small files


def write_common(iter_dir: Path, iteration: int) -> None:
    """Write ``common.pt`` and ``metadata.json``, without which dist_checkpointing sees no checkpoint."""
    torch.save({"iteration": iteration, "checkpoint_version": 3.0}, iter_dir / "common.pt")
    backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
    versions = {f"{key}_version": 1 for key in backends}
    (iter_dir / "metadata.json").write_text(json.dumps(backends | versions), encoding="utf-8")
