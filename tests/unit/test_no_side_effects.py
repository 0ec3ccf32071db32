"""Importing the package changes neither the environment nor torch; programs do."""

from __future__ import annotations

import os
import subprocess
import sys

CODE = """
import os
import megatron_embed.bridge, megatron_embed.conversion, megatron_embed.recipes
import megatron_embed.recipes.training, megatron_embed.recipes.encode, megatron_embed.conversion.exporting
changed = [name for name in ("THP_MEM_ALLOC_ENABLE", "ONEDNN_PRIMITIVE_CACHE_CAPACITY") if name in os.environ]
import torch
assert not changed, changed
assert "lambda" not in repr(torch.cuda.is_available), "CUDA was hidden"
from megatron_embed.bridge.cpu import host
host.run_on_cpu()
assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
"""


def test_importing_changes_nothing_and_running_on_a_cpu_does() -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("THP", "ONEDNN"))}
    subprocess.run([sys.executable, "-c", CODE], env=clean, check=True)
