"""How large the buckets are in which gradients are reduced: arithmetic that the planner shares."""

from __future__ import annotations

#: values of a gradient bucket: at least, and at least times the data-parallel ranks
BUCKET = (40_000_000, 1_000_000)


def bucket_size(replicas: int) -> int:
    """Values after which a bucket of gradients is closed: megatron-core's own rule, by data-parallel ranks."""
    return max(BUCKET[0], BUCKET[1] * replicas)
