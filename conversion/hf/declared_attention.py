"""The attention that a ready embedder declares. A causal one is refused, or taken as a base model on request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_embed.bridge.errors import UserError
from megatron_embed.bridge.families import BIDIRECTIONAL, is_vlm

#: the way in which each kind of caller consents
CONSENT, CONSENT_OF_A_RECIPE = "--bidirectional (in Python bidirectional=True)", "model.bidirectional=true"
HELP = "take a ready embedder with causal attention as a base model: the vectors are not its own"


def declares_causal(folder: Path, config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the key and its value if a ready embedder declares causal attention, else None.

    The text model's config decides. It is causal unless ``is_causal`` is false, because transformers reads a missing
    key as true. AutoModel's own ``*_bidirec`` classes are bidirectional whatever the key says. A folder that is no
    ready embedder (no ``modules.json``) has no vectors of its own yet, and may become bidirectional.

    Args:
        config: contents of the folder's ``config.json``.
    """
    if not (folder / "modules.json").is_file() or config.get("model_type") in BIDIRECTIONAL:
        return None
    text = config.get("text_config") if is_vlm(config) else config
    text = text if isinstance(text, Mapping) else {}
    key = "text_config.is_causal" if is_vlm(config) else "is_causal"
    if "is_causal" not in text:
        return key, "missing, which transformers takes for true"
    return None if text["is_causal"] is False else (key, json.dumps(text["is_causal"]))


def made_bidirectional(folder: Path, config: Mapping[str, Any], *, bidirectional: bool, consent: str = CONSENT) -> bool:
    """Return whether a folder is a causal embedder that is taken as a base model for bidirectional training.

    Args:
        config: contents of its ``config.json``.
        bidirectional: whether the user consented.
        consent: the way in which the user can consent.

    Raises:
        UserError: it is a causal embedder, and the user did not consent.
    """
    found = declares_causal(folder, config)
    if found is not None and not bidirectional:
        key, value = found
        raise UserError(
            f"{folder / 'config.json'}: {key} is {value}; wanted false: this ready embedder's vectors are made with "
            f"causal attention, and the bidirectional encoder would give others. Write false where it was trained "
            f"bidirectionally; to take it as a base model, to be trained bidirectionally, give {consent}"
        )
    return found is not None
