"""A checkpoint's ``run_config.yaml``, changed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megatron_embed.conversion.mcore.folder import RUN_CONFIG
from support.hf_files import without_checksums


def edit_run(megatron: Path, section: str, **changes: Any) -> None:
    """Change keys of a section in the checkpoint of step 0."""
    path = without_checksums(megatron / "iter_0000000") / RUN_CONFIG
    values = yaml.safe_load(path.read_text())
    values[section].update(changes)
    path.write_text(yaml.safe_dump(values))


def edit_encoder(megatron: Path, **changes: Any) -> None:
    """Change what the checkpoint says of its encoder."""
    edit_run(megatron, "encoder", **changes)
