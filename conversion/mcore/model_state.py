"""The distributed checkpoint of a model and its optimizer, through megatron-core's dist_checkpointing.

It does not depend on the layout: a state saved under one TP × PP × DP loads under any other.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from megatron_embed.bridge.encoder import EncoderStage
from megatron_embed.bridge.errors import UserError
from megatron_embed.bridge.liveness import is_broken_connection
from megatron_embed.bridge.ranks import gathered, on_every_rank, on_first_rank
from megatron_embed.conversion.files.checksums import Checksums, DamagedCheckpoint, write_checksums
from megatron_embed.conversion.files.disk_errors import explain_unwritten
from megatron_embed.conversion.mcore.folder import check_lengths, is_sound, iteration_folder, with_older
from megatron_embed.conversion.mcore.optimizer_forms import FormChange
from megatron_embed.conversion.mcore.optimizer_shards import own_values_only
from megatron_embed.conversion.mcore.param_groups import ask_for_saved_groups, take_groups
from megatron_embed.conversion.mcore.safe_loading import load_common, refuse_unsafe_loading, safe_metadata
from megatron_embed.conversion.mcore.tensor_writer import bytes_on_all_ranks, write_tensors

#: ending of an iteration folder while it is written
PARTIAL = ".partial"
#: key, beside the saved plain values: whether the optimizer has a parameter group that the checkpoint lacks
NEW_GROUPS = "new parameter groups"


def save_model_state(
    root: Path,
    iteration: int,
    encoders: list[EncoderStage],
    *,
    optimizer: Any = None,
    common: dict[str, Any] | None = None,
    finish: Callable[[Path], None] | None = None,
) -> Path:
    """Write ``root/iter_…`` from all ranks; the folder gets its name only when everything is on disk.

    Args:
        encoders: this rank's stages.
        optimizer: megatron-core's optimizer, whose state is saved too.
        common: plain values, the same on every rank.
        finish: function that rank 0 calls with the folder before it gets its name (sidecars, run_config.yaml).

    Returns:
        The iteration folder.

    Raises:
        UserError: the checkpoint could not be written (a full disk); earlier files stay as they were.
    """
    target = iteration_folder(root, iteration)
    partial = target.with_name(f".{target.name}{PARTIAL}")
    model = _sharded_model(encoders)
    state: dict[str, Any] = {**model, **(common or {}), "iteration": iteration, "checkpoint_version": 3.0}
    if optimizer is not None:
        _make_moments(optimizer)
        with own_values_only():
            state["optimizer"] = optimizer.sharded_state_dict(model, metadata=_metadata())
    needed = bytes_on_all_ranks(state)

    def prepare() -> None:
        for stale in root.glob(f".iter_*{PARTIAL}"):  # from a killed run
            _remove(stale)
        partial.mkdir(parents=True)

    def complete() -> None:
        if finish is not None:
            finish(partial)
        write_checksums(partial, sums)
        _remove(target)
        partial.rename(target)

    try:
        on_first_rank(prepare)
        with _quiet():
            sums = write_tensors(state, partial)
        on_first_rank(complete)
    except (Exception, CheckpointException) as error:  # CheckpointException is no Exception
        if is_broken_connection(error):
            raise
        if dist.get_rank() == 0:
            _remove(partial)
        reason = explain_unwritten(error, root, needed)
        if reason is None:
            raise
        raise UserError(f"{target}: {reason}; what was there before is as it was") from error
    return target


# ---- loading


def load_model_state(iter_dir: Path, encoders: list[EncoderStage], *, optimizer: Any = None) -> dict[str, Any]:
    """Fill the stages (and the optimizer) from an iteration folder that was written under any layout.

    The optimizer may be distributed where the saved one was not, and the other way round. Data are compared with the
    checkpoint's checksums first, if it has any. If loading fails, the stages' contents are undefined.

    Returns:
        The plain values that were saved beside the tensors and, with an optimizer, :data:`NEW_GROUPS`.

    Raises:
        UserError: the checkpoint lacks a tensor, has one of another shape, or holds more than plain data.
        DamagedCheckpoint: a file is not as it was written; raised on all ranks, whichever rank read it. The message
            names the newest sound checkpoint before it.
    """
    refuse_unsafe_loading()
    try:
        return _fill(iter_dir, encoders, optimizer)
    except DamagedCheckpoint as error:
        raise with_older(error, iter_dir, _is_sound_on_all_ranks) from None


def _fill(iter_dir: Path, encoders: list[EncoderStage], optimizer: Any) -> dict[str, Any]:
    checks, metadata = on_every_rank(lambda: _open_checked(iter_dir))
    model = _sharded_model(encoders)
    state: dict[str, Any] = dict(model)
    if optimizer is not None:
        with own_values_only():
            wanted = optimizer.sharded_state_dict(model, is_loading=True, metadata=_metadata())
        forms = FormChange(wanted, model, metadata.state_dict_metadata.keys())
        state["optimizer"] = forms.request
        groups = ask_for_saved_groups(state["optimizer"], load_common(iter_dir).get("optimizer", {}))
    loaded = _load(state, iter_dir, checks)
    for index, encoder in enumerate(encoders):
        name = f"model{index}" if len(encoders) > 1 else "model"
        encoder.load_state_dict(loaded.pop(name), strict=False)
    if optimizer is not None:
        loaded[NEW_GROUPS] = not take_groups(loaded["optimizer"], groups)
        main = _load({"main": forms.main}, iter_dir, checks)["main"] if forms.main else {}
        with own_values_only():
            optimizer.load_state_dict(forms.fit(loaded.pop("optimizer"), main))
    return loaded


def _load(state: dict[str, Any], iter_dir: Path, checks: Checksums | None) -> dict[str, Any]:
    """Load the tensors that ``state`` asks for, with the checkpoint's plain values."""
    slice_file = FileSystemReader._slice_file

    def checked(reader: Any, file: Any, info: Any) -> Any:
        if checks is not None:
            checks.check(info.relative_path, info.offset, info.offset + info.length)
        return slice_file(reader, file, info)

    checking = mock.patch.object(FileSystemReader, "_slice_file", checked)
    try:
        with mock.patch("torch.load", _load_plain), checking, _quiet():
            return dist_checkpointing.load(state, str(iter_dir), strict=StrictHandling.RAISE_UNEXPECTED)
    except (Exception, CheckpointException) as error:  # CheckpointException is no Exception
        error = _first(error)
        if isinstance(error, DamagedCheckpoint):
            raise error from None
        if is_broken_connection(error):
            raise
        raise UserError(f"{iter_dir}: cannot be loaded into this model ({_first_lines(error)})") from error


