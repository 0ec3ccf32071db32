"""Selection of the model's own files among those beside its weights.

A model folder is also somebody's working folder: notes, data, checkpoints, other programs' temporary files lie in it.
So files are taken by name, and all others are left. The names are those that transformers, sentence-transformers and
Mistral's and Llama's repositories use.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_embed.bridge.errors import UserError, some
from megatron_embed.conversion.files.json_files import write_json
from megatron_embed.conversion.files.replaceable import refuse_to_remove
from megatron_embed.conversion.hf.sentence_files import TRANSFORMER_FILES

_READ = ("readme", "license", "licence", "copying", "notice", "use_policy", "citation")
#: Names in lower case, for the folder of the weights and the folders that ``modules.json`` names. Code is not included:
#: this package writes only stock models.
_NAMES = (
    # configs
    "config.json",
    "configuration.json",  # ModelScope
    "generation_config.json",
    "params.json",  # Mistral's own form
    # tokenizers
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v[0-9]*",  # Mistral's, older than tekken
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "tekken.json",
    # chat and processors
    "chat_template.jinja",
    "chat_template.json",
    "system_prompt.txt",  # Mistral
    "chat_system_prompt.txt",
    "vibe_system_prompt.txt",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    # sentence-transformers
    "modules.json",
    "config_sentence_transformers.json",
    *TRANSFORMER_FILES,
    # texts for people
    *(f"{name}{end}" for name in _READ for end in ("", ".md", ".txt", ".rst")),
    "citation.cff",
    "modelcard.json",
    ".gitattributes",
)
#: folders beside the weights → names in them
_FOLDERS = {
    "additional_chat_templates": ("*.jinja",),
    "assets": ("*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp"),  # a model card's pictures
}
_WEIGHTS = (".safetensors", ".safetensors.index.json")
#: what a folder of checkpoints and a checkpoint hold, as this package and megatron-core write them
_CHECKPOINT = (
    *("iter_*", "latest_checkpointed_iteration.txt", ".metadata", "*.distcp", "common.pt", "metadata.json"),
    *("run_config.yaml", "checksums.json", "hf"),
)
_LIMIT = 256 << 20


def sidecars(folder: Path) -> list[Path]:
    """Return a model's own files beside its weights, relative to its folder, sorted.

    Links that lead out of the folder are left out, see :func:`note_on_links`.
    """
    return [path for path in _named(folder) if _stays_inside(folder, path)]


def note_on_links(folder: Path) -> list[str]:
    """Return a note on the links among a model's own files that lead out of its folder; empty without any."""
    out = [path for path in _named(folder) if not _stays_inside(folder, path)]
    shown = some((f"{path} → {(folder / path).resolve()}" for path in out), 6)
    return [f"{folder}: links that lead out of the folder left out: {shown}"] if out else []


def _stays_inside(folder: Path, path: Path) -> bool:
    """Return whether a file lies in the folder, links followed, or in the blobs of a model in a hub cache."""
    real = (folder / path).resolve()
    blobs = real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")
    return blobs or folder.resolve() in real.parents


def _named(folder: Path) -> list[Path]:
    """Return the files with names of a model's own, sorted."""
    found = set(_matching(folder, Path(), _NAMES))
    for name, patterns in _FOLDERS.items():
        found.update(_matching(folder, Path(name), patterns))
    for module in _module_folders(folder / "modules.json"):
        found.update(_matching(folder, module, _NAMES))
    return sorted(found)


def others(folder: Path) -> list[str]:
    """Return names in a model's folder, hidden ones too, that are no weights or own files; folders end in ``/``."""
    own = {path.parts[0] for path in _named(folder)} | {".git", ".cache"}
    entries = (entry for entry in sorted(folder.iterdir()) if entry.name not in own)
    return [f"{entry.name}{'/' * entry.is_dir()}" for entry in entries if not entry.name.endswith(_WEIGHTS)]


