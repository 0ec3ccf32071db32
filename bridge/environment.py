"""Settings that a program makes before it imports torch and megatron-core. Imports only the standard library."""

from __future__ import annotations

import os

from megatron_embed.bridge.quiet import ignore_expected_warnings

_CPU = {
    # torch's own switch for large pages, which it reads at its first allocation. On a CPU every big tensor is fresh
    # memory, and faulting it in by pages of 4 KiB takes longer than computing it (an fp32 SwiGLU of 8192 tokens: 33 ms
    # against 5).
    "THP_MEM_ALLOC_ENABLE": "1",
    # Number of kernels that oneDNN keeps. Each new shape needs one (0.3 ms to make), each length of text several. With
    # oneDNN's default of 1024 a second pass over a corpus finds hardly any of them.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8192",
}
_CUDA = {
    # Micro-batches differ in length. Without segments that grow, torch's allocator keeps blocks of every size that it
    # has seen, and runs out of memory while a tenth or more of it is free.
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}


def set_defaults(*, on_cpu: bool = False) -> None:
    """Set the environment variables that are not set, and ignore the warnings that nobody can act on.

    Programs call this first, because megatron-core warns during its import. Importing the package changes nothing.

    Args:
        on_cpu: also ignore the warnings that concern CUDA alone.
    """
    for name, value in (_CPU | _CUDA).items():
        os.environ.setdefault(name, value)
    ignore_expected_warnings(on_cpu=on_cpu)
