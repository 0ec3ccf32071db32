"""Arrow tables of the content of data files: written once, kept in a cache folder and mapped into memory afterwards.

A cache entry belongs to files in a certain state: their paths, sizes, times, and first and last bytes. Hashing whole
files would read all of the data at every start. The file system's time of the last change (ctime) cannot be set back,
unlike the time of the last write, so no change is missed. A start never fails because of the cache: it rebuilds a
damaged entry. Nothing is ever unpickled.
"""

from __future__ import annotations

import bisect
import fcntl
import hashlib
import io
import json
import logging
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow

from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.files.atomic import atomic_output, save_array

#: version of the stored content; raise it whenever that content or the reading of rows changes
VERSION = 7
#: Smaller files are not cached: they take less than a second, and small runs and tests leave no files in a home folder.
LEAST_BYTES = 16 << 20

#: Most rows of a record batch, and about its bytes: few, so that the columns of a row are near each other on disk.
_ROWS, _BYTES = 1024, 1 << 16
_OPEN = 64  # record batches whose columns are cached
_BLOCK = 1 << 16  # bytes at each end of a file that are part of its stamp
_complained: set[Path] = set()
_TABLE, _FACTS, _DIGESTS = "rows.arrow", "facts.json", "digests.json"

Stamp = list[Any]


class TableWriter:
    """A writer of rows as record batches of an Arrow file.

    Attributes:
        ends: number of rows up to and including each record batch.
        columns: added rows → their values in each column of the schema.
    """

    def __init__(self, file: Any, schema: pyarrow.Schema) -> None:
        self._schema, self._writer = schema, pyarrow.ipc.new_file(file, schema)
        self._rows: list[Any] = []
        self.columns: Callable[[list[Any]], Iterable[Sequence[Any]]] = lambda rows: zip(*rows, strict=True)
        self._together = 1  # rows of the next batch, from the size of those before
        self.ends: list[int] = []

    def add(self, row: Any) -> None:
        """Write the next row, one value for each column unless ``columns`` takes others."""
        self._rows.append(row)
        if len(self._rows) >= self._together:
            self._flush()

    def close(self) -> None:
        """Write the remaining rows and the index of the batches."""
        if self._rows:
            self._flush()
        self._writer.close()

    def _flush(self) -> None:
        columns = zip(self._schema, self.columns(self._rows), strict=True)
        arrays = [pyarrow.array(values, column.type) for column, values in columns]
        batch = pyarrow.record_batch(arrays, schema=self._schema)
        self._writer.write_batch(batch)
        self.ends.append((self.ends[-1] if self.ends else 0) + len(self._rows))
        fitting = len(self._rows) * _BYTES // max(batch.nbytes, 1)
        self._together = max(1, min(fitting, 2 * self._together, _ROWS))
        self._rows = []


