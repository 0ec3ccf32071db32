"""Filters for warnings of torch and megatron-core that no user of this package can act on.

Each filter names the beginning of a text, so that every other warning is still shown.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

#: beginning of the text (a regular expression) → why the reader can ignore it
_EXPECTED: dict[str, str] = {
    "Transformer Engine and Apex are not installed": "an optional extra; torch's own kernels serve as well",
    "Apex is not installed": "the same",
    "full scope is deprecated": "megatron-core warns of the default of its own cuda_graph_scope",
    r"`torch\.distributed\.(reduce_scatter|all_gather_into)_tensor` is deprecated": "megatron-core's calls, not ours",
    "The .grad attribute of a Tensor that is not a leaf": "megatron-core's zero_grad looks at it, and it is None",
}
#: further warnings of this kind, where there is no CUDA
_EXPECTED_ON_CPU: dict[str, str] = {
    "When using sequence parallelism it is recommended to set the environment variable": "of CUDA's streams",
}


def ignore_expected_warnings(*, on_cpu: bool = False) -> None:
    """Ignore the warnings from now on, in this process; ``on_cpu`` adds those that concern CUDA alone."""
    for text in {**_EXPECTED, **(_EXPECTED_ON_CPU if on_cpu else {})}:
        warnings.filterwarnings("ignore", message=text)


@contextmanager
def expected_warnings_ignored() -> Iterator[None]:
    """Ignore the warnings inside, and restore the process's filters afterwards."""
    with warnings.catch_warnings():
        ignore_expected_warnings()
        yield
