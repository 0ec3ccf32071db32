"""Sources for the conversion tests, each built once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import tiny_llama, tiny_models, tiny_qwen3
from support.hf_files import Source


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """``source("vlm", dtype="bfloat16", …)``: the folder of a tiny model. Read-only: copy it before changing it."""
    made: dict[str, Path] = {}

    def make(kind: str, **kw: Any) -> Path:
        key = json.dumps([kind, kw], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp(kind) / kind
            module = {"llama": tiny_llama, "qwen3": tiny_qwen3}.get(kind.partition("_")[0], tiny_models)
            made[key] = getattr(module, f"save_{kind}")(folder, **kw)
        return made[key]

    return make
