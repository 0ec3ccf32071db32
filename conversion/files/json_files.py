"""Small JSON files: read with messages that name the file, and written for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_embed.bridge.errors import UserError


def load_json(path: Path) -> Any:
    """Return the value in a JSON file.

    Raises:
        UserError: the file is absent or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: {absence(path)}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); write or fetch it again") from None


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """Return the object in a JSON file; of an ``optional`` file that is absent, return an empty one.

    Raises:
        UserError: the file is absent, or holds something else.
    """
    value = load_json(path) if path.is_file() or not optional else {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a JSON {type(value).__name__}, wanted an object")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people: indented, UTF-8, with a newline at the end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def absence(path: Path) -> str:
    """Say that a file is not there; a hub cache's own entries are links to its blobs, which may be gone."""
    return f"a link to {path.readlink()}, which is not there; fetch it again" if path.is_symlink() else "no such file"
