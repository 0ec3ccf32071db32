"""Installations of Transformer Engine that do not import or have another version, met by processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support.places import ROOT

from megatron_embed.bridge import te_import

#: what only the meta package says; the package without its compiled part; a library that is missing
BROKEN = {
    "RuntimeError": "raise RuntimeError('Found empty `transformer-engine` meta package installed.')",
    "ImportError": "try:\n    from . import pytorch\nexcept ImportError:\n    pass",
    "OSError": "raise OSError('libcudart.so.13: cannot open shared object file')",
}


def installed(folder: Path, code: str, version: str = "2.11.0+abc", pytorch: str | None = None) -> dict[str, str]:
    """A Transformer Engine in a folder, and the environment of a process that sees it."""
    package, info = folder / "transformer_engine", folder / f"transformer_engine-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: transformer-engine\nVersion: {version}\n")
    package.mkdir()
    (package / "__init__.py").write_text(code)
    if pytorch is not None:
        (package / "pytorch.py").write_text(pytorch)
    return {**os.environ, "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"}


def said(code: str, environment: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


PROBLEM = "from megatron_embed.bridge import te_import; print(te_import.problem()); print(te_import.problem())"


@pytest.mark.parametrize("kind", BROKEN)
def test_what_does_not_import_is_said_and_is_no_module(kind: str, tmp_path: Path) -> None:
    environment = installed(tmp_path, BROKEN[kind])
    first, second = said(PROBLEM, environment).splitlines()
    assert first == second
    assert "its import fails" in first
    assert {"RuntimeError": "empty `tr", "ImportError": "No module named", "OSError": "libcudart"}[kind] in first
    tried = "try:\n    import transformer_engine\nexcept ModuleNotFoundError:\n    print('none')"
    assert said(f"import megatron_embed.recipes\n{tried}", environment) == "none\n"


def test_what_imports_is_as_without_the_guard(tmp_path: Path) -> None:
    environment = installed(tmp_path, "from . import pytorch", pytorch="value = 3")
    code = (
        f"{PROBLEM}; import inspect, transformer_engine as te; print(te.pytorch.value, inspect.getsource(te).strip())"
    )
    assert said(code, environment).splitlines() == ["None", "None", "3 from . import pytorch"]


@pytest.mark.parametrize("version", ["2.10.1", "2.12.0", "2.12.0.dev0", "2.20"])
def test_an_unsupported_version_is_refused_and_is_no_module(version: str, tmp_path: Path) -> None:
    environment = installed(tmp_path, "raise SystemError('executed')", version)
    code = """
from megatron_embed.bridge import UserError, te_import
try:
    import transformer_engine
except ModuleNotFoundError:
    pass
try:
    te_import.problem()
except UserError as error:
    print(error)
"""
    message = said(code, environment)
    assert f"found version {version}; wanted {te_import.SUPPORTED}" in message
    assert te_import.WAY_OUT in message


def test_without_it_nothing_is_found() -> None:
    assert said(PROBLEM, dict(os.environ)).splitlines() == ["it is not installed"] * 2


@pytest.mark.slow
def test_every_module_of_training_imports_beside_the_meta_package_and_the_log_says_so(tmp_path: Path) -> None:
    code = """
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(name)s %(message)s", level=logging.INFO)
import megatron_embed.recipes.training.loop, megatron_embed.conversion.convert_checkpoints
from megatron_embed.bridge import layer_spec
print([layer_spec.choose_layers().kind for _ in range(2)])
"""
    *lines, kinds = said(code, installed(tmp_path, BROKEN["RuntimeError"])).splitlines()
    (log,) = [line for line in lines if "megatron_embed" in line]
    assert log.startswith(
        "WARNING megatron_embed.bridge.layer_spec layers: megatron-core's own; Transformer Engine is not"
    )
    assert "RuntimeError: Found empty" in log
    assert kinds == "['cuda', 'cuda']"


def test_the_extra_has_the_same_cap() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["optional-dependencies"]["te"] == [f"transformer-engine[pytorch]{te_import.SUPPORTED}"]
