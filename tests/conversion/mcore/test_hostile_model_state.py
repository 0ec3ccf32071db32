"""Checkpoints made to do harm, loaded into a real Megatron model through megatron-core: nothing of them is run."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from support.hf_files import Source
from test_hostile import Bomb, mark  # noqa: F401  (a fixture)

from megatron_embed.bridge.cpu import host
from megatron_embed.bridge.encoder import EncoderStage, build_stages, transformer_config
from megatron_embed.bridge.errors import UserError
from megatron_embed.bridge.layout import Layout
from megatron_embed.bridge.parallel import parallel_world
from megatron_embed.conversion.exporting import export_hf
from megatron_embed.conversion.hf.folder import HFFolder
from megatron_embed.conversion.importing import import_hf
from megatron_embed.conversion.mcore.model_state import load_model_state


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    host.run_on_cpu()
    with parallel_world(Layout()):
        yield


def empty_encoder(folder: Path) -> EncoderStage:
    config = HFFolder(folder).encoder_config()
    (encoder,) = build_stages(config, transformer_config(config, Layout(), dtype=torch.float32))
    return encoder


@pytest.fixture
def with_objects(source: Source, tmp_path: Path, mark: Path) -> Path:  # noqa: F811
    """As megatron-core saves it, but every object beside the tensors is a bomb."""
    sharded = empty_encoder(source("model")).sharded_state_dict()
    objects = [value for value in sharded.values() if isinstance(value, ShardedObject)]
    assert objects
    for value in objects:
        value.data = Bomb(mark)
    path = tmp_path / "objects"
    path.mkdir()
    dist_checkpointing.save({"model": sharded}, str(path))
    assert not mark.exists()
    return path


def test_objects_beside_the_tensors(with_objects: Path, source: Source, tmp_path: Path, mark: Path) -> None:  # noqa: F811
    load_model_state(with_objects, [empty_encoder(source("model"))])
    export_hf(with_objects, tmp_path / "hf", hf_model=source("model"), progress=False)
    assert not mark.exists()
    encoder = empty_encoder(source("model"))
    dist_checkpointing.load({"model": encoder.sharded_state_dict()}, str(with_objects))
    assert mark.exists(), "a plain load runs them: the bombs are where they should be"


def test_an_object_that_is_asked_for(with_objects: Path, source: Source, mark: Path) -> None:  # noqa: F811
    """An optimizer's state has objects that a load must read."""

    class Optimizer:
        def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
            sharded = empty_encoder(source("model")).sharded_state_dict()
            return {name: value for name, value in sharded.items() if isinstance(value, ShardedObject)}

    with pytest.raises(UserError, match="cannot be loaded into this model"):
        load_model_state(with_objects, [empty_encoder(source("model"))], optimizer=Optimizer())
    assert not mark.exists()


@pytest.mark.parametrize("where", [".metadata", "common.pt", "__0_0.distcp"])
def test_files_that_run_code(where: str, source: Source, tmp_path: Path, mark: Path) -> None:  # noqa: F811
    import_hf(source("model"), tmp_path / "m", progress=False)
    iter_dir = tmp_path / "m" / "iter_0000000"
    path = iter_dir / where
    if where == ".metadata":
        path.write_bytes(pickle.dumps(Bomb(mark)))
    else:
        torch.save({"iteration": Bomb(mark)}, path)
    if where.endswith(".distcp"):
        metadata: Any = pickle.loads((iter_dir / ".metadata").read_bytes())
        for info in metadata.storage_data.values():
            info.offset, info.length = 0, path.stat().st_size
        (iter_dir / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError):
        load_model_state(iter_dir, [empty_encoder(source("model"))])
    assert not mark.exists()
