"""Files and keys of a model folder that make other programs load other weights than those read here: refused."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from megatron_embed.bridge.errors import UserError, some

ADAPTER = "adapter_config.json"


def refuse_two_models(folder: Path, single: str, index: str, named: Collection[str]) -> None:
    """Refuse a folder with a single weights file beside an index that names other files.

    transformers reads the single file, other programs the files of the index, and the two may hold different models.

    Args:
        single, index: names of the two files, both of which exist.
        named: names of the files that the index lists.

    Raises:
        UserError: the index lists any file but ``single``.
    """
    if others := sorted(set(named) - {single}):
        raise UserError(
            f"{folder}: holds {single} and also {index}, which names {some(others, 2)}; wanted one of the two: "
            f"transformers reads {single}, other programs the files of the index. Remove the stale one"
        )


def refuse_adapter(folder: Path) -> None:
    """Refuse a folder with a PEFT adapter, which transformers and sentence-transformers load on top of the weights.

    Raises:
        UserError: there is an ``adapter_config.json``.
    """
    if (folder / ADAPTER).is_file():
        raise UserError(
            f"{folder / ADAPTER}: a PEFT adapter, which transformers would load on top of the weights and which is not "
            f"read here; merge it into the model first (peft: merge_and_unload, then save_pretrained), or remove it"
        )


def refuse_quantization(path: Path, config: Mapping[str, Any], *, fp8: bool) -> None:
    """Refuse a ``quantization_config`` other than that of FP8 weights with a scale each, which are read here.

    transformers quantises a model with such a key at loading, whatever its tensors are.

    Args:
        path: the ``config.json``.
        config: its contents.
        fp8: whether any tensor of the folder is FP8.

    Raises:
        UserError: another method, or FP8 without FP8 tensors; the message names the key.
    """
    text = config.get("text_config")
    for name, held in (("", config), ("text_config.", text if isinstance(text, Mapping) else {})):
        key, value = f"{name}quantization_config", held.get("quantization_config")
        method = value.get("quant_method") if isinstance(value, Mapping) else value
        if value is None or (method == "fp8" and fp8):
            continue
        found = (
            f"{key}.quant_method is {json.dumps(method)}" + (", but no tensor is FP8" if method == "fp8" else "")
            if isinstance(value, Mapping)
            else f"{key} is {json.dumps(value)}"
        )
        raise UserError(
            f"{path}: {found}; wanted no {key}, or fp8 with FP8 weights of one scale each; take the model before it "
            f"was quantised, or take the key out if the tensors are plain"
        )
