"""Reading of a checkpoint's pickles without running any code in them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_embed.bridge.errors import UserError, reason


def load_common(iter_dir: Path) -> Any:
    """Load ``common.pt``, accepting only tensors and plain values.

    Raises:
        UserError: the file is absent, damaged, or holds anything else.
    """
    refuse_unsafe_loading()
    path = iter_dir / "common.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the checkpoint is incomplete: copy all of it") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(
            f"{path}: damaged, or holds more than tensors and plain values ({reason(error)}); refused"
        ) from None


def refuse_unsafe_loading() -> None:
    """Refuse ``TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD``, with which every load could run code from the loaded file."""
    if os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0").lower() not in ("", "0", "false", "no", "n"):
        raise UserError("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set: checkpoints could run code; unset it")


_DCP = "torch.distributed.checkpoint"
_ALLOWED: dict[str, frozenset[str]] = {
    f"{_DCP}.metadata": frozenset(
        (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    f"{_DCP}.filesystem": frozenset(("_StorageInfo", "_StoragePrefix")),
    f"{_DCP}.planner": frozenset(("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")),
    "megatron.core.dist_checkpointing.strategies.torch": frozenset(("MCoreMetadata", "MCoreSavePlan")),
    "torch": frozenset(("Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype)))),
    "torch.serialization": frozenset(("_get_layout",)),
    "collections": frozenset(("OrderedDict",)),
    "pathlib": frozenset(("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")),
    "pathlib._local": frozenset(("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")),
    "builtins": frozenset(("int", "float", "str", "bytes", "bool", "list", "dict", "tuple", "set", "frozenset")),
    "_codecs": frozenset(("encode",)),  # protocol 2's form of bytes
}


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickler that knows only DCP's metadata classes and looks up no other name."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside of itself")


def safe_metadata(iter_dir: Path) -> Metadata:
    """Read ``.metadata`` (a pickle) without running any code in it. Call this before megatron-core reads it.

    Raises:
        UserError: the file is damaged, or holds anything but DCP's metadata.
    """
    refuse_unsafe_loading()
    path = iter_dir / ".metadata"
    try:
        with path.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the checkpoint is incomplete: copy all of it") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(f"{path}: not this checkpoint's metadata ({error}); refused, nothing of it was run") from None
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise UserError(f"{path}: holds a {type(metadata).__name__}, wanted DCP's Metadata")
    return metadata
