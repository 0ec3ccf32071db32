"""Search for the rank that is gone or does not answer, and for the place where each rank stood.

A broken connection does not name them. So each rank keeps a note in the store through which torch's ranks found one
another: its host, its process, where it stands, and how it ended if it did. In a healthy run this costs one short
message per part of a step, without waiting for an answer. When a connection breaks or a collective runs out of time,
the live ranks read each other's notes.
"""

from __future__ import annotations

import faulthandler
import json
import os
import select
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_embed.bridge.errors import reason

T = TypeVar("T")

#: seconds that the first rank to notice waits for the other ranks' notes; those notice within a part of a step
PATIENCE = 30.0
_TERMINATED = "ended by SIGTERM"


@dataclass
class Note:
    """A rank's message about itself.

    Attributes:
        processes: the namespace of its process number; containers on one host have different ones.
        where: the part of the work that it is in.
        met: the broken connection that it met, if any.
        end: the message with which it ended, if it did.
    """

    rank: int
    host: str
    pid: int
    processes: str
    where: str = "the start"
    met: str | None = None
    end: str | None = None


class _World:
    def __init__(self, store: Any, rank: int, size: int, minutes: float, limited: bool) -> None:
        self.own = Note(rank, socket.gethostname(), os.getpid(), _processes())
        self.minutes, self.limited = minutes, limited
        self.since = time.monotonic()
        self.stacks: Path | None = None
        #: processes on this host that did not answer
        self.lost: list[int] = []
        self._store, self._size = store, size

    def publish(self) -> None:
        self._store.set(f"note{self.own.rank}", json.dumps(asdict(self.own)))

    def exchange(self) -> list[Note]:
        """Publish this rank's note and read the others'."""
        self.publish()
        keys = [f"note{rank}" for rank in range(self._size) if rank != self.own.rank]
        return [Note(**json.loads(self._store.get(key))) for key in keys if self._store.check([key])]


_world: _World | None = None
#: a write to this descriptor wakes the thread of :func:`watch`
_wakeup: int | None = None
#: the thread that ends this process takes this lock and never releases it
_ending = threading.Lock()


def join(store: Any, *, rank: int, size: int, minutes: float, limited: bool = False) -> None:
    """Start this rank's note.

    Args:
        store: torch's store, which all ranks share.
        minutes: time after which a rank that does not answer counts as lost.
        limited: whether a collective that runs out of time returns no error (NCCL), so that :func:`watch` must notice
            it; see :func:`stand_at`.
    """
    global _world
    _world = _World(store, rank, size, minutes, limited)
    _world.publish()
    if _wakeup is not None:
        os.write(_wakeup, b"\0")  # no signal's number: the thread only computes its sleep again


def leave() -> None:
    """End the notes: the ranks part without a fault, and their notes mean nothing from now on."""
    global _world
    _world = None


def keep_stacks_in(folder: Path) -> None:
    """Set the folder in which each rank writes its threads' stacks when a collective runs out of time."""
    if _world is not None:
        _world.stacks = folder


def stand_at(where: str, *, limited: bool = False) -> None:
    """Note the place where this rank stands.

    Args:
        where: the place, such as ``step 12, forward and backward``.
        limited: whether this part exceeds the limit of :func:`join` only when another rank does not answer.
    """
    if _world is None:
        return
    _world.own.where, _world.since = where, time.monotonic() if limited else float("inf")
    _world.publish()


def is_broken_connection(error: BaseException) -> bool:
    """Return whether another rank made a collective fail. gloo's, NCCL's and the store's errors share no type."""
    kinds = ("DistBackendError", "DistNetworkError", "DistStoreError")
    texts = ("gloo/", "Connection closed by peer", "Connection reset by peer", "NCCL error")
    return type(error).__name__ in kinds or (
        not isinstance(error, OSError) and any(text in str(error) for text in texts)
    )


def explain_broken_connection(error: BaseException) -> str:
    """Return one message for a broken connection: which rank is gone or does not answer, and where it stood.

    This waits at most :data:`PATIENCE` seconds for the notes of ranks that have not noticed yet.
    """
    why = reason(error)[:300]
    if _world is None:
        return f"the connection to another rank broke ({why})"
    world = _world
    timed_out = "timed out" in str(error).lower() or isinstance(error, TimeoutError)
    if timed_out:
        _write_stacks(world, error)
    world.own.met = why
    until = time.monotonic() + PATIENCE
    while True:
        others = _in_time(world.exchange)
        if others is None:
            return f"the connection to the other ranks broke, and so did that to their store ({why})"
        if (known := _end_of(others)) is not None:
            return known
        stopped = [note for note in others if _state(note) == "T"]
        silent = [note for note in others if note.met is None and note not in stopped]
        if not silent or time.monotonic() > until:
            break
        time.sleep(0.2)
    lost = stopped or silent
    if not lost:
        return f"every rank lost its connection to another ({why}); this one stood at {world.own.where}"
    named = "; ".join(
        f"{_name(note)} does not answer{', its process is stopped' if note in stopped else ''}: "
        f"it stood at {note.where}"
        for note in lost
    )
    world.lost = [note.pid for note in lost if _state(note) not in ("?", "")]
    waited = f" for {world.minutes:g} minutes" if timed_out else ""
    stacks = f"; what the other ranks were doing is in {world.stacks}" if timed_out and world.stacks else ""
    return f"rank {world.own.rank} waited{waited} at {world.own.where}, but {named}{stacks}"