class Table:
    """Rows of record batches in memory or mapped into it, with access by number.

    Args:
        content: an Arrow file.
        ends: number of rows up to and including each record batch; saves a scan of all batches.
    """

    def __init__(self, content: Any, ends: list[int]) -> None:
        self._reader, self._ends = pyarrow.ipc.open_file(pyarrow.py_buffer(content)), ends
        self.names: list[str] = self._reader.schema.names
        self._columns = lru_cache(_OPEN)(lambda number: self._reader.get_batch(number).columns)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def row(self, index: int) -> list[Any]:
        """Return the values of a row, one for each column."""
        columns, within = self._find(index)
        return [column[within].as_py() for column in columns]

    def value(self, name: str, index: int) -> Any:
        """Return a row's value in one column."""
        columns, within = self._find(index)
        return columns[self.names.index(name)][within].as_py()

    def values(self, *names: str) -> Iterator[tuple[Any, ...]]:
        """Yield every row's values in these columns."""
        for number in range(len(self._ends)):
            batch = self._reader.get_batch(number)
            yield from zip(*(batch.column(name).to_pylist() for name in names), strict=True)

    def _find(self, index: int) -> tuple[list[Any], int]:
        """Return the columns of a row's batch, and the row's place in it."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._ends, index)
        return self._columns(number), index - (self._ends[number - 1] if number else 0)


@dataclass(frozen=True)
class Found:
    """Findings of a full read of files, beside their rows.

    Attributes:
        arrays: name → array; none is empty, and mapped ones are read-only.
        facts: name → a value that JSON can hold.
    """

    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """The way a table is built from files.

    Attributes:
        kind: distinguishes several tables of the same files.
        path: the files' name in messages.
        files: the files that hold the rows; without files, or with small ones, no entry is kept.
        build: writes the rows and returns its other findings.
        others: facts of an entry → other files that the rows depend on; with None it reads ``files`` to find them.
    """

    kind: str
    path: str
    files: Sequence[Path]
    schema: pyarrow.Schema
    build: Callable[[TableWriter], Found]
    others: Callable[[Mapping[str, Any] | None], Sequence[Path]] = lambda _: ()


def open_table(recipe: Recipe) -> tuple[Table, Found]:
    """Return the rows of files as a table, from the cache or newly written.

    If several processes on one machine open the same table at once, the first writes it and the others wait. An error
    of ``build`` keeps no entry, so every start raises it anew.

    Raises:
        UserError: ``build`` raises it, a file changed while it was read, or there is no room for the table.
    """
    before = stamps(recipe.files)
    paths = [path for path, *_ in before]
    place = cache_folder() / f"tables-{VERSION}" / f"{recipe.kind}-{_digest(paths)}" / _digest(before)
    if before and (found := _load(place, recipe)) is not None:
        return found
    read = [*recipe.files, *recipe.others(None)]
    if not before or sum(path.stat().st_size for path in read) < LEAST_BYTES:
        memory = io.BytesIO()
        built = _built(recipe, memory, before)
        return Table(memory.getbuffer(), built.facts["batches"]), built
    with _turn(place.parent):
        if (found := _load(place, recipe)) is not None:
            return found
        try:
            _store(place, recipe, before)
        except OSError as error:
            if not place.exists():  # otherwise another process wrote it first
                _complain(error)
    return _load(place, recipe) or _unkept(recipe, before)


def _built(recipe: Recipe, file: Any, before: list[Stamp]) -> Found:
    """Write the table of files with the stamps ``before``, and check that they did not change."""
    others = list(recipe.others(None))
    of_others = stamps(others)

    def check_unchanged() -> None:
        if (stamps(recipe.files), stamps(others)) != (before, of_others):
            raise UserError(f"{recipe.path}: was written to while it was read; start again when it is whole")

    try:
        writer = TableWriter(file, recipe.schema)
        built = recipe.build(writer)
        writer.close()
    except UserError:
        check_unchanged()  # a change of the files explains the error better
        raise
    check_unchanged()
    return Found(built.arrays, {**built.facts, "others": of_others, "batches": writer.ends})


def _unkept(recipe: Recipe, before: list[Stamp]) -> tuple[Table, Found]:
    """Build a table in an unnamed file, which vanishes when the process ends."""
    try:
        with tempfile.TemporaryFile() as file:
            built = _built(recipe, file, before)
            file.flush()
            return Table(_mapped(file), built.facts["batches"]), built
    except OSError as error:
        raise UserError(
            f"{recipe.path}: no room for its table in {cache_folder()} nor in {tempfile.gettempdir()} ({error}); name "
            f"a folder on a disk with room in MEGATRON_EMBED_CACHE"
        ) from None


def _mapped(file: Any) -> mmap.mmap:
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def cache_folder() -> Path:
    """Return ``$MEGATRON_EMBED_CACHE``, or ``megatron-embed`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if named := os.environ.get("MEGATRON_EMBED_CACHE"):
        return Path(os.path.abspath(os.path.expanduser(named)))
    above = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.path.abspath(above)) / "megatron-embed"


def stamps(files: Sequence[Path]) -> list[Stamp]:
    """Return the stamp of each file, or an empty list if a file cannot be read.

    A stamp is the absolute path, the size, the times of the last write and of the last change, and a hash of the first
    and last bytes.
    """
    found = []
    try:
        for path in files:
            with path.open("rb") as file:
                state = os.fstat(file.fileno())
                times = [state.st_mtime_ns, state.st_ctime_ns]
                found.append([os.path.abspath(path), state.st_size, *times, _hash_of_ends(file, state.st_size)])
    except OSError:
        return []  # build meets the same error and reports it
    return found


def _hash_of_ends(file: BinaryIO, size: int) -> str:
    ends = hashlib.sha256(file.read(_BLOCK))
    file.seek(max(size - _BLOCK, 0))
    ends.update(file.read(_BLOCK))
    return ends.hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Let the first process go ahead; processes that come meanwhile wait for it and then continue in parallel.

    Thus only one rank of a machine builds the table, and only its memory is used. If it fails, the others need not wait
    for each other. Without locks (read-only folders, some network folders) all go ahead.
    """
    lock = -1
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(lock, fcntl.LOCK_SH)
    try:
        yield
    finally:
        if lock >= 0:
            os.close(lock)


def _load(place: Path, recipe: Recipe) -> tuple[Table, Found] | None:
    """Map an entry into memory.

    Return None if there is no entry, it differs from what was written, or another file that it depends on changed.
    """
    try:
        digests = json.loads((place / _DIGESTS).read_text(encoding="utf-8"))
        if not isinstance(digests, dict) or not {_TABLE, _FACTS} <= digests.keys():
            return None
        if any(_file_digest(place / name) != digest for name, digest in digests.items()):
            return None
        facts = json.loads((place / _FACTS).read_text(encoding="utf-8"))
        if facts["others"] != stamps(recipe.others(facts)):
            return None
        arrays = {
            name.removesuffix(".npy"): np.load(place / name, mmap_mode="r", allow_pickle=False).view(np.ndarray)
            for name in digests
            if name.endswith(".npy")
        }
        with (place / _TABLE).open("rb") as file:
            table = Table(_mapped(file), facts["batches"])
        return (table, Found(arrays, facts)) if table.names == recipe.schema.names else None
    except (OSError, ValueError):  # Arrow's errors are subclasses of ValueError
        return None


def _store(place: Path, recipe: Recipe, before: list[Stamp]) -> None:
    """Write an entry, and remove the entries of the same files in other states.

    Raises:
        OSError: the entry cannot be written.
        UserError: the recipe's ``build`` raises it.
    """
    shutil.rmtree(place, ignore_errors=True)  # removes a damaged entry, if there is one
    with ExitStack() as stack:
        try:
            # Without locks, another process may have written the same entry meanwhile.
            partial = stack.enter_context(atomic_output(place, overwrite=True, refuse=lambda _: None))
        except UserError as error:
            raise OSError(str(error)) from None
        with pyarrow.output_stream(partial / _TABLE, buffer_size=1 << 20) as file:
            built = _built(recipe, file, before)
        for name, array in built.arrays.items():
            with (partial / f"{name}.npy").open("wb") as file:
                save_array(file, array)
        (partial / _FACTS).write_text(json.dumps(dict(built.facts)), encoding="utf-8")
        names = (_TABLE, _FACTS, *(f"{name}.npy" for name in built.arrays))
        digests = {name: _file_digest(partial / name) for name in names}
        (partial / _DIGESTS).write_text(json.dumps(digests), encoding="utf-8")
    for old in place.parent.iterdir():
        if old != place and not old.name.startswith("."):
            shutil.rmtree(old, ignore_errors=True)


def _file_digest(path: Path) -> str:
    """Return the digest of a file; for a table use only its size and both ends, which hold its index.

    Hashing the whole table would read all of it at every start.
    """
    with path.open("rb") as file:
        if path.name != _TABLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        size = os.fstat(file.fileno()).st_size
        return f"{size} {_hash_of_ends(file, size)}"


def _complain(error: Exception) -> None:
    """Log a failure of the cache, once for each program and folder."""
    folder = cache_folder()
    if folder not in _complained and os.environ.get("LOCAL_RANK", "0") == "0":
        hint = f"not kept in {folder} ($MEGATRON_EMBED_CACHE), so every start reads all training data: {error}"
        logging.getLogger(__name__).warning(hint)
    _complained.add(folder)
