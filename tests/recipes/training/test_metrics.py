"""What a run reports of itself."""

from __future__ import annotations

import multiprocessing
import resource

import numpy as np

from megatron_embed.recipes.training.metrics import peak_memory_bytes

MIB = 2**20


def peaks(size: int) -> tuple[int, int, int]:
    before = peak_memory_bytes()
    np.ones(size, dtype=np.uint8)
    return before, peak_memory_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_the_peak_is_this_process_own() -> None:
    """Not that of the one that started it, which Linux reports as the child's."""
    held = np.ones(peak_memory_bytes() + 300 * MIB, dtype=np.uint8)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        before, after, inherited = pool.apply(peaks, (200 * MIB,))
    assert inherited > held.nbytes  # so the test tells the two apart
    assert before < held.nbytes - 100 * MIB
    assert 150 * MIB < after - before < 400 * MIB
