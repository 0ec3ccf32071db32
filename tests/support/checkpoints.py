"""What a checkpoint holds, read by torch alone."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch


def tensors_of(iter_dir: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, optimizer state included, by the path of their keys."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    whole = io.BytesIO()
    dcp_to_torch_save(iter_dir, whole)  # type: ignore[arg-type]
    whole.seek(0)
    flat: dict[str, torch.Tensor] = {}

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                visit(f"{prefix}.{key}", inner)
        elif isinstance(value, torch.Tensor):
            flat[prefix] = value

    visit("", torch.load(whole, weights_only=False))
    return flat
