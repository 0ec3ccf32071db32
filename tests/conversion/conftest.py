"""Sources for the conversion tests, each built once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import tiny_families, tiny_models
from support.hf_files import Source


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """``source("vlm", dtype="bfloat16", …)``: the folder of a tiny model. Read-only: copy it before changing it."""
    made: dict[str, Path] = {}

    def make(kind: str, **kw: Any) -> Path:
        key = json.dumps([kind, kw], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp(kind) / kind
            family, _, form = kind.partition("_")
            if family in ("llama", "qwen3"):
                made[key] = getattr(tiny_families, f"save_{family}")(folder, head=form == "causal_lm", **kw)
            else:
                made[key] = getattr(tiny_models, f"save_{kind}")(folder, **kw)
        return made[key]

    return make
