"""Faults that a training run survives: killed and stopped ranks, full disks, damaged checkpoints; each with its rerun.

    python benchmarks/faults.py [--only kills all-ranks stopped disk damage] [--kills 20]

Every fault hits the real command (torchrun for two ranks) with a tiny model. The command then runs again, and the lines
of ``metrics.jsonl`` are compared bit for bit with those of an undisturbed run. Checkpoints that were complete before
the fault must still exist unchanged. Full disks are small tmpfs mounts, which need root.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import write_result

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from support.damage import cut_short, flip_a_byte
from support.runs import make_inputs, recipe

from megatron_embed.conversion.mcore.folder import is_sound
from megatron_embed.recipes.config.run_config import save_run_config

EXACT = ("step", "loss", "loss_step", "grad_norm", "learning_rate", "consumed_samples")
STEPS, EVERY = 48, 3
#: files of a checkpoint, in the order in which they appear
STATES = ("common.pt", "__0_0.distcp", "__1_0.distcp", ".metadata", "run_config.yaml", "checksums.json")
FILES = (*STATES, "metadata.json", "__0_1.distcp", "hf/config.json", "hf/tokenizer.json")
TIMEOUT_MINUTES = 0.25
#: torchrun waits half a minute for processes that ignore SIGTERM
LIMIT_SECONDS = 60


@dataclass
class Ended:
    """The end of a command: seconds since the fault, its status, and its lines that begin with ``error:``."""

    seconds: float
    status: int
    errors: list[str]


class Command:
    """One start of the training command."""

    def __init__(self, folder: Path, name: str, ranks: int, steps: int, *overrides: str, save_dir: Path | None = None):
        self.run = save_dir or folder / name
        config = folder / f"{name}.yaml"
        keys = [f"train.save_dir={self.run}", f"train.train_iters={steps}", f"train.save_interval={EVERY}"]
        keys += [f"train.timeout_minutes={TIMEOUT_MINUTES}", "optimizer.warmup_iters=2", *overrides]
        if ranks > 1:  # with tensor parallelism each rank has its own tensors to write
            keys.append("model.tensor_model_parallel_size=2")
        save_run_config(recipe(folder, name, *keys), config)
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        program = ["-m", "megatron_embed.recipes.train", "--config", str(config), "device=cpu"]
        self._log = Path(tempfile.mkstemp(dir=folder, suffix=".log")[1])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._metrics = self._inode()
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, *torchrun, *program], stderr=log, stdout=subprocess.DEVNULL, env=environment
            )
        self._ranks = ranks

    def pids(self) -> dict[int, int]:
        """Return rank → process id."""
        if self._ranks == 1:
            return {0: self.process.pid}
        found = {}
        for child in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            found |= {int(each[5:]): int(child) for each in environment if each.startswith(b"RANK=")}
        return found

    def wait_for_step(self, step: int) -> None:
        """Wait until this command has logged a step."""
        # A continued run replaces the file, so the old file holds only the run's past.
        self._wait(lambda: self._inode() != self._metrics and (numbers(self.run) or [[0]])[-1][0] >= step)

    def wait_for_save(self, step: int, file: str = "") -> None:
        """Wait until a file of a checkpoint or the whole checkpoint exists."""
        self.wait_for_step(step)
        partial = iteration(self.run, step, partial=True) / file
        self._wait(lambda: partial.exists() or newest(self.run) >= step)

    def _wait(self, reached: Callable[[], bool]) -> None:
        while not reached():
            if self.process.poll() is not None:
                raise RuntimeError(f"ended before the fault:\n{self.text()[-2000:]}")
            time.sleep(0.0005)

    def _inode(self) -> int:
        path = self.run / "metrics.jsonl"
        return path.stat().st_ino if path.exists() else 0

    def end(self, since: float) -> Ended:
        """Wait for the end of all processes of the command."""
        try:
            status = self.process.wait(timeout=600)
        finally:
            self.process.kill()
        errors = [line for line in self.text().splitlines() if line.startswith("error:")]
        return Ended(time.monotonic() - since, status, errors)

    def text(self) -> str:
        return self._log.read_text()


def numbers(run: Path) -> list[list[Any]]:
    """Return the current numbers of ``metrics.jsonl``, without an incomplete last line."""
    path, found = run / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        found.append([record[key] for key in EXACT])
    return found


def newest(run: Path) -> int:
    """Return the step of the checkpoint that the tracker names, or 0 if there is none."""
    tracker = run / "checkpoints" / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.exists() else 0


def iteration(run: Path, step: int, *, partial: bool = False) -> Path:
    name = f"iter_{step:07d}"
    return run / "checkpoints" / (f".{name}.partial" if partial else name)


class Table:
    """The table of results, with a list of the rows that failed."""

    def __init__(self) -> None:
        self.sections: dict[str, list[str]] = {}
        self.failures: list[str] = []

    def add(self, section: str, fault: str, ended: Ended, kept: str, good: bool) -> None:
        said = "; ".join(ended.errors).removeprefix("error: ").replace("|", "/") or "(nothing: killed as a whole)"
        said = f"{said[:300]} …" if len(said) > 300 else said
        row = f"| {fault} | {ended.seconds:.1f} | {said} | {kept} | {'yes' if good else '**no**'} |"
        self.sections.setdefault(section, []).append(row)
        print(row, flush=True)
        if not good:
            self.failures.append(f"{section}: {fault}")

    def body(self) -> str:
        lines: list[str] = []
        for name, rows in self.sections.items():
            lines += [f"## {name}", "", "| fault | ended after s | said | checkpoints | all as it should be |"]
            lines += ["|---|---|---|---|---|", *rows, ""]
        return "\n".join(lines)


class Faults:
    """The scenarios of faults, in one folder with a model and data."""

    def __init__(self, folder: Path, table: Table) -> None:
        self.folder, self.table = folder, table
        make_inputs(folder)
        self._whole: dict[tuple[int, int], list[list[Any]]] = {}

    def undisturbed(self, ranks: int, steps: int) -> list[list[Any]]:
        """Return the numbers of an undisturbed run."""
        if (ranks, steps) not in self._whole:
            command = Command(self.folder, f"whole-{ranks}-{steps}", ranks, steps)
            ended = command.end(time.monotonic())
            assert ended.status == 0, command.text()
            self._whole[ranks, steps] = numbers(command.run)
            assert len(self._whole[ranks, steps]) == steps
        return self._whole[ranks, steps]

    def kills(self, count: int) -> None:
        """Kill one of two ranks repeatedly, in training and while a checkpoint is written; each rerun continues."""
        whole, run = self.undisturbed(2, STEPS), self.folder / "killed"
        for number in range(count):
            before, victim, saving = newest(run), number % 2, number % 4 >= 2
            command = Command(self.folder, "killed", 2, STEPS)
            target = before + EVERY * (1 + (number % 4 == 3))
            step = before + 1 + number % 5
            state = STATES[number % len(STATES)]
            if saving:
                command.wait_for_save(target, state)
            else:
                command.wait_for_step(step)
            since = time.monotonic()
            os.kill(command.pids()[victim], signal.SIGKILL)
            ended = command.end(since)
            told = [error for error in ended.errors if f"rank {victim} (" in error and "is gone" in error]
            good = ended.status != 0 and len(ended.errors) == 1 == len(told) and ended.seconds < LIMIT_SECONDS
            good = good and newest(run) >= before and self._all_sound(run) and self._agree(numbers(run), whole)
            where = f"while checkpoint {target} is written ({state} is there)" if saving else f"after step {step}"
            self.table.add(
                "One of two ranks killed (SIGKILL)",
                f"{number + 1}: rank {victim}, {where}",
                ended,
                f"{before} before, {newest(run)} after",
                good,
            )
        self._finish("One of two ranks killed (SIGKILL)", run, 2, whole)

    def all_ranks(self) -> None:
        """Kill torchrun and both ranks at once."""
        whole, run = self.undisturbed(2, STEPS), self.folder / "all-killed"
        for number in range(4):
            before, saving = newest(run), number % 2 == 1
            command = Command(self.folder, "all-killed", 2, STEPS)
            target = before + 2 * EVERY
            if saving:
                command.wait_for_save(target)
            else:
                command.wait_for_step(before + EVERY + 1)
            since = time.monotonic()
            for pid in (*command.pids().values(), command.process.pid):
                os.kill(pid, signal.SIGKILL)
            ended = command.end(since)
            good = newest(run) >= before and self._all_sound(run) and self._agree(numbers(run), whole)
            where = f"while checkpoint {target} is written" if saving else f"after step {before + EVERY + 1}"
            kept = f"{before} before, {newest(run)} after"
            self.table.add("All processes killed (SIGKILL)", f"{number + 1}: {where}", ended, kept, good)
        self._finish("All processes killed (SIGKILL)", run, 2, whole)

    def stopped(self) -> None:
        """Stop one of two ranks, in training and while a checkpoint is written."""
        steps = 4 * EVERY
        whole, run = self.undisturbed(2, steps), self.folder / "stopped"
        limit = 60 * TIMEOUT_MINUTES + LIMIT_SECONDS
        for victim, saving in ((1, False), (0, True)):
            before = newest(run)
            command = Command(self.folder, "stopped", 2, steps)
            if saving:
                command.wait_for_save(before + EVERY)
            else:
                command.wait_for_step(before + EVERY + 1)
            since = time.monotonic()
            os.kill(command.pids()[victim], signal.SIGSTOP)
            ended = command.end(since)
            told = [error for error in ended.errors if f"rank {victim} (" in error and "does not answer" in error]
            good = len(ended.errors) == 1 == len(told) and ended.seconds < limit
            good = good and newest(run) >= before and self._all_sound(run) and self._agree(numbers(run), whole)
            where = f"while checkpoint {before + EVERY} is written" if saving else "in training"
            kept = f"{before} before, {newest(run)} after"
            self.table.add("One of two ranks stopped (SIGSTOP)", f"rank {victim}, {where}", ended, kept, good)
        self._finish("One of two ranks stopped (SIGSTOP)", run, 2, whole)

    def disk(self) -> None:
        """Fill the disk at different files of a checkpoint; then make room and continue the run."""
        steps, section = 4 * EVERY, "A full disk"
        for ranks in (1, 2):
            whole = self.undisturbed(ranks, steps)
            for kilobytes in (1000, 2400, 3300, 4200):
                with _small_disk(kilobytes) as mount:
                    command = Command(self.folder, "full", ranks, steps, save_dir=mount / "run")
                    ended = command.end(time.monotonic())
                    kept = newest(command.run)
                    good = ended.status == 1 and len(ended.errors) == 1 and self._all_sound(command.run)
                    good = good and "no space left on device" in ended.errors[0]
                    good = good and not list((command.run / "checkpoints").glob(".*"))
                    subprocess.run(["mount", "-o", "remount,size=64m", str(mount)], check=True)
                    again = Command(self.folder, "full", ranks, steps, save_dir=mount / "run")
                    good = again.end(time.monotonic()).status == 0 and good and numbers(again.run) == whole
                    fault = f"{ranks} rank{'s' if ranks > 1 else ''}, {kilobytes} kB"
                    self.table.add(section, fault, ended, f"{kept} kept, then {steps}", good)

    def damage(self) -> None:
        """Change and truncate every kind of file of the newest checkpoint.

        The command must refuse it, and with the fallback continue from the older checkpoint.
        """
        steps, section = 3 * EVERY, "A damaged checkpoint"
        whole = self.undisturbed(2, steps)
        made = self.folder / "made"  # a run as if it had ended after its second checkpoint
        shutil.copytree(self.folder / f"whole-2-{steps}", made)
        shutil.rmtree(iteration(made, steps))
        (made / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(f"{2 * EVERY}\n")
        for name in FILES:
            for what, change in (("a flipped bit", flip_a_byte), ("cut short", cut_short)):
                run = self.folder / "damaged"
                shutil.rmtree(run, ignore_errors=True)
                shutil.copytree(made, run)
                path = iteration(run, 2 * EVERY) / name
                change(path)
                ended = Command(self.folder, "damaged", 2, steps).end(time.monotonic())
                good = ended.status == 1 and len(ended.errors) == 1 and str(path) in ended.errors[0]
                good = good and str(iteration(run, EVERY)) in ended.errors[0] and newest(run) == 2 * EVERY
                again = Command(self.folder, "damaged", 2, steps, "checkpoint.allow_fallback=true")
                good = again.end(time.monotonic()).status == 0 and good and numbers(run) == whole
                self.table.add(section, f"{name}: {what}", ended, f"{EVERY} used, then {steps}", good)

    def _finish(self, section: str, run: Path, ranks: int, whole: list[list[Any]]) -> None:
        """Run to the end without a fault; all numbers must equal those of the undisturbed run."""
        before, command = newest(run), Command(self.folder, run.name, ranks, len(whole))
        ended = command.end(time.monotonic())
        good = ended.status == 0 and numbers(run) == whole and self._all_sound(run)
        partial = list((run / "checkpoints").glob(".*"))
        ended.errors = [f"done; {'every loss equal' if good else 'losses differ'}"]
        self.table.add(section, "none: runs to its end", ended, f"{before}, then {newest(run)}", good and not partial)

    @staticmethod
    def _agree(found: list[list[Any]], whole: list[list[Any]]) -> bool:
        return found == whole[: len(found)]

    @staticmethod
    def _all_sound(run: Path) -> bool:
        return all(is_sound(path) for path in (run / "checkpoints").glob("iter_*"))


@contextmanager
def _small_disk(kilobytes: int) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "faults", folder], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("kills", "all-ranks", "stopped", "disk", "damage")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--kills", type=int, default=20, metavar="N")
    arguments = parser.parse_args()
    table = Table()
    with tempfile.TemporaryDirectory() as folder:
        faults = Faults(Path(folder), table)
        scenarios: dict[str, Callable[[], None]] = {
            "kills": lambda: faults.kills(arguments.kills),
            "all-ranks": faults.all_ranks,
            "stopped": faults.stopped,
            "disk": faults.disk,
            "damage": faults.damage,
        }
        for name in arguments.only:
            scenarios[name]()
    failed = "".join(f"\n* {failure}" for failure in table.failures)
    title = "Killed and stopped ranks, full disks, damaged checkpoints"
    summary = f"Not as it should be: {failed}" if failed else "Every row is as it should be."
    settings = {
        "model": "3 layers of width 48, fp32; two ranks (tensor parallel) unless said otherwise",
        "steps": f"{STEPS} (kills), {4 * EVERY} (stops, disks), {3 * EVERY} (damage); a checkpoint every {EVERY}",
        "train.timeout_minutes": TIMEOUT_MINUTES,
        "as it should be": "one line `error:` that names the rank, the disk or the file; complete checkpoints "
        f"sound and none lost; every number of metrics.jsonl ({', '.join(EXACT)}) equal bit for bit to the undisturbed "
        f"run's, in the end all of them; ended within {LIMIT_SECONDS} s of the kill, or of the timeout",
    }
    write_result("faults", title, f"{summary}\n\n{table.body()}", settings)
    return len(table.failures)


if __name__ == "__main__":
    sys.exit(main())