def refuse_to_replace(target: Path) -> None:
    """Refuse to replace what is no earlier conversion, or holds other files than a model or a checkpoint has.

    Raises:
        UserError: the message says why it is none, or names the first of these files.
    """
    refuse_to_remove(target)
    if not (names := _foreign(target)):
        return
    raise UserError(
        f"{target}: holds {some(names, 3)}, no part of a model, so --overwrite does not remove it; move them away"
    )


def _foreign(target: Path) -> list[str]:
    """Return what is neither a model's own file nor a checkpoint's; a folder of such files ends in ``/``."""
    own = set(sidecars(target))
    folders = {Path(), *(parent for path in own for parent in path.parents)}
    for module in _module_folders(target / "modules.json"):
        folders.update((module, *module.parents))
    found = []
    for folder in sorted(folders):
        for entry in sorted((target / folder).iterdir()) if (target / folder).is_dir() else []:
            relative = folder / entry.name
            checkpoint = folder == Path() and any(fnmatchcase(entry.name, name) for name in _CHECKPOINT)
            known = relative in own or relative in folders or entry.name.endswith(_WEIGHTS) or checkpoint
            if not known:
                found.append(f"{relative}{'/' * entry.is_dir()}")
    return found


def copy_files(files: Iterable[Path], source: Path, target: Path) -> None:
    """Copy files byte for byte, with their folders; copy the target of a link."""
    for relative in files:
        (target / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / relative, target / relative)


def publish_files(files: Iterable[Path], source: Path, target: Path) -> None:
    """Copy files byte for byte, except JSON files that name paths of this machine: these lose them."""
    for relative in files:
        copy_files([relative], source, target)
        if relative.suffix == ".json" and (source / relative).stat().st_size < 1 << 20:
            try:
                before = json.loads((source / relative).read_text(encoding="utf-8"))
            except ValueError:
                continue  # the readers of this file report it
            if (after := without_local_paths(before)) != before:
                write_json(target / relative, after)


def without_local_paths(value: Any) -> Any:
    """Return JSON values without the keys and list items whose value is a path of this machine (``_name_or_path``).

    transformers and others write a model's load path into its files. Others cannot use this path, and it reveals who
    made the model and where.
    """
    if isinstance(value, dict):
        return {
            key: inner if _holds_tokens(key) else without_local_paths(inner)
            for key, inner in value.items()
            if not _is_local_path(key, inner)
        }
    if isinstance(value, list):
        return [without_local_paths(inner) for inner in value if not _is_local_path("", inner)]
    return value


def _holds_tokens(key: str) -> bool:
    """Return whether a key's lists hold a tokenizer's texts, which are no paths though they may look so."""
    return key in ("vocab", "merges") or key.endswith("tokens")


def _is_local_path(key: str, value: Any) -> bool:
    """Return whether a value is an absolute path that exists here or lies in the user's home. A token is no path."""
    token = key == "content" or key.endswith("_token")
    if not isinstance(value, str) or token or len(value) > 4096 or "\0" in value:
        return False
    path, home = Path(os.path.expanduser(value)), Path.home()
    below = path.is_absolute() and len(path.parts) > 1
    return below and (path.exists() or (len(home.parts) > 1 and home in (path, *path.parents)))


def _matching(folder: Path, inside: Path, patterns: Iterable[str]) -> list[Path]:
    if not (folder / inside).is_dir():
        return []
    return [
        inside / path.name
        for path in (folder / inside).iterdir()
        if any(fnmatchcase(path.name.lower(), pattern) for pattern in patterns)
        and path.is_file()
        and path.stat().st_size <= _LIMIT
    ]


def _module_folders(modules: Path) -> list[Path]:
    """Return the folders inside the model's folder that its ``modules.json`` names, such as ``1_Pooling``."""
    try:
        entries = json.loads(modules.read_text(encoding="utf-8")) if modules.is_file() else []
    except ValueError:
        return []
    named = [entry.get("path") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    paths = [PurePosixPath(name) for name in named if isinstance(name, str) and name]
    return [Path(path) for path in paths if not path.is_absolute() and ".." not in path.parts]
