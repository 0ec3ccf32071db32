"""Vectors on disk: a folder of ``.npy`` shards with ids, and a manifest that describes them and marks complete ones.

The folder stays valid whenever and however a writer ends: a file gets its name after all of it is on disk, and a shard
counts once the manifest marks it as complete.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.files.atomic import atomic_file, save_array
from megatron_embed.conversion.files.disk_errors import NO_SPACE

FORMAT, MANIFEST, CALIBRATION = "megatron-embed vectors 1", "manifest.json", "calibration.npy"

#: precision → dtype on disk; binary vectors have 8 numbers in one byte
DTYPES = {"float32": "float32", "float16": "float16", "int8": "int8", "binary": "int8", "ubinary": "uint8"}


@dataclass(frozen=True)
class Shard:
    """Rows ``first`` to ``first + rows - 1`` of the input, in its order."""

    vectors: str
    ids: str
    first: int
    rows: int
    complete: bool = False


@dataclass(frozen=True)
class Manifest:
    """The content of a folder.

    Attributes:
        fingerprint: everything that the vectors depend on; see ``fingerprints.fingerprint``.
        dim: numbers in a vector, before binary vectors are packed.
    """

    fingerprint: dict[str, Any]
    rows: int
    dim: int
    precision: str
    shards: list[Shard] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return all(shard.complete for shard in self.shards)

    @property
    def width(self) -> int:
        """Number of columns on disk."""
        return -(-self.dim // 8) if self.precision.endswith("binary") else self.dim

    def with_complete(self, numbers: set[int]) -> Manifest:
        """Return a copy in which these shards are complete."""
        shards = [replace(s, complete=s.complete or number in numbers) for number, s in enumerate(self.shards)]
        return replace(self, shards=shards)

    def write(self, folder: Path) -> None:
        """Replace the folder's manifest in one step."""
        value = {"format": FORMAT, "complete": self.complete, "dtype": DTYPES[self.precision], **asdict(self)}
        text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
        write_file(folder / MANIFEST, lambda file: file.write(text.encode()))

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """Read the folder's manifest; return None if it has none.

        Raises:
            UserError: the file is damaged or belongs to another program.
        """
        path = folder / MANIFEST
        if not path.is_file():
            return None
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if value.get("format") != FORMAT:
                raise ValueError(f"format {value.get('format')!r}, wanted {FORMAT!r}")
            shards = [Shard(**shard) for shard in value["shards"]]
            return cls(value["fingerprint"], value["rows"], value["dim"], value["precision"], shards)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a manifest of vectors ({error}); give another folder") from None


def plan_shards(rows: int, shard_rows: int) -> list[Shard]:
    """Cut ``rows`` into equal shards of at most ``shard_rows`` rows."""
    count = max(1, -(-rows // shard_rows))
    bounds = [rows * number // count for number in range(count + 1)]
    return [
        Shard(
            f"vectors-{number:05d}.npy", f"ids-{number:05d}.json", bounds[number], bounds[number + 1] - bounds[number]
        )
        for number in range(count)
    ]


def write_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a temporary file beside ``path``, flush it to disk and rename it.

    Raises:
        UserError: the disk is full, or ``write`` raises it; no file is left behind.
    """
    try:
        with atomic_file(path) as file:
            write(file)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise UserError(
            f"{path}: cannot be written ({error.strerror}). What was complete is kept: "
            f"make room and run the same command again"
        ) from None


def write_array(path: Path, values: np.ndarray) -> None:
    """Write an ``.npy`` file in one step.

    Raises:
        UserError: the disk is full.
    """
    write_file(path, lambda file: save_array(file, values))


class VectorFolder:
    """A complete folder, read shard by shard; vectors stay on disk until they are used.

    Raises:
        UserError: the folder does not exist, or its encoding is incomplete.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        manifest = Manifest.read(self.folder)
        if manifest is None:
            raise UserError(f"{folder}: no {MANIFEST}; wanted a folder written by megatron_embed.recipes.encode")
        if not manifest.complete:
            missing = sum(not shard.complete for shard in manifest.shards)
            raise UserError(f"{folder}: {missing} of {len(manifest.shards)} shards are missing; run the encoding again")
        self.manifest = manifest
        calibration = self.folder / CALIBRATION
        self.ranges = np.load(calibration, allow_pickle=False) if manifest.precision == "int8" else None

    def __len__(self) -> int:
        return self.manifest.rows

    def shard(self, number: int) -> np.ndarray:
        """Return the vectors ``[rows, width]`` of a shard as on disk, mapped into memory."""
        return np.load(self.folder / self.manifest.shards[number].vectors, mmap_mode="r", allow_pickle=False)

    def ids(self, number: int) -> list[str]:
        """Return the ids of a shard's rows."""
        return json.loads((self.folder / self.manifest.shards[number].ids).read_text(encoding="utf-8"))

    def rows(self, first: int, last: int) -> np.ndarray:
        """Return the rows ``first`` to ``last - 1`` across shards, as on disk."""
        parts = [
            self.shard(number)[max(first - shard.first, 0) : max(last - shard.first, 0)]
            for number, shard in enumerate(self.manifest.shards)
            if shard.first < last and first < shard.first + shard.rows
        ]
        return np.concatenate(parts) if parts else self.shard(0)[:0]

    def __iter__(self) -> Iterator[tuple[list[str], np.ndarray]]:
        for number in range(len(self.manifest.shards)):
            yield self.ids(number), self.shard(number)


def is_whole(folder: Path, manifest: Manifest, shard: Shard) -> bool:
    """Return whether the shard's files match the manifest; a file may have been truncated later."""
    try:
        found = np.load(folder / shard.vectors, mmap_mode="r", allow_pickle=False)
        ids = json.loads((folder / shard.ids).read_text(encoding="utf-8"))
    except (OSError, ValueError, EOFError):
        return False
    wanted = (shard.rows, manifest.width), np.dtype(DTYPES[manifest.precision])
    return (found.shape, found.dtype) == wanted and len(ids) == shard.rows


def fingerprint_differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return the differences between two fingerprints, with long values shortened."""

    def short(value: Any) -> str:
        text = repr(value)
        return text if len(text) <= 40 else f"{text[:16]}…"

    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    return [f"{name} {short(found.get(name))}, now {short(wanted.get(name))}" for name in names]


def quantize(vectors: np.ndarray, precision: str, ranges: np.ndarray | None = None) -> np.ndarray:
    """Convert fp32 vectors to another precision, with the numbers of sentence-transformers' ``quantize_embeddings``.

    Args:
        ranges: ``[2, dim]`` least and greatest value of each dimension, for int8; values outside are clipped.
    """
    if precision == "int8":
        assert ranges is not None
        starts = ranges[0]
        steps = (ranges[1] - starts) / 255
        steps = np.where(steps == 0, 1, steps)
        return (np.clip(np.floor((vectors - starts) / steps), 0, 255) - 128).astype(np.int8)
    if precision == "binary":
        return (np.packbits(vectors > 0, axis=-1).astype(np.int16) - 128).astype(np.int8)
    if precision == "ubinary":
        return np.packbits(vectors > 0, axis=-1)
    return vectors.astype(DTYPES[precision])
