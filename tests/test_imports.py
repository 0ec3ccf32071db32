"""Imports run recipes → conversion → bridge, never back, and the pure modules stay pure."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest
from support.places import ROOT

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


#: module of bridge/cpu → who may import it; anyone may ask ``host`` where tensors live
OF_CPUS = {"layers": {"bridge/layer_spec.py"}, "packed_weights": {"recipes/encoding/encoder.py"}}


def test_what_only_cpus_need_is_reached_through_the_choice_of_layers() -> None:
    prefix = "megatron_embed.bridge.cpu."
    for package in ALLOWED:
        for path in (ROOT / package).rglob("*.py"):
            place = path.relative_to(ROOT).as_posix()
            if place.startswith("bridge/cpu/"):
                continue
            for module in {
                name.removeprefix(prefix).split(".")[0] for name in imported(path) if name.startswith(prefix)
            }:
                assert module == "host" or place in OF_CPUS.get(module, ()), f"{place} imports bridge.cpu.{module}"


def test_every_folder_with_modules_is_a_package_that_gets_installed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for package in ALLOWED for path in (ROOT / package).rglob("*.py")}
    assert sorted(listed) == sorted("megatron_embed." + ".".join(folder.parts) for folder in folders)
