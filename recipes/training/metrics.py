"""A run's reports: metrics.jsonl, TensorBoard, Weights & Biases, and a bar on a terminal or lines in the log."""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from megatron_embed.conversion.files.progress import time_left
from megatron_embed.recipes.config.schema import RecipeConfig
from megatron_embed.recipes.training.run_folder import METRICS, TENSORBOARD, RunFolder

_LOG = logging.getLogger(__name__)


def peak_memory_bytes() -> int:
    """Return the peak memory of this process: of CUDA's allocator, or resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:  # Linux inherits ru_maxrss from the parent process; VmHWM counts this process alone
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Reporter:
    """The writer of a run's reports. It writes on one rank; on the others every call does nothing."""

    def __init__(self, cfg: RecipeConfig, folder: RunFolder, *, active: bool, start: int):
        self.active = active
        if not active:
            return
        from tqdm import tqdm

        self._cfg, self._folder, self._start = cfg, folder, start
        folder.path.mkdir(parents=True, exist_ok=True)
        self._file: Any = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        if cfg.logger.wandb_project:
            import wandb

            self._wandb = wandb.init(project=cfg.logger.wandb_project, config=cfg.to_dict(), dir=str(folder.path))
        self._bar = tqdm(
            total=cfg.train.train_iters,
            initial=start,
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            disable=None,  # no bar if stderr is no terminal, where each update would be another line of the log
        )
        self._losses: list[float] = []
        self._total, self._began = cfg.train.train_iters, time.perf_counter()

    def step(self, record: dict[str, Any], *, logged: bool) -> None:
        """Report one finished step.

        Args:
            record: the step's values; ``loss`` is its own loss.
            logged: write the record, with the step's own loss as ``loss_step`` and the mean loss over the steps since
                the last logged one as ``loss``.
        """
        if not self.active:
            return
        self._losses.append(record["loss"])
        speed = f"{record['tokens_per_second']:,.0f} tokens/s"
        self._bar.set_postfix_str(f"loss {record['loss']:.4f}, {speed}", refresh=False)
        self._bar.update()
        if not logged:
            return
        interval = {"step": record["step"], "loss": fmean(self._losses), "loss_step": record["loss"]}
        self._losses.clear()
        self._write({**interval, **record, **interval})
        if self._bar.disable:
            done = record["step"] - self._start
            left = time_left(self._total - record["step"], done / (time.perf_counter() - self._began))
            rate = f"lr {record['learning_rate']:.3g}"
            self.say(f"step {record['step']}/{self._total}: loss {interval['loss']:.4f}, {rate}, {speed}, {left} left")
        for collection, scores in record.get("eval", {}).items():
            told = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
            self.say(f"step {record['step']}: {collection}: {told}")

    def _write(self, record: dict[str, Any]) -> None:
        """Write and flush one line of metrics.jsonl, and the same numbers to the other logs."""
        if self._file is None:
            self._open()
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        step = record["step"]
        scalars = {name: value for name, value in record.items() if isinstance(value, int | float) and name != "step"}
        for collection, scores in record.get("eval", {}).items():
            scalars.update({f"eval/{collection}/{name}": value for name, value in scores.items()})
        if self._tensorboard is not None:
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)

    def _open(self) -> None:
        if moved := self._folder.claim():
            self.say(moved)
        self._file = (self._folder.path / METRICS).open("a", encoding="utf-8")
        if self._cfg.logger.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self._folder.path / TENSORBOARD), purge_step=self._start + 1)

    def say(self, text: str) -> None:
        """Log a line, above the bar if there is one."""
        if self.active:
            _LOG.info(text)

    def close(self) -> None:
        """Write everything to disk and end the bar's line."""
        if not self.active:
            return
        self._bar.close()
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
