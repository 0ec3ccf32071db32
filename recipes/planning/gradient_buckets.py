"""The size of the buckets in which gradients are reduced; training and the planner share it."""

from __future__ import annotations

#: A gradient bucket has at least the first number of values, and at least the second times the data-parallel ranks.
BUCKET = (40_000_000, 1_000_000)


def bucket_size(replicas: int) -> int:
    """Return the number of values that closes a bucket of gradients, by megatron-core's own rule."""
    return max(BUCKET[0], BUCKET[1] * replicas)
