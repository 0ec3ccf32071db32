"""Imports run recipes → conversion → bridge, never back, and the pure modules stay pure."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALLOWED = {
    "bridge": {"bridge"},
    "conversion": {"bridge", "conversion"},
    "recipes": {"bridge", "conversion", "recipes"},
}
PURE = ("bridge/transforms.py", "bridge/mapping.py", "bridge/rope.py")


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_packages_import_downwards_only(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        own = {name.split(".")[1] for name in imported(path) if name.startswith("megatron_embed.")}
        assert own <= ALLOWED[package], f"{path.relative_to(ROOT)} imports {sorted(own - ALLOWED[package])}"


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_import_neither_megatron_nor_distributed(name: str) -> None:
    found = {n for n in imported(ROOT / name) if n.startswith(("megatron.", "torch.distributed")) or n == "megatron"}
    assert not found


@pytest.mark.parametrize("path", sorted((ROOT / "bridge").rglob("*.py")), ids=lambda p: p.name)
def test_only_layer_spec_knows_transformer_engine(path: Path) -> None:
    if path.name != "layer_spec.py":
        assert not any("transformer_engine" in name for name in imported(path))
