"""Casts between the dtypes that weights are stored in; no value changes without being refused or counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from megatron_embed.bridge.errors import UserError

#: Values cast and looked at in one go. They stay in the processor's cache, and torch divides nothing that is smaller
#: among threads, whose meeting would cost more than the work.
_BLOCK = 1 << 15

#: tensor name → (how many of its values were rounded, the largest change relative to the value)
Rounded: TypeAlias = dict[str, tuple[int, float]]


def dtype_name(dtype: torch.dtype) -> str:
    """``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def torch_option(dtype: torch.dtype) -> str:
    """``"--torch-dtype bfloat16"``: how the command line asks for a dtype."""
    return f"--torch-dtype {dtype_name(dtype)}"


@dataclass
class Casts:
    """Casts tensors, refuses what would be lost, and counts what is rounded.

    A finite value that the new dtype cannot reach (1e5 in float16) is always refused. A value that the new dtype does
    not hold exactly is refused too, unless ``rounding`` was asked for; then it is counted, underflow to zero included.
    NaN and infinity that the tensor holds already are carried over as they are.

    Attributes:
        where: folder that the tensors come from, for messages.
        rounding: whether the user asked for a dtype that may round.
        ask: how the user asks for a dtype, such as ``--torch-dtype float32``.
        rounded: what was rounded so far.
    """

    where: Path | str
    rounding: bool = False
    ask: Callable[[torch.dtype], str] = torch_option
    rounded: Rounded = field(default_factory=dict)

    def __call__(self, name: str, tensor: Tensor, dtype: torch.dtype, *, count: bool = True) -> Tensor:
        """The tensor in another dtype.

        Args:
            name: what the tensor, or a part of it, is called in messages and counts.
            count: False for one that another process counts.

        Raises:
            UserError: names the tensor and the first value that would overflow or, where not asked for, be rounded.
        """
        if torch.promote_types(tensor.dtype, dtype) == dtype:  # the same, or wider: every value is exact
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
        """Raise for the first value of a block that overflows, or else that is rounded."""
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
        """One line that says what was rounded; none where nothing was.

        Args:
            dtype: the dtype that keeps every value, where rounding was a default: the line then says how to ask for it.
        """
        return [f"{line}; {self.ask(dtype)} keeps every value" if dtype else line for line in told(self.rounded)]


def told(rounded: Mapping[str, tuple[int, float]]) -> list[str]:
    """One line that says what was rounded; none where nothing was."""
    if not rounded:
        return []
    values = sum(count for count, _ in rounded.values())
    name = max(rounded, key=lambda name: rounded[name][1])
    largest = f"the largest change {rounded[name][1]:.2%} of a value (in {name})"
    return [f"{values:,} values in {len(rounded):,} tensors rounded, {largest}"]


def merged(parts: Iterable[Rounded]) -> Rounded:
    """What several processes rounded, each its own slices of the tensors."""
    whole: Rounded = {}
    for part in parts:
        for name, (count, change) in part.items():
            before, most = whole.get(name, (0, 0.0))
            whole[name] = before + count, max(most, change)
    return whole


def _cast_block(given: Tensor, out: Tensor) -> tuple[int, float]:
    """Cast into ``out``; (how many finite values changed, the largest relative change: infinity where one overflowed).

    numpy compares and counts several times as fast as torch does on a CPU.
    """
    out.copy_(given)
    wide = torch.float64 if torch.float64 in (given.dtype, out.dtype) else torch.float32  # holds both exactly
    before, after = given.to(wide), out.to(wide)
    changed = int(np.count_nonzero(after.numpy() != before.numpy()))
    if not changed:
        return 0, 0.0
    least, most = map(float, after.sub_(before).div_(before).aminmax())
    if least != least:  # 0/0, NaN and infinity as they were: no change
        after.nan_to_num_(0.0, float("inf"), float("-inf"))
        changed = int(np.count_nonzero(after.numpy()))
        least, most = map(float, after.aminmax())
    return changed, max(-least, most)


def _text(value: Tensor) -> str:
    """A value with as many digits as tell it from its neighbours."""
    return f"{float(value):.{17 if value.dtype == torch.float64 else 9}g}"
