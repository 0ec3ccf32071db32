"""Read, write and compare recipes as nested plain values and as ``run_config.yaml``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_embed.bridge.errors import UsageError
from megatron_embed.conversion.files.atomic import atomic_file
from megatron_embed.recipes.config.messages import refuse_unknown_keys
from megatron_embed.recipes.config.schema import RecipeConfig, explain_refusal, keys

#: name → recipe function; commands pass :data:`megatron_embed.recipes.RECIPES`
Recipes = Mapping[str, Callable[[], RecipeConfig]]
NO_RECIPES: Recipes = MappingProxyType({})


def config_from_dict(
    values: Mapping[str, Any], *, base: RecipeConfig | None = None, where: str = "config"
) -> RecipeConfig:
    """Return a config of nested plain values laid over those of ``base``.

    Raises:
        UsageError: a key is unknown (the message names the nearest known one) or a value is bad; the message starts
            with ``where: key``.
    """
    refuse_unknown_keys(values, [key for key, _ in keys()], where=where)
    merged: dict[str, Any] = (base or RecipeConfig()).to_dict()
    for name, value in values.items():
        merged[name] = {**merged[name], **value} if isinstance(merged[name], dict) else value
    try:
        return RecipeConfig.model_validate(merged)
    except ValidationError as error:
        raise UsageError(f"{where}: {explain_refusal(error)}") from None


def recipe_named(values: Mapping[str, Any], recipes: Recipes) -> RecipeConfig | None:
    """Return the config of the recipe that ``values`` name, or None if ``recipes`` has none of this name."""
    recipe = recipes.get(values.get("recipe", ""))
    return None if recipe is None else recipe()


def load_run_config(
    path: str | Path, *, base: RecipeConfig | None = None, recipes: Recipes = NO_RECIPES
) -> RecipeConfig:
    """Read a ``run_config.yaml``.

    Args:
        base: supplies the values of keys that the file lacks; None: the recipe that the file names supplies them.
        recipes: the recipes to look up that name in; an unknown name leaves the defaults.

    Raises:
        UsageError: the file is unreadable, a key is unknown or a value is bad.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); wanted a run_config.yaml") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, Mapping):
        raise UsageError(f"{path}: found {type(values).__name__}; wanted sections such as 'train:' with their keys")
    return config_from_dict(values, base=base or recipe_named(values, recipes), where=str(path))


def save_run_config(cfg: RecipeConfig, path: str | Path) -> None:
    """Write ``cfg`` as YAML, atomically: a reader sees the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(to_yaml(cfg).encode())


def to_yaml(cfg: RecipeConfig) -> str:
    """Return ``cfg`` as the text of a ``run_config.yaml``."""
    return yaml.safe_dump(cfg.to_dict(), sort_keys=False, allow_unicode=True)


def changed_keys(a: RecipeConfig, b: RecipeConfig, prefixes: Iterable[str]) -> list[tuple[str, Any, Any]]:
    """Return (key, value in a, value in b) for every differing key that starts with one of ``prefixes``."""
    flat_a, flat_b, wanted = dict(_flat(a)), dict(_flat(b)), tuple(prefixes)
    return [(key, flat_a[key], flat_b[key]) for key in flat_a if key.startswith(wanted) and flat_a[key] != flat_b[key]]


def _flat(cfg: RecipeConfig) -> Iterator[tuple[str, Any]]:
    values = cfg.to_dict()
    for key, _ in keys():
        section, _, name = key.rpartition(".")
        yield key, values[section][name] if section else values[name]
