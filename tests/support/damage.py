"""What disks and people do to files."""

from __future__ import annotations

from pathlib import Path


def flip_a_byte(path: Path) -> None:
    """In the middle of the file; its size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    """The last byte is gone."""
    path.write_bytes(path.read_bytes()[:-1])


def remove(path: Path) -> None:
    """All of it is gone."""
    path.unlink()


DAMAGES = {"flipped": flip_a_byte, "truncated": cut_short, "missing": remove}
