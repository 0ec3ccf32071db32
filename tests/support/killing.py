"""Processes that are killed at a chosen moment: before the n-th line that runs in some functions.

Counted lines in the place of time make a moment the same in every run. The processes are forked from one that has
imported everything, so that many kills cost seconds.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

_fork = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Outcome:
    """How a world ended.

    Attributes:
        codes: exit code of each rank: 0, 1 or −9.
        lines: watched lines that each rank ran, if it came to its end.
        output: what the ranks printed.
    """

    codes: list[int]
    lines: list[int]
    output: str


def call_in_fresh_process(scenario: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``scenario(*arguments)`` in a new process, from which :func:`run_killed` may fork; return its result.

    The process of the tests itself has threads and process groups, with which a fork could hang.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would not be in a fork
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(scenario, *arguments).result()


def run_killed(
    function: Callable[[], Any], *, watched: Sequence[Callable[..., Any]], moments: Sequence[int | None]
) -> Outcome:
    """Call ``function`` on ``len(moments)`` gloo ranks.

    Args:
        watched: functions whose lines count, those of their lambdas too.
        moments: for each rank, the line before which it kills itself; None: it goes on. Once a rank is dead the
            others are killed as well, as torchrun does, wherever they are.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            _fork.Process(target=_child, args=(rank, len(moments), Path(folder), function, watched, moment))
            for rank, moment in enumerate(moments)
        ]
        for process in ranks:
            process.start()
        multiprocessing.connection.wait([process.sentinel for process in ranks])
        for process in ranks:
            if any(other.exitcode for other in ranks):
                process.kill()
            process.join()
        found = [Path(folder, f"{rank}.lines") for rank in range(len(moments))]
        return Outcome(
            [process.exitcode or 0 for process in ranks],
            [int(path.read_text()) for path in found if path.is_file()],
            "".join(path.read_text() for path in sorted(Path(folder).glob("*.log"))),
        )


def _child(
    rank: int,
    world: int,
    folder: Path,
    function: Callable[[], Any],
    watched: Sequence[Callable[..., Any]],
    moment: int | None,
) -> None:
    import torch
    import torch.distributed as dist

    from megatron_embed.bridge.cpu import host

    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(GLOO_SOCKET_IFNAME="lo", LOCAL_WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    host.run_on_cpu()
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    counter = _LineCounter(watched, moment)
    sys.settrace(counter.call)
    try:
        function()
    finally:
        sys.settrace(None)
        (folder / f"{rank}.lines").write_text(str(counter.count))


class _LineCounter:
    def __init__(self, watched: Sequence[Callable[..., Any]], moment: int | None) -> None:
        self.codes = {code for function in watched for code in (function.__code__, *_lambdas(function.__code__))}
        self.count, self.moment = 0, moment

    def call(self, frame: FrameType, event: str, _argument: Any) -> Any:
        return self.line if frame.f_code in self.codes else None

    def line(self, frame: FrameType, event: str, _argument: Any) -> Any:
        if event == "line":
            self.count += 1
            if self.count == self.moment:
                os.kill(os.getpid(), signal.SIGKILL)
        return self.line


def _lambdas(code: CodeType) -> list[CodeType]:
    return [value for value in code.co_consts if isinstance(value, CodeType) and value.co_name == "<lambda>"]
