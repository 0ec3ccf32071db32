"""Host memory of a checkpoint's save and load on each rank, over the bytes of the rank's own shard.

    python benchmarks/save_memory.py [--beside CHECKOUT]

A rank's own shard is its part of the distributed optimizer's state (fp32 copy and moments) and its data-parallel part
of the weights. On a CPU the state itself lies on the host too: what is counted is the growth of resident memory beyond
it, at 1, 2 and 4 data-parallel ranks. ``--beside`` measures another checkout in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HIDDEN, LAYERS, VOCABULARY = 1024, 8, 32768


class Peak:
    """The most resident memory while a block runs, sampled every millisecond."""

    def __enter__(self) -> Peak:
        from common import resident

        self._resident, self._done = resident, threading.Event()
        self.before = self.most = resident("VmRSS")
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.is_set():
            self.most = max(self.most, self._resident("VmRSS"))
            time.sleep(0.001)

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join()

    @property
    def grown(self) -> int:
        return self.most - self.before


def measure(folder: str) -> dict[str, float]:
    """Save and load on this rank; bytes of its shard, and the growth of memory in each."""
    import torch
    import torch.distributed as dist

    from megatron_embed.bridge import EncoderConfig
    from megatron_embed.bridge.encoder import build_stages, transformer_config
    from megatron_embed.bridge.layout import Layout
    from megatron_embed.bridge.parallel import parallel_world
    from megatron_embed.conversion.mcore import model_state
    from megatron_embed.recipes.config.schema import OptimizerSection
    from megatron_embed.recipes.training.optimizer import set_up_training

    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from support.tiny_models import tiny_config

    config = EncoderConfig.from_hf(
        tiny_config(
            hidden_size=HIDDEN,
            intermediate_size=3 * HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=128,
            vocab_size=VOCABULARY,
        )
    )
    with parallel_world(Layout()):
        stages = build_stages(config, transformer_config(config, Layout(), dtype=torch.bfloat16))
        with torch.no_grad():
            for parameter in stages[0].parameters():
                parameter.normal_(std=0.02)
        optimizer = set_up_training(stages, OptimizerSection(), train_iters=3).optimizer
        model_state._make_moments(optimizer)
        (each,) = optimizer.chained_optimizers
        for state in each.optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name].normal_()  # touch the memory
        parameters = sum(parameter.numel() for parameter in stages[0].parameters())
        shard = parameters * 14 // dist.get_world_size()
        with Peak() as saving:
            path = model_state.save_model_state(Path(folder), 1, stages, optimizer=optimizer)
        with Peak() as loading:
            model_state.load_model_state(path, stages, optimizer=optimizer)
    return {"parameters": parameters, "shard": shard, "saving": saving.grown, "loading": loading.grown}


def run_ranks(world: int) -> list[dict[str, float]]:
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from support.worlds import run_world

    with tempfile.TemporaryDirectory() as folder:
        return run_world(measure, world, folder)


def measured(world: int, checkout: Path | None) -> list[dict[str, float]]:
    """Run this script for one world, with the package of a checkout."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if checkout is not None:
        environment["PYTHONPATH"] = str(checkout / ".types")
    command = [sys.executable, __file__, "--world", str(world)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: list[dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT", help="another commit, measured too")
    parser.add_argument("--world", type=int, help=argparse.SUPPRESS)  # the script calls itself with this option
    options = parser.parse_args()
    if options.world:
        print(json.dumps(run_ranks(options.world)))
        return
    from common import write_result

    table = ["| commit | ranks | own shard, MiB | save, over shard | load, over shard |", "|---|---|---|---|---|"]
    for checkout in (None, *([options.beside] if options.beside else [])):
        for world in (1, 2, 4):
            ranks = measured(world, checkout)
            shard = ranks[0]["shard"]
            saving, loading = (max(rank[name] for rank in ranks) / shard for name in ("saving", "loading"))
            commit = "before" if checkout else "this one"
            table.append(f"| {commit} | {world} | {shard / 2**20:.0f} | **{saving:.2f}** | **{loading:.2f}** |")
            print(table[-1], flush=True)
    settings = {
        "parameters": f"{ranks[0]['parameters']:,}",
        "precision": "bf16 weights, fp32 optimizer state, distributed",
        "layout": "data parallel",
        "goal": "≤ 1.3",
    }
    write_result("save-memory", "Host memory of a checkpoint's save and load", "\n".join(table), settings)


if __name__ == "__main__":
    main()
