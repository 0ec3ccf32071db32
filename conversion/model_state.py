"""A model's (and its optimizer's) distributed checkpoint, through megatron-core's dist_checkpointing.

Layout-free: what was saved under one TP × PP × DP loads under any other.
"""

from __future__ import annotations

import queue
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from megatron_embed.bridge.encoder import Encoder
from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.checkpoint_folder import (
    iteration_folder,
    load_common,
    refuse_unsafe_loading,
    safe_metadata,
)
from megatron_embed.conversion.optimizer_forms import FormChange
from megatron_embed.conversion.param_groups import ask_for_saved_groups, take_groups

#: iteration folder while it is being written
PARTIAL = ".partial"
#: whether the optimizer has a parameter group that the checkpoint lacks; beside the plain values that were saved
NEW_GROUPS = "new parameter groups"


def save_model_state(
    root: Path,
    iteration: int,
    encoders: list[Encoder],
    *,
    optimizer: Any = None,
    common: dict[str, Any] | None = None,
    finish: Callable[[Path], None] | None = None,
) -> Path:
    """Write ``root/iter_…`` from all ranks; the folder gets its name only when everything is on disk.

    Args:
        encoders: this rank's stages.
        optimizer: megatron-core's; its state is saved too.
        common: plain values, the same on every rank.
        finish: called on rank 0 with the folder before it gets its name (sidecars, run_config.yaml).

    Returns:
        The iteration folder.
    """
    target = iteration_folder(root, iteration)
    partial = target.with_name(f".{target.name}{PARTIAL}")
    first = dist.get_rank() == 0
    if first:
        _remove(partial)
        partial.mkdir(parents=True)
    dist.barrier()
    model = _sharded_model(encoders)
    state: dict[str, Any] = {**model, **(common or {}), "iteration": iteration, "checkpoint_version": 3.0}
    if optimizer is not None:
        _make_moments(optimizer)
        state["optimizer"] = optimizer.sharded_state_dict(model, metadata=_metadata())
    # Results of a synchronous save stay in this process. The default is a manager process that imports the main module
    # again (so scripts without a `__main__` guard fail) and that outlives a run which is killed.
    filesystem_async._results_queue = queue.Queue()
    with _quiet():
        dist_checkpointing.save(state, str(partial))
    dist.barrier()
    if first:
        if finish is not None:
            finish(partial)
        _remove(target)
        partial.rename(target)
    dist.barrier()
    return target


def load_model_state(iter_dir: Path, encoders: list[Encoder], *, optimizer: Any = None) -> dict[str, Any]:
    """Fill the stages (and the optimizer) from an iteration folder, whatever layout it was written under.

    The optimizer may be distributed where the one that was saved was not, and the other way round.

    Returns:
        The plain values that were saved beside the tensors and, with an optimizer, :data:`NEW_GROUPS`.

    Raises:
        UserError: the checkpoint lacks a tensor, has one of another shape, or carries what is not plain data.
    """
    refuse_unsafe_loading()
    metadata = safe_metadata(iter_dir)  # it is a pickle: looked through before megatron-core unpickles it
    model = _sharded_model(encoders)
    state: dict[str, Any] = dict(model)
    if optimizer is not None:
        wanted = optimizer.sharded_state_dict(model, is_loading=True, metadata=_metadata())
        forms = FormChange(wanted, model, metadata.state_dict_metadata.keys())
        state["optimizer"] = forms.request
        groups = ask_for_saved_groups(state["optimizer"], load_common(iter_dir).get("optimizer", {}))
    loaded = _load(state, iter_dir)
    for index, encoder in enumerate(encoders):
        name = f"model{index}" if len(encoders) > 1 else "model"
        encoder.load_state_dict(loaded.pop(name), strict=False)
    if optimizer is not None:
        loaded[NEW_GROUPS] = not take_groups(loaded["optimizer"], groups)
        main = _load({"main": forms.main}, iter_dir)["main"] if forms.main else {}
        optimizer.load_state_dict(forms.fit(loaded.pop("optimizer"), main))
    return loaded


def _load(state: dict[str, Any], iter_dir: Path) -> dict[str, Any]:
    """The tensors that ``state`` asks for, with the checkpoint's plain values."""
    try:
        with mock.patch("torch.load", _load_plain), _quiet():
            return dist_checkpointing.load(state, str(iter_dir), strict=StrictHandling.RAISE_UNEXPECTED)
    except (Exception, CheckpointException) as error:  # which is no Exception
        raise UserError(f"{iter_dir}: cannot be loaded into this model ({_first_lines(error)})") from error


def _make_moments(optimizer: Any) -> None:
    """Before the first update there are none, and no checkpoint of them: with fp16 many updates may be skipped."""
    for each in optimizer.chained_optimizers:
        if not each.is_stub_optimizer and not each.optimizer.state:
            each.init_state_fn(each.optimizer, each.config)


@contextmanager
def _quiet() -> Iterator[None]:
    """megatron-core uses parts of torch that announce their end with every tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


_torch_load = torch.load


def _load_plain(*args: Any, **kwargs: Any) -> Any:
    """megatron-core loads sharded objects with ``weights_only=False``: arbitrary code."""
    return _torch_load(*args, **{**kwargs, "weights_only": True})


def _sharded_model(encoders: list[Encoder]) -> dict[str, Any]:
    """``{"model": …}``, or ``{"model0": …, "model1": …}`` with interleaved stages: megatron-core's own names."""
    sharded = {}
    for index, encoder in enumerate(encoders):
        tensors = encoder.sharded_state_dict(metadata=_metadata())
        # Transformer Engine's per-layer state is for fp8, which is not trained here; the bytes would be pickles.
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


def _first_lines(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:  # rank → (its exception, its traceback)
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[:600] or type(error).__name__


def _remove(folder: Path) -> None:
    import shutil

    if folder.exists():
        shutil.rmtree(folder)
