"""The forms in which megatron-core saves an optimizer's state, and loading of one form into an optimizer of another.

Adam's moments are the same tensors, under the same names, in every form. Two things differ: the place of the fp32 main
parameters, and whether torch's own state (the parameter groups, the moments) is one level down:

* distributed: main parameters ``optimizer.state.param.…``; torch's state under ``optimizer``
* plain, for fp16 or bf16 weights: ``optimizer.state.fp32_param.…``; torch's state under ``optimizer``
* plain, for fp32 weights: the weights are the main parameters; torch's state at the top

So a change of form needs no arithmetic: a request replaces the names of one form by those of the other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import merge, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

DISTRIBUTED, HALF, FULL = "optimizer.state.param.", "optimizer.state.fp32_param.", ""
_TORCH_STATE = ("param_groups", "state")


class FormChange:
    """Change from a checkpoint's form to that of the optimizer that loads it; equal forms need no change.

    Args:
        wanted: the optimizer's request, its ``sharded_state_dict``. It belongs to this object from now on.
        model: the request for the weights. An optimizer whose main parameters are the weights gets the checkpoint's
            main parameters where these exist, and so unrounded weights: the names in ``model`` are changed.
        names: the names of all tensors in the checkpoint.

    Attributes:
        request: the request to the checkpoint.
        main: the request for a second load: main parameters that are the weights. One load takes no name twice.
    """

    def __init__(self, wanted: dict[str, Any], model: dict[str, Any], names: Collection[str]) -> None:
        self._own = DISTRIBUTED if "param_state" in wanted else HALF if "fp32_from_fp16_params" in wanted else FULL
        found = [form for form in (DISTRIBUTED, HALF) if any(name.startswith(form) for name in names)]
        self._saved = found[0] if found else FULL
        self.request, self.main = wanted, {}
        if self._own == self._saved:
            return
        if self._own == FULL:
            for tensor in _tensors(model):
                if self._saved + tensor.key in names:
                    tensor.key = self._saved + tensor.key
            self.request = {"optimizer": wanted}
            return
        for tensor in _tensors(wanted):
            if tensor.key.startswith(self._own):
                tensor.key = self._saved + tensor.key.removeprefix(self._own)
        if self._saved == FULL:
            self.main = _take_main(wanted)
            self.request = {**wanted.pop("optimizer"), **wanted}

    def fit(self, loaded: dict[str, Any], main: dict[str, Any]) -> dict[str, Any]:
        """Return the input of the optimizer's ``load_state_dict``, from the loads of ``request`` and ``main``."""
        if self._own == self._saved:
            return loaded
        if self._own == FULL:
            return loaded["optimizer"]
        if self._saved == FULL:
            torch_state = {name: loaded.pop(name) for name in _TORCH_STATE if name in loaded}
            loaded = merge({**loaded, "optimizer": torch_state}, main)
        if self._own == DISTRIBUTED:
            loaded["param_state_sharding_type"] = "fully_reshardable"
        return loaded


def _tensors(state: dict[str, Any]) -> Iterator[ShardedTensor | ShardedTensorFactory]:
    return (value for value in nested_values(state) if isinstance(value, ShardedTensor | ShardedTensorFactory))


def _take_main(wanted: dict[str, Any]) -> dict[str, Any]:
    """Remove the main parameters from an optimizer's request; return a request for these alone."""
    if "param_state" in wanted:
        return {"param_state": {i: {"param": each.pop("param")} for i, each in wanted["param_state"].items()}}
    return {"fp32_from_fp16_params": wanted.pop("fp32_from_fp16_params")}
