"""The folder ``train.save_dir``; a new process leaves it unchanged until it first writes there."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.files.atomic import atomic_file
from megatron_embed.conversion.mcore import folder as checkpoint_folder
from megatron_embed.recipes.config.run_config import save_run_config
from megatron_embed.recipes.config.schema import RecipeConfig
from megatron_embed.recipes.training.resume import Start, checkpoints_folder

METRICS, TENSORBOARD = "metrics.jsonl", "tensorboard"


class RunFolder:
    """The run's folder, for the first rank, the only one that writes anything but checkpoints.

    Args:
        asked: the recipe as the user gave it, except for ``train.save_dir``.
        start: the point where the run continues, or None.
    """

    def __init__(self, asked: RecipeConfig, save_dir: Path, start: Start | None) -> None:
        self.path = save_dir
        self.asked, self._start, self._claimed = asked, start, False

    def claim(self) -> str | None:
        """Take the folder for this run. Call it before each write; only the first call has an effect.

        The checkpoints that the run continues from stay. Any other run in the folder is moved as a whole into
        ``replaced-1`` (or the next number), which is then an ordinary run folder.

        Returns:
            One line about the moved files, or None.
        """
        if self._claimed:
            return None
        moved = None
        self.path.mkdir(parents=True, exist_ok=True)
        step = self._start.step if self._start is not None and self._start.own else 0
        if step:
            moved = self._put_later_checkpoints_aside(step)
        elif any(checkpoints_folder(self.path).glob("iter_*")):
            # Move the checkpoints last: while they are here, a restart still finds a run to put aside.
            aside = self._put_aside(
                [METRICS, TENSORBOARD, checkpoint_folder.RUN_CONFIG, checkpoints_folder(Path()).name]
            )
            moved = f"the run that was in {self.path} is in {aside} now"
        self._cut_metrics(step)
        save_run_config(self.asked, self.path / checkpoint_folder.RUN_CONFIG)
        self._claimed = True
        return moved

    def _put_aside(self, names: list[str]) -> Path:
        there = [name for name in names if os.path.lexists(self.path / name)]
        targets = (self.path / f"replaced-{number}" for number in itertools.count(1))
        # If a process was killed in this function, its folder lacks the rest; fill that one.
        target = next(each for each in targets if not any(os.path.lexists(each / name) for name in there))
        for name in there:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (self.path / name).rename(target / name)
        return target

    def _put_later_checkpoints_aside(self, step: int) -> str | None:
        """Move checkpoints after ``step``: ``checkpoint.load`` may name an own checkpoint that is not the newest."""
        root = checkpoints_folder(self.path)
        tracker = root / checkpoint_folder.TRACKER  # missing if the first save ended before it wrote the tracker
        if tracker.is_file() and tracker.read_text(encoding="utf-8", errors="replace").strip() == str(step):
            return None
        checkpoint_folder.write_tracker(root, step)
        newest = checkpoint_folder.iteration_folder(root, step).name
        later = [each for each in sorted(root.glob("iter_*")) if each.name > newest]
        if not later:
            return None
        aside = self._put_aside([str(each.relative_to(self.path)) for each in later])
        return f"the checkpoints after step {step} are in {aside} now"

    def check(self) -> None:
        """Check that the metrics that the run goes on with are a run's own lines.

        Raises:
            UserError: a line is not; the message names it.
        """
        if self._start is not None and self._start.own:
            self._metrics_until(self._start.step)

    def _cut_metrics(self, step: int) -> None:
        """Keep the metrics up to ``step``, because the continued run repeats the later steps."""
        kept = self._metrics_until(step)
        with atomic_file(self.path / METRICS) as file:
            file.write("".join(kept).encode())

    def _metrics_until(self, step: int) -> list[str]:
        path = self.path / METRICS
        kept = []
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() and step else []
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the run was killed while it wrote the line
                continue
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise UserError(
                    f"{path}: line {number}: found {line[:60]}, wanted an object with the number of a step as 'step'; "
                    f"remove the line"
                )
            if record["step"] <= step:
                kept.append(line + "\n")
        return kept
