"""Hugging Face folders as plain dictionaries, and damage done to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_embed.conversion.files.checksums import CHECKSUMS

#: the ``source`` fixture of the conversion tests
Source = Callable[..., Path]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, read with safetensors' own function."""
    return {name: t for file in sorted(folder.glob("model*.safetensors")) for name, t in load_file(file).items()}


def encoder_tensors_of(folder: Path) -> dict[str, Tensor]:
    """The language tower's tensors under their bare names."""
    tensors = tensors_of(folder)
    prefix = next(name for name in tensors if name.endswith("embed_tokens.weight")).removesuffix("embed_tokens.weight")
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and not name.startswith(("vision", "multi", "lm_head"))
    }


def assert_same_bits(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Same names, dtypes, shapes and bits."""
    assert sorted(found) == sorted(wanted)
    for name, tensor in wanted.items():
        other = found[name]
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(other.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def without_checksums(iter_dir: Path) -> Path:
    """A checkpoint whose files a test is about to change on purpose."""
    (iter_dir / CHECKSUMS).unlink(missing_ok=True)
    return iter_dir


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file in place."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change a single-file model's tensors in place."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
