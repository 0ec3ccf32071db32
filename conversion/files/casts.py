"""Casts between the dtypes of stored weights. Every change of a value is refused or counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from megatron_embed.bridge.errors import UserError

#: Number of values cast and checked at once. They stay in the processor's cache, and torch does not divide a tensor of
#: this size among threads, whose synchronisation would cost more than the work.
_BLOCK = 1 << 15

#: tensor name → (number of rounded values, largest change relative to the value)
Rounded: TypeAlias = dict[str, tuple[int, float]]


def dtype_name(dtype: torch.dtype | str) -> str:
    """Return the plain name of a dtype: ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def torch_option(dtype: torch.dtype) -> str:
    """Return the command line's option for a dtype: ``"--torch-dtype bfloat16"``."""
    return f"--torch-dtype {dtype_name(dtype)}"


@dataclass
class Casts:
    """Casts of tensors, which refuse losses and count rounded values.

    A finite value that the new dtype cannot reach (1e5 in float16) is always refused. A value that the new dtype cannot
    hold exactly is refused too, unless ``rounding`` was asked for; then it is counted, underflow to zero included. NaN
    and infinity in the given tensor stay as they are.

    Attributes:
        where: the tensors' folder, for messages.
        rounding: whether the user asked for a dtype that may round.
        ask: function that returns the way to ask for a dtype, such as ``--torch-dtype float32``.
        rounded: the values rounded so far.
    """

    where: Path | str
    rounding: bool = False
    ask: Callable[[torch.dtype], str] = torch_option
    rounded: Rounded = field(default_factory=dict)

    def __call__(self, name: str, tensor: Tensor, dtype: torch.dtype, *, count: bool = True) -> Tensor:
        """Return the tensor in another dtype.

        Args:
            name: name of the tensor, or of a part of it, in messages and counts.
            count: False for a tensor that another process counts.

        Raises:
            UserError: the message names the tensor and the first value that would overflow or, where rounding was not
                asked for, be rounded.
        """
        if torch.promote_types(tensor.dtype, dtype) == dtype:  # the same or wider: every value is exact
            return tensor.to(dtype)
        cast = torch.empty(tensor.shape, dtype=dtype)
        rounded, largest = 0, 0.0
        for given, out in zip(tensor.reshape(-1).split(_BLOCK), cast.view(-1).split(_BLOCK), strict=True):
            changed, change = _cast_block(given, out)
            if changed and (not self.rounding or change == float("inf")):
                self._refuse(name, given, out)
            rounded, largest = rounded + changed, max(largest, change)
        if rounded and count:
            before, most = self.rounded.get(name, (0, 0.0))
            self.rounded[name] = before + rounded, max(most, largest)
        return cast

    def _refuse(self, name: str, given: Tensor, out: Tensor) -> None:
        """Raise for the first value of a block that overflows, or else for the first that is rounded."""
        wide = given.double()
        changed = (out.double() != wide) & ~wide.isnan()
        overflows = changed & out.isinf()
        keep = f"{self.ask(given.dtype)} keeps every value"
        at = int((overflows if overflows.any() else changed).nonzero()[0])
        value, became = _text(given[at]), _text(out[at])
        old, new = dtype_name(given.dtype), dtype_name(out.dtype)
        if overflows.any():
            raise UserError(
                f"{self.where}: {name}: the value {value} is beyond {new}, whose largest is "
                f"{torch.finfo(out.dtype).max:g}; {keep}"
            )
        raise UserError(
            f"{self.where}: {name}: the value {value}, stored in {old}, would be rounded to {became} in {new}; "
            f"{keep}, {self.ask(out.dtype)} asks for rounding"
        )

    def notes(self, dtype: torch.dtype | None = None) -> list[str]:
        """Return one line that reports the rounding; none if nothing was rounded.

        Args:
            dtype: the dtype that keeps every value, where rounding was a default; the line then says how to ask for it.
        """
        return [f"{line}; {self.ask(dtype)} keeps every value" if dtype else line for line in told(self.rounded)]


def told(rounded: Mapping[str, tuple[int, float]]) -> list[str]:
    """Return one line that reports the rounding; none if nothing was rounded."""
    if not rounded:
        return []
    values = sum(count for count, _ in rounded.values())
    name = max(rounded, key=lambda name: rounded[name][1])
    largest = f"the largest change {rounded[name][1]:.2%} of a value (in {name})"
    return [f"{values:,} values in {len(rounded):,} tensors rounded, {largest}"]


def merged(parts: Iterable[Rounded]) -> Rounded:
    """Merge the counts of several processes, each of which rounded its own slices of the tensors."""
    whole: Rounded = {}
    for part in parts:
        for name, (count, change) in part.items():
            before, most = whole.get(name, (0, 0.0))
            whole[name] = before + count, max(most, change)
    return whole


def _cast_block(given: Tensor, out: Tensor) -> tuple[int, float]:
    """Cast into ``out``; return how many finite values changed, and the largest relative change (infinity: overflow).

    numpy compares and counts several times as fast as torch does on a CPU.
    """
    out.copy_(given)
    wide = torch.float64 if torch.float64 in (given.dtype, out.dtype) else torch.float32  # holds both exactly
    before, after = given.to(wide), out.to(wide)
    changed = int(np.count_nonzero(after.numpy() != before.numpy()))
    if not changed:
        return 0, 0.0
    least, most = map(float, after.sub_(before).div_(before).aminmax())
    if least != least:  # 0/0, or NaN and infinity as they were: no change
        after.nan_to_num_(0.0, float("inf"), float("-inf"))
        changed = int(np.count_nonzero(after.numpy()))
        least, most = map(float, after.aminmax())
    return changed, max(-least, most)


def _text(value: Tensor) -> str:
    """Return a value with enough digits to distinguish it from its neighbours."""
    return f"{float(value):.{17 if value.dtype == torch.float64 else 9}g}"