def _make_moments(optimizer: Any) -> None:
    """Create the moments, which no state has before its first update; with fp16 many updates may be skipped."""
    for each in optimizer.chained_optimizers:
        if not each.is_stub_optimizer and not each.optimizer.state:
            each.init_state_fn(each.optimizer, each.config)


def _open_checked(iter_dir: Path) -> tuple[Checksums | None, Metadata]:
    """Check everything that is read before the tensors, and the size of every file."""
    checks = Checksums.read(iter_dir)
    if checks is not None:
        checks.check_files()
    metadata = safe_metadata(iter_dir)  # checks this pickle before megatron-core unpickles it
    if checks is None:
        check_lengths(iter_dir, metadata)
    return checks, metadata


def _is_sound_on_all_ranks(iter_dir: Path) -> bool:
    """Return :func:`is_sound` for the whole checkpoint, of which each rank checks a share."""
    return all(gathered(is_sound(iter_dir, part=dist.get_rank(), parts=dist.get_world_size())))


def _quiet() -> warnings.catch_warnings[None]:
    """Silence FutureWarning: megatron-core uses deprecated parts of torch, which warn at every tensor."""
    return warnings.catch_warnings(action="ignore", category=FutureWarning)


_torch_load = torch.load


def _load_plain(*args: Any, **kwargs: Any) -> Any:
    """Load plain data only: megatron-core loads sharded objects with ``weights_only=False``, which runs any code."""
    return _torch_load(*args, **{**kwargs, "weights_only": True})


def _sharded_model(encoders: list[EncoderStage]) -> dict[str, Any]:
    """Return ``{"model": …}``, or ``{"model0": …, "model1": …}`` for interleaved stages: megatron-core's own names."""
    sharded = {}
    for index, encoder in enumerate(encoders):
        tensors = encoder.sharded_state_dict(metadata=_metadata())
        # Transformer Engine's per-layer state serves fp8, in which nothing is trained here; its bytes would be pickles.
        tensors = {name: value for name, value in tensors.items() if not name.endswith("_extra_state")}
        sharded[f"model{index}" if len(encoders) > 1 else "model"] = tensors
    return sharded


def _metadata() -> dict[str, Any]:
    return {
        # the only form of the distributed optimizer's state that loads under another TP, PP and DP
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _first(error: BaseException) -> BaseException:
    """Return the first of several ranks' errors."""
    if isinstance(error, CheckpointException) and error.failures:  # rank → (its exception, its traceback)
        return next(iter(error.failures.values()))[0]
    return error


def _first_lines(error: BaseException) -> str:
    return " ".join(str(error).split())[:600] or type(error).__name__


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
