"""Files made to do harm: refused with a message, nothing executed, nothing read outside of the folder."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hf_files import Source, edit_json, without_checksums
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.exporting import export_hf
from megatron_embed.conversion.hf.folder import HFFolder
from megatron_embed.conversion.importing import import_hf
from megatron_embed.conversion.mcore import folder as checkpoint_folder
from megatron_embed.conversion.mcore import safe_loading, statements
from megatron_embed.conversion.mcore.tensors import CheckpointReader


class Bomb:
    """Unpickling it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """It is there once a :class:`Bomb` went off."""
    path = tmp_path / "executed"
    pickle.loads(pickle.dumps(Bomb(path)))
    assert path.exists(), "the bomb itself works"
    path.unlink()
    return path


@pytest.fixture
def iter_dir(source: Source, tmp_path: Path) -> Path:
    import_hf(source("model"), tmp_path / "m", progress=False)
    return without_checksums(tmp_path / "m" / "iter_0000000")  # who does harm leaves them out, or makes others


@pytest.fixture
def model(source: Source, tmp_path: Path) -> Path:
    shutil.copytree(source("model"), tmp_path / "model")
    return tmp_path / "model"


def export_refused(iter_dir: Path, match: str) -> None:
    out = iter_dir.parent.parent / "out"
    with pytest.raises(UserError, match=match):
        export_hf(iter_dir, out, progress=False)
    assert not out.exists()


# ---- checkpoints


@pytest.mark.parametrize("where", ["alone", "planner_data", "storage_data"])
def test_metadata_that_runs_code(where: str, iter_dir: Path, mark: Path) -> None:
    path = iter_dir / ".metadata"
    metadata: Any = pickle.loads(path.read_bytes())
    if where == "alone":
        metadata = Bomb(mark)
    elif where == "planner_data":
        metadata.planner_data = {"x": Bomb(mark)}
    else:
        metadata.storage_data[MetadataIndex("x")] = Bomb(mark)
    path.write_bytes(pickle.dumps(metadata))
    export_refused(iter_dir, r"\.metadata: not this checkpoint's metadata \(it refers to pathlib.*refused")
    assert not mark.exists()


@pytest.mark.parametrize(
    "name",
    ["builtins\neval", "os\nsystem", "builtins\ngetattr", "torch\nload", "torch\n_utils", "torch.serialization\nload"],
)
def test_names_outside_of_the_list_are_not_even_looked_up(name: str, iter_dir: Path) -> None:
    (iter_dir / ".metadata").write_bytes(b"c" + name.encode() + b"\n.")
    export_refused(iter_dir, "it refers to " + name.replace("\n", "."))


def test_metadata_of_something_else(iter_dir: Path) -> None:
    for value in ({"a": 1}, Metadata({}, None, None)):
        (iter_dir / ".metadata").write_bytes(pickle.dumps(value))
        export_refused(iter_dir, "holds a (dict|Metadata), wanted DCP's Metadata")


def test_metadata_as_megatron_core_writes_it_passes(iter_dir: Path) -> None:
    """What torch and megatron-core themselves put into it: layouts, paths, save plans."""
    import torch.distributed.checkpoint as dcp

    dcp.save(
        {"a": torch.zeros(2, 3), "b": {"c": torch.ones(1, dtype=torch.bfloat16)}}, checkpoint_id=iter_dir.parent / "x"
    )
    metadata = safe_loading.safe_metadata(iter_dir.parent / "x")
    assert set(metadata.state_dict_metadata) == {"a", "b.c"}
    assert torch.equal(CheckpointReader(iter_dir.parent / "x").read("b.c"), torch.ones(1, dtype=torch.bfloat16))


def test_a_chunk_that_runs_code(iter_dir: Path, mark: Path) -> None:
    path = iter_dir / "__0_0.distcp"
    metadata: Any = pickle.loads((iter_dir / ".metadata").read_bytes())
    torch.save(Bomb(mark), path)
    for info in metadata.storage_data.values():
        info.offset, info.length = 0, path.stat().st_size
    (iter_dir / ".metadata").write_bytes(pickle.dumps(metadata))
    export_refused(iter_dir, "damaged, or more than a tensor")
    assert not mark.exists()


