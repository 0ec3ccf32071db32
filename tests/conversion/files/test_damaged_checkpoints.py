"""A checkpoint with a damaged file is told from a sound one, by its name, by whatever reads it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.damage import DAMAGES
from support.runs import make_inputs, read_metrics, recipe

from megatron_embed.bridge.cpu import host
from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.exporting import export_hf
from megatron_embed.conversion.files.checksums import (
    BLOCK,
    CHECKSUMS,
    Checksums,
    DamagedCheckpoint,
    Summing,
    write_checksums,
)
from megatron_embed.conversion.mcore import folder as checkpoint_folder
from megatron_embed.conversion.verify import verify
from megatron_embed.recipes import Encoder
from megatron_embed.recipes.training.loop import train

pytestmark = pytest.mark.slow

EXACT = ("step", "loss", "grad_norm", "learning_rate")
#: one of every kind that a checkpoint of a training run holds
KINDS = (
    ".metadata",
    "common.pt",
    "metadata.json",
    "__0_0.distcp",
    "__0_1.distcp",
    "run_config.yaml",
    "hf/config.json",
    "hf/tokenizer.json",
    CHECKSUMS,
)


def steps(folder: Path, name: str, count: int, *overrides: str) -> list[list[Any]]:
    """Train to ``count`` steps, saving every second; what metrics.jsonl then tells."""
    common = ("optimizer.warmup_iters=1", "train.save_interval=2")
    train(recipe(folder, name, f"train.train_iters={count}", *common, *overrides))
    return [[record[key] for key in EXACT] for record in read_metrics(folder / name)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``run``, of four steps with two checkpoints."""
    host.run_on_cpu()
    path = tmp_path_factory.mktemp("damage")
    make_inputs(path)
    steps(path, "run", 4)
    return path


@pytest.fixture
def run(folder: Path) -> Path:
    """As it was after four steps, in the place that its config names."""
    whole, target = folder / "whole", folder / "run"
    if not whole.exists():
        shutil.copytree(target, whole)
    shutil.rmtree(target)
    return Path(shutil.copytree(whole, target))


def newest(run: Path) -> Path:
    return checkpoint_folder.iteration_folder(run / "checkpoints", 4)


READERS: dict[str, Callable[[Path, Path], object]] = {
    "train": lambda folder, run: steps(folder, run.name, 6),
    "export": lambda folder, run: export_hf(run, folder / "out", progress=False),
    "verify": lambda folder, run: verify(folder / "model", megatron_path=run, progress=False),
    "encode": lambda folder, run: Encoder.from_pretrained(run, device="cpu"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_is_named_with_the_newest_sound_checkpoint(
    name: str, damage: str, folder: Path, run: Path
) -> None:
    path = newest(run) / name
    DAMAGES[damage](path)
    if (name, damage) == (CHECKSUMS, "missing"):
        Encoder.from_pretrained(run, device="cpu").close()  # as an older checkpoint
        return
    for reader, read in READERS.items():
        with pytest.raises(UserError) as refused:
            read(folder, run)
        message = str(refused.value)
        assert message.startswith(f"{path}: "), reader
        assert f"the newest sound checkpoint before it is {run / 'checkpoints' / 'iter_0000002'}" in message
        if name != CHECKSUMS:
            size = path.stat().st_size if path.exists() else 0
            wanted = {
                "flipped": r"bytes [\d,]+ to [\d,]+ are not those that were written \(checksum \w+, wanted \w+\)",
                "truncated": f"found {size:,} bytes, wanted {size + 1:,}",
                "missing": "no such file, but the checkpoint was written with it",
            }
            assert re.search(wanted[damage], message), message
    assert not (folder / "out").exists()


def test_a_checkpoint_without_checksums_loads_as_before_and_a_short_file_is_named(folder: Path, run: Path) -> None:
    for path in (run / "checkpoints").glob(f"iter_*/{CHECKSUMS}"):
        path.unlink()
    Encoder.from_pretrained(run, device="cpu").close()
    path = newest(run) / "__0_1.distcp"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2])
    for read in READERS.values():
        with pytest.raises(UserError) as refused:
            read(folder, run)
        assert str(refused.value).startswith(f"{path}: damaged: found {size // 2:,} bytes, wanted at least ")
        assert f"the newest sound checkpoint before it is {run / 'checkpoints' / 'iter_0000002'}" in str(refused.value)


def test_a_damaged_older_checkpoint_is_not_called_sound(folder: Path, run: Path) -> None:
    for number in (2, 4):
        DAMAGES["flipped"](checkpoint_folder.iteration_folder(run / "checkpoints", number) / "__0_0.distcp")
    with pytest.raises(UserError, match="there is no sound checkpoint before it in"):
        steps(folder, "run", 6, "checkpoint.allow_fallback=true")


@pytest.mark.parametrize(("name", "damage"), [("__0_1.distcp", "flipped"), (".metadata", "missing"), ("", "tracker")])
def test_with_allow_fallback_a_run_goes_on_from_the_newest_sound_checkpoint(
    name: str, damage: str, folder: Path, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = steps(folder, "undisturbed", 6)
    path = newest(run) / name
    if damage == "tracker":
        path = run / "checkpoints" / checkpoint_folder.TRACKER
        path.write_text("\0")
        shutil.rmtree(newest(run))
    else:
        DAMAGES[damage](path)
    assert steps(folder, "run", 6, "checkpoint.allow_fallback=true") == whole
    assert re.search(rf"{path}: .*; going on from {run}/checkpoints/iter_0000002 instead", caplog.text), caplog.text
    assert checkpoint_folder.is_sound(newest(run))  # written anew
    Encoder.from_pretrained(run, device="cpu").close()


# ---- the checksums themselves


def sums_in_pieces(content: bytes, sizes: list[int]) -> Any:
    summing, at = Summing(), 0
    for size in sizes:
        summing.update(content[at : at + size])
        at += size
    summing.update(content[at:])
    return summing.result()


def test_sums_do_not_depend_on_the_pieces_in_which_bytes_come() -> None:
    content = bytes(range(256)) * (BLOCK // 64) + b"rest"
    whole = sums_in_pieces(content, [])
    assert (whole.bytes, len(whole.sums)) == (len(content), 5)
    assert len(set(whole.sums[:4])) == 1
    assert sums_in_pieces(content, [1, 0, BLOCK, BLOCK - 2, 1, 3]) == whole
    assert sums_in_pieces(content[: 2 * BLOCK], []).sums == whole.sums[:2]


def test_only_the_blocks_that_are_read_are_checked_and_shares_cover_all(tmp_path: Path) -> None:
    path = tmp_path / "__0_0.distcp"
    path.write_bytes(bytes(5 * BLOCK + 7))
    write_checksums(tmp_path, {})
    for block in range(6):
        content = bytearray(path.read_bytes())
        content[block * BLOCK + 3] ^= 4
        path.write_bytes(content)
        checks = Checksums.read(tmp_path)
        assert checks is not None
        checks.check_files()  # its size is right
        checks.check("__0_0.distcp", 0, block * BLOCK)
        checks.check("__0_0.distcp", (block + 1) * BLOCK, len(content))
        with pytest.raises(DamagedCheckpoint, match=rf"bytes {block * BLOCK:,} to "):
            checks.check("__0_0.distcp", block * BLOCK, block * BLOCK + 1)
        for parts in (1, 2, 4, 9):
            sound = [checkpoint_folder.is_sound(tmp_path, part=part, parts=parts) for part in range(parts)]
            assert sound.count(False) == 1
        content[block * BLOCK + 3] ^= 4
        path.write_bytes(content)
