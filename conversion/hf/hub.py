"""Model folders by path or hub id."""

from __future__ import annotations

import os
import re
from pathlib import Path

from megatron_embed.bridge.errors import UserError, reason

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
#: files to fetch from the hub; Mistral's own ``consolidated`` form is never needed
_FETCH = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model", "*.md"]
_FETCH_NOT = ["consolidated*", "*/consolidated*", "onnx/*", "openvino/*"]


def locate(source: str, revision: str | None) -> Path:
    """Return a local folder, or fetch a hub id with ``huggingface_hub``, which never touches a local folder.

    Raises:
        UserError: there is no such folder, and the hub does not give one.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{source}: is a file; wanted the folder that holds config.json and *.safetensors")
    if not is_hub_id(source):
        raise UserError(f"{source}: no such folder; wanted a Hugging Face model folder or the id of one on the hub")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=_FETCH, ignore_patterns=_FETCH_NOT))
    except Exception as error:  # the hub raises a dozen kinds: offline, no such repository, gated, …
        raise UserError(not_on_the_hub(source, error)) from None


def is_hub_id(name: str) -> bool:
    """Return whether a name can be a hub id, and not only a path."""
    return not name.startswith((".", "/", "~")) and _HUB_ID.fullmatch(name) is not None


def not_on_the_hub(name: str, error: Exception) -> str:
    """Return the message for a name that is no folder and for which the hub raised ``error``."""
    return (
        f"{name}: no such folder, and not to be had from the hub ({reason(error)}); give a local folder, or check the "
        f"id, --revision, the network (HF_HUB_OFFLINE={os.environ.get('HF_HUB_OFFLINE', '')!r}) and HF_TOKEN"
    )