def test_a_chunk_outside_of_the_checkpoint(iter_dir: Path) -> None:
    shutil.copy(iter_dir / "__0_0.distcp", iter_dir.parent / "elsewhere.distcp")
    metadata: Any = pickle.loads((iter_dir / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../elsewhere.distcp"
    (iter_dir / ".metadata").write_bytes(pickle.dumps(metadata))
    export_refused(iter_dir, "outside of the checkpoint; refused")


def test_chunks_that_overlap_or_leave_holes(iter_dir: Path) -> None:
    metadata: Any = pickle.loads((iter_dir / ".metadata").read_bytes())
    entry = metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"]
    entry.chunks[1].offsets = entry.chunks[0].offsets
    (iter_dir / ".metadata").write_bytes(pickle.dumps(metadata))
    export_refused(iter_dir, "linear_fc2.weight is incomplete")


def test_common_that_runs_code(iter_dir: Path, mark: Path) -> None:
    assert safe_loading.load_common(iter_dir)["iteration"] == 0
    torch.save({"iteration": Bomb(mark)}, iter_dir / "common.pt")
    with pytest.raises(UserError, match=r"common\.pt: damaged, or holds more than tensors and plain values"):
        safe_loading.load_common(iter_dir)
    assert not mark.exists()
    (iter_dir / "common.pt").unlink()
    with pytest.raises(UserError, match="no such file"):
        safe_loading.load_common(iter_dir)


def test_the_switch_that_makes_loading_unsafe(iter_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    export_refused(iter_dir, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set")
    with pytest.raises(UserError, match="unset it"):
        safe_loading.load_common(iter_dir)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0")
    safe_loading.load_common(iter_dir)


def test_run_config_that_runs_code(iter_dir: Path, mark: Path) -> None:
    """Megatron-Bridge tags Python classes in its own; here a tag makes nothing."""
    text = f"a: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{mark}']]\n"
    (iter_dir / checkpoint_folder.RUN_CONFIG).write_text(text)
    assert statements.read_run_config(iter_dir) == {}
    assert not mark.exists()


# ---- HF folders


def raw_safetensors(header: dict[str, Any] | bytes, data: bytes = b"\0" * 64) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "contents",
    [
        pytest.param(
            raw_safetensors({"a": entry("F32", [8], 0, 32), "b": entry("F32", [8], 16, 48)}), id="overlapping offsets"
        ),
        pytest.param((2 << 30).to_bytes(8, "little") + b"{}", id="header of 2 GB"),
        pytest.param(raw_safetensors({"a": entry("F32", [8], 0, 16)}, b"\0" * 16), id="dtype lies"),
        pytest.param(raw_safetensors({"a": entry("F32", [1 << 62, 8], 0, 64)}), id="shape overflows"),
        pytest.param(raw_safetensors({"a": entry("F32", [8], 0, 32)}, b"\0" * 99), id="bytes that belong to nothing"),
        pytest.param(raw_safetensors(b"\xff" * 20), id="header is no JSON"),
    ],
)
def test_unsound_safetensors(contents: bytes, model: Path) -> None:
    (model / "model.safetensors").write_bytes(contents)
    with pytest.raises(UserError, match=r"model\.safetensors: not a sound safetensors file"):
        HFFolder(model)


def test_a_pickle_called_safetensors(model: Path, mark: Path) -> None:
    torch.save(Bomb(mark), model / "model.safetensors")
    with pytest.raises(UserError, match="it is a pickle, which is not opened"):
        HFFolder(model)
    (model / "model.safetensors").write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(UserError, match="it is a pickle, which is not opened"):
        HFFolder(model)
    assert not mark.exists()


def test_pickled_weights_only(model: Path, mark: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save(Bomb(mark), model / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickled weights only \(pytorch_model\.bin\).*Convert them to safetensors"):
        HFFolder(model)
    assert not mark.exists()


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/passwd", "a/../../b.safetensors", "", "C:\\x.safetensors", 7]
)
def test_an_index_that_climbs_out(file: object, source: Source, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(source("model", max_shard_size="40KB"), folder)
    edit_json(folder / "model.safetensors.index.json", lambda index: index["weight_map"].update({"norm.weight": file}))
    with pytest.raises(UserError, match=r"norm\.weight is said to lie in .* outside of the folder; refused"):
        HFFolder(folder)


def test_an_index_naming_a_pickle(source: Source, tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(source("model", max_shard_size="40KB"), folder)
    edit_json(
        folder / "model.safetensors.index.json", lambda index: index["weight_map"].update({"norm.weight": "a.bin"})
    )
    with pytest.raises(UserError, match=r"wanted a \.safetensors file"):
        HFFolder(folder)
