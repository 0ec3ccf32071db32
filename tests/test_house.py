"""The house's rooms: each imports only from those before it in the list, and no modules import one another in a circle.

Imports inside functions count, and so do those for type checking alone.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from support.places import ROOT

NAME = "megatron_embed"

#: In the order of imports. A module of bridge/ that is named here is a room of its own: pure modules stand before
#: the CPU's layers, which stand before the rest. What the list does not name is in no room.
ROOMS = (
    "bridge.errors",
    "bridge.quiet",
    "bridge.environment",
    "bridge.families",
    "bridge.config",
    "bridge.layout",
    "bridge.mapping",
    "bridge.transforms",
    "bridge.rope",
    "bridge.sequences",
    "bridge.pooling",
    "bridge.attention",
    "bridge.layers",
    "bridge.cpu",
    "bridge",
    "conversion.files",
    "conversion.hf",
    "conversion.mcore",
    "conversion.compare",
    "conversion",
    "recipes.config",
    "recipes.datasets",
    "recipes.encoding",
    "recipes.retrieval",
    "recipes.planning",
    "recipes.training",
    "recipes",
)
#: commands, which nothing imports
COMMANDS = (
    "conversion.convert_checkpoints",
    *(f"recipes.{name}" for name in ("train", "plan", "evaluate", "encode", "mine", "data", "report")),
)

Imports = Mapping[str, list[tuple[str, int]]]


def modules(root: Path) -> dict[str, Path]:
    """Every module by its name without the distribution's; a package by the package's."""
    found = {}
    for top in ("bridge", "conversion", "recipes"):
        for path in sorted((root / top).rglob("*.py")):
            found[".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def imports(root: Path) -> dict[str, list[tuple[str, int]]]:
    """(imported module, line) of every module."""
    paths = modules(root)
    found = {module: dict.fromkeys(_imports_of(path, paths)) for module, path in paths.items()}  # each once
    return {module: [each for each in names if each[0] != module] for module, names in found.items()}


def _imports_of(path: Path, known: Mapping[str, Path]) -> Iterator[tuple[str, int]]:
    """Of one module. A name that is imported from a package is a module of it, or the package itself."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; wanted the whole name"
            package = node.module or ""
            inner = (f"{package}.{alias.name}" for alias in node.names)
            names = [name if name.removeprefix(f"{NAME}.") in known else package for name in inner]
        else:
            continue
        for name in names:
            if name.startswith(f"{NAME}."):
                yield name.removeprefix(f"{NAME}."), node.lineno


def room_of(module: str) -> int | None:
    """The number of a module's room; None: it is in none.

    A package that has rooms inside holds only modules: another package in it is no part of it.
    """
    parts = module.split(".")
    for depth in range(len(parts), 0, -1):
        room = ".".join(parts[:depth])
        if room in ROOMS:
            divided = any(other.startswith(f"{room}.") for other in ROOMS)
            return None if divided and len(parts) - depth > 1 else ROOMS.index(room)
    return None


def problems(found: Imports) -> list[str]:
    """Everything that breaks the order of the house, one line each."""
    lines = [f"{module}: stands in no room; wanted one of ROOMS" for module in found if room_of(module) is None]
    for module, names in found.items():
        for name, line in names:
            if name not in found:
                lines.append(f"{module}:{line}: imports {name}, which is no module")
                continue
            own, other = room_of(module), room_of(name)
            if own is not None and other is not None and other > own:
                lines.append(f"{module}:{line}: imports {name}, from {ROOMS[other]}, which comes after {ROOMS[own]}")
            if name in COMMANDS:
                lines.append(f"{module}:{line}: imports {name}, a command")
    try:
        TopologicalSorter({module: {name for name, _ in names} for module, names in found.items()}).prepare()
    except CycleError as error:
        lines.append(f"a circle: {' → '.join(error.args[1][::-1])}")
    return lines


def test_the_house_is_in_order() -> None:
    assert not problems(imports(ROOT)), "\n" + "\n".join(problems(imports(ROOT)))


def test_every_room_is_there() -> None:
    there = modules(ROOT)
    assert not [room for room in ROOMS if room not in there]
    assert not [command for command in COMMANDS if command not in there]


def test_the_list_of_contributing_is_that_of_the_rooms() -> None:
    listed = list(_listed())
    assert sorted(listed) == sorted(module for module in modules(ROOT) if not _is_package(module))
    rooms = [room for room in map(room_of, listed) if room is not None]
    assert rooms == sorted(rooms)
    assert [module for module in listed if module in COMMANDS] == list(COMMANDS)


def test_tests_stand_in_folders_that_mirror_the_rooms() -> None:
    """And each has a name of its own, by which pytest and other tests import it."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert not [name for name, count in names.items() if count > 1]
    for top in ("bridge", "conversion", "recipes"):
        for path in (ROOT / "tests" / top).rglob("test_*.py"):
            room = ".".join(path.parent.relative_to(ROOT / "tests").parts)
            assert room in ROOMS, f"{path} stands in a folder of no room"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("from megatron_embed.recipes.training import loop", "bridge.rope:1: imports recipes.training.loop, from"),
        ("import megatron_embed.bridge.pooling", "bridge.rope:1: imports bridge.pooling, from bridge.pooling, which"),
        ("def f():\n    from megatron_embed.bridge.cpu import host", "bridge.rope:2: imports bridge.cpu.host, from"),
        (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from megatron_embed.recipes import train",
            "bridge.rope:3: imports recipes.train, a command",
        ),
        ("from megatron_embed.bridge.nowhere import x", "bridge.rope:1: imports bridge.nowhere, which is no module"),
    ],
    ids=["upward", "within a package", "in a function", "for types", "nowhere"],
)
def test_each_kind_of_import_counts(text: str, problem: str, tmp_path: Path) -> None:
    assert any(line.startswith(problem) for line in problems(imports(house(tmp_path, {"bridge/rope.py": text}))))


def test_a_circle_within_a_room_counts(tmp_path: Path) -> None:
    files = {
        "recipes/training/a.py": "from megatron_embed.recipes.training.b import x",
        "recipes/training/b.py": "def f():\n    import megatron_embed.recipes.training.a",
    }
    (line,) = problems(imports(house(tmp_path, files)))
    assert line.startswith("a circle: recipes.training.")


@pytest.mark.parametrize("name", ["recipes/images/read.py", "bridge/vision/tower.py"])
def test_a_module_outside_of_the_rooms_counts(name: str, tmp_path: Path) -> None:
    module = name.removesuffix(".py").replace("/", ".")
    assert f"{module}: stands in no room; wanted one of ROOMS" in problems(imports(house(tmp_path, {name: ""})))


def _is_package(module: str) -> bool:
    return (ROOT / module.replace(".", "/")).is_dir()


def _listed() -> Iterator[str]:
    """Every module that CONTRIBUTING.md lists, in its order."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("```")[1]
    folder = ""
    for line in text.splitlines():
        if found := re.match(r"(\S+)/ ", line):
            folder = found[1]
        elif re.match(r"  \w+\.py\b", line):
            names, *_ = re.split(r"  +", line.strip())  # what stands behind two spaces describes them
            yield from (f"{folder}/{name}".removesuffix(".py").replace("/", ".") for name in names.split())


def house(root: Path, files: Mapping[str, str]) -> Path:
    """A house of empty modules, and these."""
    empty = ("bridge/rope.py", "bridge/pooling.py", "bridge/cpu/host.py", "recipes/train.py")
    for name, text in {**dict.fromkeys((*empty, "recipes/training/loop.py"), ""), **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root
