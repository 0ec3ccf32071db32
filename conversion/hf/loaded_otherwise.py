"""Files and keys of a model folder that make other programs load other weights than those read here: refused."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from megatron_embed.bridge.errors import UserError

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
        shown = ", ".join(others[:2]) + (f", … ({len(others)})" if len(others) > 2 else "")
        raise UserError(
            f"{folder}: holds {single} and also {index}, which names {shown}; wanted one of the two: transformers "
            f"reads {single}, other programs the files of the index. Remove the stale one"
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
