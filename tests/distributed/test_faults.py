"""A disk that is full or a file that is damaged, met by one of two ranks: both say the same, and nothing is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.damage import flip_a_byte
from support.full_disk import files_of_at_most
from support.runs import make_inputs, read_metrics, recipe
from support.worlds import run_world

from megatron_embed.bridge.errors import UserError


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(folder: str, *overrides: str) -> str:
    from megatron_embed.recipes import train

    with pytest.raises(UserError) as error:
        train(recipe(Path(folder), "run", *overrides))
    return str(error.value)


def scenario(folder: str) -> dict[str, Any]:
    import torch.distributed as dist

    from megatron_embed.recipes import train

    root, found = Path(folder), {}
    options = ["train.save_interval=2", "optimizer.warmup_iters=1", "model.tensor_model_parallel_size=2"]
    train(recipe(root, "undisturbed", *options, "train.train_iters=6"))
    train(recipe(root, "run", *options, "train.train_iters=2"))
    before = contents(root / "run" / "checkpoints")
    dist.barrier()
    with files_of_at_most(1 << 16 if dist.get_rank() == 1 else 1 << 30):
        found["full"] = refused(folder, *options, "train.train_iters=6")
    dist.barrier()
    found["kept"] = contents(root / "run" / "checkpoints") == before
    found["names"] = sorted(path.name for path in (root / "run" / "checkpoints").iterdir())
    train(recipe(root, "run", *options, "train.train_iters=4"))
    dist.barrier()
    if dist.get_rank() == 0:
        flip_a_byte(root / "run" / "checkpoints" / "iter_0000004" / "__1_0.distcp")
    dist.barrier()
    found["damaged"] = refused(folder, *options, "train.train_iters=6")
    train(recipe(root, "run", *options, "train.train_iters=6", "checkpoint.allow_fallback=true"))
    return found


@pytest.mark.slow
def test_both_ranks_hear_of_a_full_disk_and_of_a_damaged_file_and_nothing_is_lost(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    first, second = run_world(scenario, 2, str(tmp_path))
    checkpoints = tmp_path / "run" / "checkpoints"
    for found in (first, second):
        assert found["full"].startswith(f"{checkpoints / 'iter_0000004'}: file too large: at least 1.")
        assert " MB needed, " in found["full"]
        assert found["full"].endswith(" free; make room, or take another folder; what was there before is as it was")
        assert found["kept"]
        assert found["names"] == ["iter_0000002", "latest_checkpointed_iteration.txt"]
    assert first["damaged"] == second["damaged"]
    assert first["damaged"].startswith(f"{checkpoints / 'iter_0000004' / '__1_0.distcp'}: damaged: bytes 0 to ")
    assert f"the newest sound checkpoint before it is {checkpoints / 'iter_0000002'}" in first["damaged"]
    exact = ("step", "loss", "grad_norm", "learning_rate")
    whole, run = read_metrics(tmp_path / "undisturbed"), read_metrics(tmp_path / "run")
    assert [[record[key] for key in exact] for record in run] == [[record[key] for key in exact] for record in whole]
