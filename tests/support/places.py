"""Where files of the repository lie, whatever folder a test stands in."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
#: ``config.json`` of real models
HF_CONFIGS = FIXTURES / "hf_configs"
