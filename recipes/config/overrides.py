"""Strict ``section.key=value`` overrides of a recipe."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from megatron_embed.bridge.errors import UsageError
from megatron_embed.recipes.config.messages import suggest
from megatron_embed.recipes.config.schema import RecipeConfig, explain_refusal, keys

# These keys hold one or more paths. A bare value is one path, taken verbatim; [..] and {..} are YAML.
_PATHS = ("data.train", "data.eval")


def apply_overrides(cfg: RecipeConfig, overrides: Iterable[str]) -> RecipeConfig:
    """Return a copy of ``cfg`` with ``section.key=value`` overrides applied; the last override of a key wins.

    A string key takes everything after the first ``=`` verbatim; ``null`` means null only for keys that allow null.
    Lists are ``[a,b]``. All other values are parsed as YAML.

    Raises:
        UsageError: an override lacks ``=``, has an unknown key (the message names the nearest known one), or has a
            value that the key does not take.
    """
    cfg = cfg.model_copy(deep=True)
    fields = dict(keys())
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals and key in fields:
            raise UsageError(f"{key}: has no value; wanted {key}=…")
        if not equals:
            raise UsageError(f"{override!r} is not an override; wanted section.key=value{suggest(key, list(fields))}")
        if key not in fields:
            raise UsageError(f"unknown key {key!r}{suggest(key, list(fields))}")
        section, _, name = key.rpartition(".")
        try:
            holder, value = getattr(cfg, section) if section else cfg, _parse(key, fields[key].annotation, text)
            # The section's own __setattr__ would raise a message without the text that the user typed.
            BaseModel.__setattr__(holder, name, value)
        except ValidationError as error:
            raise UsageError(explain_refusal(error, prefix=section, found=text)) from None
    return cfg


def _parse(key: str, annotation: Any, text: str) -> Any:
    alternatives = (annotation, *get_args(annotation))
    if type(None) in alternatives and text == "null":
        return None
    if key in _PATHS:
        verbatim = not text.startswith(("[", "{"))
    else:
        verbatim = str in alternatives or get_origin(annotation) is Literal
    if verbatim:
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # the field's own check then names the key and the values that it takes
