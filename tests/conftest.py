"""What every test has: a cache folder of its own session, so that the suite never writes into a home folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:  # in the environment: processes that tests start have it too
        patch.setenv("MEGATRON_EMBED_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
