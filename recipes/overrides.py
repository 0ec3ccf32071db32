"""Strict ``section.key=value`` overrides, and messages that name the key, what was found and what is wanted."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError

from megatron_embed.bridge.errors import UserError
from megatron_embed.recipes.config import DataSource, RecipeConfig, keys

# Keys that hold one path or several: a bare value is one path, verbatim; [..] and {..} are YAML.
_PATHS = ("data.train", "data.eval")


def apply_overrides(cfg: RecipeConfig, overrides: Iterable[str]) -> RecipeConfig:
    """A copy of ``cfg`` with ``section.key=value`` overrides applied, the last one of a key winning.

    A string key takes everything after the first ``=`` verbatim; only where null is a value does ``null`` mean null.
    Lists are ``[a,b]``; everything else parses as YAML.

    Raises:
        UserError: no ``=``, an unknown key (with the nearest known one), or a value that the key does not take.
    """
    cfg = cfg.model_copy(deep=True)
    fields = dict(keys())
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"{override!r} is not an override; wanted section.key=value{_suggest(key)}")
        if key not in fields:
            raise UserError(f"unknown key {key!r}{_suggest(key)}")
        section, _, name = key.rpartition(".")
        try:
            setattr(getattr(cfg, section) if section else cfg, name, _parse(key, fields[key].annotation, text))
        except ValidationError as error:
            raise UserError(explain_validation_error(error, prefix=section, found=text)) from None
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
        return text  # the field's own check names the key and what it wants


def refuse_unknown_keys(values: Mapping[str, Any], *, where: str) -> None:
    """Raise a :class:`UserError` for a section or key that no recipe has."""
    known = {key for key, _ in keys()}
    sections = {key.partition(".")[0] for key in known if "." in key}
    for name, value in values.items():
        if name in sections:
            if not isinstance(value, Mapping):
                raise UserError(f"{where}: {name}: found {value!r}; wanted keys such as {_example(name, known)}")
            for inner in value:
                if f"{name}.{inner}" not in known:
                    raise UserError(f"{where}: unknown key '{name}.{inner}'{_suggest(f'{name}.{inner}')}")
        elif name not in known:
            raise UserError(f"{where}: unknown key {str(name)!r}{_suggest(str(name))}")


def _example(section: str, known: Iterable[str]) -> str:
    return ", ".join(sorted(key for key in known if key.startswith(f"{section}."))[:3])


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` was probably meant to be, if any is near."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return found[0] if found else None


def _suggest(key: str) -> str:
    known = [name for name, _ in keys()]
    if any(name.startswith(f"{key}.") for name in known):
        return f"; wanted one of its keys, such as {_example(key, known)}"
    # The right name in the wrong section, or in none, is nearer than any spelling.
    leaf = key.rpartition(".")[2]
    same_leaf = next((name for name in known if name.rpartition(".")[2] == leaf), None)
    if match := same_leaf or nearest(key, known):
        return f"; did you mean {match!r}?"
    return f"; known sections: {', '.join(sorted({name.partition('.')[0] for name in known if '.' in name}))}"


def explain_validation_error(error: ValidationError, *, prefix: str = "", found: Any = None) -> str:
    """One line for the first problem of a pydantic error: key, value found, values wanted."""
    problem = error.errors()[0]
    place = [str(part) for part in problem["loc"]]
    key = ".".join(([prefix] if prefix else []) + place)
    value = problem["input"] if found is None else found
    wanted = _WANTED.get(problem["type"], lambda context, message: message)(problem.get("ctx", {}), problem["msg"])
    return f"{key}: found {value!r}; wanted {wanted}"


_SOURCE_KEYS = ", ".join(DataSource.model_fields)
_WANTED: dict[str, Any] = {
    "literal_error": lambda context, _: context["expected"].replace(" or ", ", ").replace("'", ""),
    "int_type": lambda *_: "a whole number",
    "int_from_float": lambda *_: "a whole number",
    "bool_type": lambda *_: "true or false",
    "string_type": lambda *_: "a text",
    "float_parsing": lambda *_: "a number",
    "float_type": lambda *_: "a number",
    "finite_number": lambda *_: "a finite number",
    "greater_than": lambda context, _: f"a number above {context['gt']:g}",
    "greater_than_equal": lambda context, _: f"a number from {context['ge']:g} up",
    "value_error": lambda context, _: str(context["error"]),
    "list_type": lambda *_: "a list, [a,b]",
    "missing": lambda *_: f"keys {_SOURCE_KEYS}, path at least",
    "extra_forbidden": lambda *_: f"keys {_SOURCE_KEYS}",
    "model_type": lambda *_: f"a path or {{{_SOURCE_KEYS}}}",
}
