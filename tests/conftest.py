"""What every test has: a cache folder of its own session, and the marker of those that take long."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

# One thread a process, before torch is imported: several processes share the cores, and threads that wait for one
# another on a busy core spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


@pytest.fixture(scope="session", autouse=True)
def _cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:  # in the environment: processes that tests start have it too
        patch.setenv("MEGATRON_EMBED_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark as slow what spawns worlds of processes, and what is exhaustive."""
    for item in items:
        if "distributed" in item.path.parts or item.get_closest_marker("exhaustive"):
            item.add_marker(pytest.mark.slow)
    if hasattr(config, "workerinput"):  # of several workers none is to begin with a long file at the end
        items.sort(key=lambda item: "distributed" not in item.path.parts)


def pytest_collection_finish() -> None:
    """Leave what was imported to no later collection of garbage, each of which would look through all of it."""
    gc.freeze()
