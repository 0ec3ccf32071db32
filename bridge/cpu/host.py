"""Support for megatron-core on a host without CUDA, or with ``device=cpu``. Elsewhere this module does nothing.

megatron-core 0.16 names CUDA in places that a CPU process reaches: ``device="cuda"`` and
``torch.cuda.current_device()`` when it allocates, ``tensor.type() == "torch.cuda.FloatTensor"`` in the optimizer,
``torch.cuda.synchronize()`` around point-to-point messages and checkpoints, CUDA random states in recomputation.
This module answers each for the CPU. Dropout is 0 in every model of this project, so random states carry no meaning.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_embed.bridge import environment

_CPU = torch.device("cpu")
_installed = False


def cuda_is_hidden() -> bool:
    """Return whether this process runs megatron-core on the CPU (:func:`run_on_cpu` was called)."""
    return _installed


def device() -> torch.device:
    """Return the device that holds this process's tensors."""
    return _CPU if _installed else torch.device("cuda", torch.cuda.current_device())


def run_on_cpu() -> None:
    """Hide CUDA from this process and answer megatron-core's calls to it. Idempotent; call before building models."""
    global _installed
    if _installed:
        return
    _installed = True
    environment.set_defaults(on_cpu=True)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nothing below may find a device or spend time looking for one
    _answer_cuda_calls()
    _CudaMeansCpu().__enter__()


class _CudaMeansCpu(TorchFunctionMode):
    """Mode that maps CUDA devices to the CPU in torch's allocations, and types of CPU tensors to CUDA's names."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        device_wanted = kwargs.get("device")
        if device_wanted is not None and _names_cuda(device_wanted):
            kwargs = {**kwargs, "device": _CPU}
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # the optimizers sort parameters by comparing this string
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.cuda:
            return args[0]
        return func(*args, **kwargs)


def _names_cuda(value: Any) -> bool:
    return (isinstance(value, str) and value.startswith("cuda")) or (
        isinstance(value, torch.device) and value.type == "cuda"
    )


@contextlib.contextmanager
def _fork(tracker: Any, name: str = "model-parallel-rng") -> Iterator[None]:
    """Stand in for ``CudaRNGStatesTracker.fork``: refuse a state that was not added, as on CUDA, and fork nothing."""
    if name not in tracker.states_:
        raise Exception(f"cuda rng state {name} is not added")
    yield


def _answer_cuda_calls() -> None:
    from megatron.core.tensor_parallel import random as mcore_random

    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    torch.cuda.is_available = lambda: False
    # Without a CUDA context the setters queue callbacks for ever, and the getters raise.
    no_state = torch.empty(0, dtype=torch.uint8)
    torch.cuda.get_rng_state = lambda *_a, **_k: no_state
    torch.cuda.set_rng_state = lambda *_a, **_k: None
    torch.cuda.manual_seed = lambda _seed: None  # type: ignore[assignment]
    mcore_random._get_cuda_rng_state = lambda *_a, **_k: no_state
    mcore_random._set_cuda_rng_state = lambda *_a, **_k: None
    mcore_random.CudaRNGStatesTracker.fork = _fork