def say_end(message: str) -> None:
    """Note that this rank ends, and why, so that the other ranks do not look for it."""
    if _world is not None and _world.own.end is None:
        _world.own.end = message
        _in_time(_world.publish)


def begin_end() -> None:
    """Return to the first thread that ends this process; hold any other thread until the process is gone.

    The main thread and that of :func:`watch` can notice one fault at the same moment. The second must not end the
    process while the first still writes its message.
    """
    _ending.acquire()


def end_lost() -> None:
    """Kill the processes on this host that did not answer: a stopped process acts on no other signal."""
    for process in _world.lost if _world is not None else []:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def watch(end: Callable[[int, str], Any]) -> None:
    """Start a thread that explains faults which this process cannot notice by itself.

    The main thread of a program calls this once. torchrun ends all ranks when it finds that one is gone, perhaps before
    they meet the broken connection. The thread sleeps until SIGTERM comes, and then looks for the rank that is gone.
    Under NCCL it also wakes when a part of the work that :func:`stand_at` calls limited exceeds the limit.

    Args:
        end: function that ends the process, with a status and a message.
    """
    global _wakeup
    read, _wakeup = os.pipe()
    os.set_blocking(_wakeup, False)
    signal.set_wakeup_fd(_wakeup, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)  # without a handler the thread would not learn of the signal
    os.register_at_fork(after_in_child=_unwatch)
    threading.Thread(target=_watch, args=(read, end), name="liveness", daemon=True).start()


def _unwatch() -> None:
    """Stop the wake-ups in a forked child: it has no such thread, and its signals are not this process's."""
    global _wakeup
    _wakeup = None
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _watch(signals: int, end: Callable[[int, str], Any]) -> None:
    while True:
        left = _seconds_left()
        ready, _, _ = select.select([signals], [], [], left)
        if ready and signal.SIGTERM in os.read(signals, 64):
            others = _in_time(_world.exchange) if _world is not None else None
            if (known := _end_of(others or [])) is not None:
                end(1, known)
            end(128 + signal.SIGTERM, _TERMINATED)
        if not ready and _seconds_left() == 0:
            end(1, explain_broken_connection(TimeoutError("a collective timed out")))


def _seconds_left() -> float | None:
    """Return how many seconds the thread may sleep before it checks again whether this rank stood for too long.

    None means for ever; 0 means that this rank did. A part with a limit can follow a part without one at any time, so
    the thread never sleeps for longer than the limit.
    """
    if _world is None or not _world.limited:
        return None
    limit = 60 * _world.minutes
    return min(max(0.0, _world.since + limit - time.monotonic()), limit)


def _end_of(others: list[Note]) -> str | None:
    """Return how another rank ended, if one did: with its own message, or without one on this host."""
    for note in others:
        if note.end not in (None, _TERMINATED):
            return f"{_name(note)} ended: {note.end}"
    gone = [note for note in others if note.end is None and _state(note) in ("", "Z", "X")]
    if not gone:
        return None
    named = "; ".join(f"{_name(note)} is gone{_signal(note)}: it stood at {note.where}" for note in gone)
    return f"{named}. It was killed, by hand or by a system out of memory; torchrun's summary names the signal"


def _name(note: Note) -> str:
    return f"rank {note.rank} ({note.host}, process {note.pid})"


def _state(note: Note) -> str:
    """Return Linux's letter for the state of a process on this host (T: stopped, Z: ended), or "" for no process."""
    if (note.host, note.processes) != (socket.gethostname(), _processes()):
        return "?"
    fields = _stat(note.pid)
    return fields[0] if fields else ""


def _processes() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return f"of process {os.getpid()}"  # equal to no other process's


def _signal(note: Note) -> str:
    """Return the name of the signal that ended a process, or "" once the parent has asked for its exit code."""
    fields = _stat(note.pid)
    number = int(fields[-1]) & 0x7F if fields else 0
    return f" ({signal.Signals(number).name})" if number in set(signal.Signals) else ""


def _stat(pid: int) -> list[str]:
    """Return fields 3 (the state) to 52 (the exit code) of ``/proc/PID/stat``."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _write_stacks(world: _World, error: BaseException) -> None:
    if world.stacks is None:
        return
    try:
        world.stacks.mkdir(parents=True, exist_ok=True)
        with (world.stacks / f"rank_{world.own.rank}.txt").open("w") as file:
            print(f"rank {world.own.rank} stood at {world.own.where}", file=file)
            traceback.print_exception(error, file=file)
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
    except OSError:
        pass  # the message matters more than the stacks


def _in_time(function: Callable[[], T], seconds: float = 10.0) -> T | None:
    """Return the result of ``function``, or None where the store does not answer in time or is gone."""
    box: list[T] = []

    def call() -> None:
        try:
            box.append(function())
        except Exception:
            return

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return box[0] if box else None
