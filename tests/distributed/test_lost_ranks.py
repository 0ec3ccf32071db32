"""Ranks that are killed or stop answering: the others end, and say which one it was and where it stood."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_embed.bridge import liveness

#: rank 1 sends itself a signal while the others wait for it, in a collective or where no error would come back
PROGRAM = """
import os, signal, sys, threading
from pathlib import Path
import torch
import torch.distributed as dist
from megatron_embed.bridge import liveness, parallel
from megatron_embed.bridge.cpu import host
from megatron_embed.bridge.layout import Layout
from megatron_embed.recipes.cli import run_program

def main():
    number, waits_in, stacks = signal.Signals(int(sys.argv[1])), sys.argv[2], Path(sys.argv[3])
    minutes = 0.15 if number == signal.SIGSTOP else 10.0
    host.run_on_cpu()
    join = liveness.join
    liveness.join = lambda *args, **named: join(*args, **{**named, "limited": waits_in == "nothing"})
    with parallel.parallel_world(Layout(), timeout_minutes=minutes):
        liveness.keep_stacks_in(stacks)
        dist.barrier()
        liveness.stand_at("step 3, forward and backward", limited=True)
        if dist.get_rank() == 1:
            liveness.stand_at("step 3, saving the checkpoint")
            os.kill(os.getpid(), number)
        if waits_in == "nothing":
            threading.Event().wait()
        dist.all_reduce(torch.zeros(1))

run_program(main)
"""


def launch(folder: Path, number: signal.Signals, waits_in: str, processes: int = 3) -> list[str]:
    """The error lines of the program; the limit is for hangs."""
    program = folder / "program.py"
    program.write_text(PROGRAM)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command = [*torchrun, str(program), str(int(number)), waits_in, str(folder / "stacks")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 1
    assert "this should not happen" not in done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("error:")]


@pytest.mark.slow
@pytest.mark.parametrize("waits_in", ["a collective", "nothing"])
def test_a_killed_rank_is_named_by_the_others(waits_in: str, tmp_path: Path) -> None:
    (message,) = launch(tmp_path, signal.SIGKILL, waits_in)
    assert re.match(r"error: rank 1 \(\S+, process \d+\) is gone( \(SIGKILL\))?: ", message), message
    assert "it stood at step 3, saving the checkpoint. It was killed, by hand or by a system out of memory" in message


@pytest.mark.slow
def test_a_terminated_rank_says_so(tmp_path: Path) -> None:
    assert launch(tmp_path, signal.SIGTERM, "a collective", processes=2) == ["error: ended by SIGTERM"]


@pytest.mark.slow
@pytest.mark.parametrize("waits_in", ["a collective", "nothing"])
def test_a_stopped_rank_is_named_after_the_timeout_and_every_rank_ends(waits_in: str, tmp_path: Path) -> None:
    (message,) = launch(tmp_path, signal.SIGSTOP, waits_in)
    assert re.match(r"error: rank [02] waited for 0.15 minutes at step 3, forward and backward, but rank 1 \(", message)
    assert "does not answer, its process is stopped: it stood at step 3, saving the checkpoint" in message
    assert str(tmp_path / "stacks") in message
    written = "".join(path.read_text() for path in (tmp_path / "stacks").glob("rank_[02].txt"))
    assert "stood at step 3, forward and backward" in written
    assert ("all_reduce" if waits_in == "a collective" else "threading.py") in written


class Store(dict[str, bytes]):
    """As torch's, of one process."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        return keys[0] in self


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> dict[int, liveness.Note]:
    """Three ranks on three hosts, of which this is the first."""
    monkeypatch.setattr(liveness, "PATIENCE", 0.0)
    monkeypatch.setattr(liveness, "_world", None)
    store = Store()
    for rank in range(2, -1, -1):
        monkeypatch.setattr(liveness.socket, "gethostname", lambda rank=rank: f"host{rank}")
        liveness.join(store, rank=rank, size=3, minutes=10)
        liveness.stand_at(f"step {rank}")
    assert liveness._world is not None
    return {note.rank: note for note in liveness._world.exchange()}


def tell(note: liveness.Note, **changes: str) -> None:
    assert liveness._world is not None
    own, liveness._world.own = liveness._world.own, note
    for name, value in changes.items():
        setattr(note, name, value)
    liveness._world.publish()
    liveness._world.own = own


def test_a_rank_on_another_host_is_found_by_its_silence(world: dict[int, liveness.Note]) -> None:
    tell(world[1], met="Connection closed by peer")
    message = liveness.explain_broken_connection(RuntimeError("gloo/transport: Timed out waiting 600000ms for recv"))
    assert message.startswith("rank 0 waited for 10 minutes at step 0, but rank 2 (host2, process ")
    assert message.endswith("does not answer: it stood at step 2")


def test_what_another_rank_ended_with_is_passed_on(world: dict[int, liveness.Note]) -> None:
    tell(world[2], end="train.jsonl, line 3: no 'query'")
    message = liveness.explain_broken_connection(RuntimeError("gloo/transport: Connection closed by peer"))
    assert re.fullmatch(r"rank 2 \(host2, process \d+\) ended: train.jsonl, line 3: no 'query'", message)


def test_errors_of_other_things_are_not_taken_for_broken_connections() -> None:
    lost = RuntimeError("[/__w/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Connection closed by peer")
    assert liveness.is_broken_connection(lost)
    assert not liveness.is_broken_connection(RuntimeError("shape mismatch"))
    assert not liveness.is_broken_connection(ConnectionResetError(104, "Connection reset by peer"))
