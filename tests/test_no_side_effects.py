"""Importing the package changes neither the environment nor any global state; entry points do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGE_PAGES = _HUGE_PAGES.read_text() if _HUGE_PAGES.is_file() else ""

#: imports every module twice: what others change when they are first imported is not the package's doing
IMPORT_ALL = """
import importlib, logging, os, pkgutil, signal, sys, warnings
import torch
import megatron_embed.bridge, megatron_embed.conversion, megatron_embed.recipes

modules = [
    module.name
    for package in (megatron_embed.bridge, megatron_embed.conversion, megatron_embed.recipes)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
]

def import_all():
    for name in modules:
        importlib.import_module(name)

def state():
    return {
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "logging": (logging.root.level, logging.root.manager.disable, list(logging.root.handlers)),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
        "torch": (
            torch.cuda.is_available, torch.cuda.current_device, torch.get_num_threads(), torch.get_default_dtype(),
            torch.backends.mkldnn.matmul.fp32_precision, torch._C._len_torch_function_stack(),
        ),
        "path": list(sys.path),
    }

import_all()
names = ("THP_MEM_ALLOC_ENABLE", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "CUDA_VISIBLE_DEVICES")
assert not [name for name in names if name in os.environ]
assert torch._C._len_torch_function_stack() == 0
for name in [name for name in sys.modules if name.startswith("megatron_embed")]:
    del sys.modules[name]
before = state()
import_all()
assert len(modules) > 100 and "megatron_embed.bridge.cpu.host" in sys.modules
for name, value in state().items():
    assert value == before[name], f"importing changed {name}: {before[name]} became {value}"
"""

#: an entry point → a call of it that ends at once
ENTRIES = {
    "a command": """
from megatron_embed.recipes.cli import run_program
try:
    run_program(lambda: None)
except SystemExit:
    pass
""",
    "convert-checkpoints": """
from megatron_embed.conversion.convert_checkpoints import main
assert main(["verify", "--hf-model", "nowhere", "--hf-path", "nowhere"])
""",
    "train": """
from megatron_embed.recipes import train, ministral3_tiny_embed_config
try:
    train(ministral3_tiny_embed_config())
except Exception:
    pass
""",
    "select_device": """
from megatron_embed.bridge.parallel import select_device
select_device("cpu")
""",
}
CHECK = """
import os, warnings
assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "8192"
assert any(text is not None and "Apex" in text.pattern for _, text, *_ in warnings.filters)
"""


def run(code: str, environment: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def clean() -> dict[str, str]:
    """The environment without what entry points set."""
    set_by_them = ("THP_MEM_ALLOC_ENABLE", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "CUDA_VISIBLE_DEVICES")
    return {name: value for name, value in os.environ.items() if name not in set_by_them}


def test_importing_every_module_changes_nothing(clean: dict[str, str]) -> None:
    run(IMPORT_ALL, clean)


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_entry_point_sets_what_the_process_needs(entry: str, clean: dict[str, str]) -> None:
    run(ENTRIES[entry] + CHECK, clean)


def test_what_the_environment_says_stays(clean: dict[str, str]) -> None:
    code = """
import os
from megatron_embed.bridge.environment import set_defaults
set_defaults()
assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"
"""
    run(code, {**clean, "THP_MEM_ALLOC_ENABLE": "0"})


def test_the_packages_names_load_without_others_warnings(clean: dict[str, str]) -> None:
    """megatron-core, behind a lazy name, warns while it is imported; the filters stay as they were."""
    code = """
import warnings
warnings.filterwarnings("error", message="(Transformer Engine and )?Apex (is|are) not installed")
from megatron_embed.recipes import Encoder
assert not any(text is not None and text.pattern.startswith("Transformer Engine") for _, text, *_ in warnings.filters)
"""
    run(code, clean)


@pytest.mark.skipif("[madvise]" not in HUGE_PAGES, reason="this kernel gives large pages to all or to none")
def test_large_pages_are_still_to_be_had_after_every_import(clean: dict[str, str]) -> None:
    """torch asks for them at its first allocation, so that no import may allocate."""
    code = """
import torch
import megatron_embed.recipes.encode, megatron_embed.recipes.training.loop, megatron_embed.conversion.verify
from megatron_embed.bridge.parallel import select_device
select_device("cpu")
kept = torch.zeros(1 << 24)
(line,) = [line for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")]
assert int(line.split()[1]) > 32000, line
"""
    run(code, clean)
