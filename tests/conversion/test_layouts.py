"""Checkpoints and HF folders in real Megatron models: any layout in, any layout out, each rank its own bytes only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.hf_files import Source, assert_same_bits, encoder_tensors_of, tensors_of
from support.megatron import filled_stages
from support.worlds import run_world
from test_automodel import consolidated

from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.encoder import EncoderStage, build_stages, transformer_config
from megatron_embed.bridge.layout import Layout
from megatron_embed.bridge.parallel import parallel_world
from megatron_embed.conversion.exporting import export_hf
from megatron_embed.conversion.hf.folder import HFFolder
from megatron_embed.conversion.importing import import_hf

pytestmark = pytest.mark.slow

LAYOUTS = (Layout(tp=2, pp=2), Layout(tp=4), Layout(pp=2), Layout(tp=2, pp=2, vpp=2))
SHAPE = {"num_hidden_layers": 4, "dtype": "float32"}
FORMS: dict[str, dict[str, Any]] = {
    "stacked": {"singleton_local_shards": False},
    "bridge": {"non_homogeneous_layers": True, "singleton_local_shards": False},
    "singleton": {"singleton_local_shards": True},
}


def empty_stages(config: EncoderConfig, layout: Layout) -> list[EncoderStage]:
    encoders = build_stages(config, transformer_config(config, layout, dtype=torch.float32))
    with torch.no_grad():
        for encoder in encoders:
            for parameter in encoder.parameters():
                parameter.fill_(float("nan"))
    return encoders


def assert_equal_stages(found: list[EncoderStage], wanted: list[EncoderStage], what: str) -> None:
    for a, b in zip(found, wanted, strict=True):
        theirs = dict(b.named_parameters())
        assert list(theirs) == [name for name, _ in a.named_parameters()]
        for name, parameter in a.named_parameters():
            assert torch.equal(parameter, theirs[name]), f"{what}: {name}"


def in_each_layout(folder: str, others: list[str], checkpoints: list[str], out: str) -> list[tuple[str, int, int]]:
    """Returns, for each layout, the bytes that this rank requested and those of its own parameters."""
    with parallel_world(LAYOUTS[0]):
        for other in others:
            _direct(other, LAYOUTS[0])
    return _all_of_one(folder, checkpoints, out)


def _direct(folder: str, layout: Layout) -> None:
    from megatron.core import parallel_state

    from megatron_embed.conversion.mcore.direct import load_hf_weights

    source = HFFolder(folder)
    config = source.encoder_config()
    wanted = filled_stages(config, layout, encoder_tensors_of(Path(folder)))
    encoders = empty_stages(config, layout)
    stages = [(encoder, encoder.layer_offset) for encoder in encoders]
    rank = parallel_state.get_tensor_model_parallel_rank()
    load_hf_weights(stages, source, config, tp_rank=rank, tp_size=layout.tp)
    assert_equal_stages(encoders, wanted, f"{folder} at {layout}")


def _all_of_one(folder: str, checkpoints: list[str], out: str) -> list[tuple[str, int, int]]:
    from megatron.core import dist_checkpointing, parallel_state

    from megatron_embed.conversion.mcore import folder as checkpoint_folder
    from megatron_embed.conversion.mcore.direct import load_hf_weights
    from megatron_embed.conversion.mcore.model_state import load_model_state

    config = HFFolder(folder).encoder_config()
    state, read = encoder_tensors_of(Path(folder)), []
    for layout in LAYOUTS:
        with parallel_world(layout):
            wanted = filled_stages(config, layout, state)
            rank = parallel_state.get_tensor_model_parallel_rank()
            source, encoders = HFFolder(folder), empty_stages(config, layout)
            stages = [(encoder, encoder.layer_offset) for encoder in encoders]
            load_hf_weights(stages, source, config, tp_rank=rank, tp_size=layout.tp)
            assert_equal_stages(encoders, wanted, f"direct at {layout}")
            own = sum(p.numel() * p.element_size() for encoder in encoders for p in encoder.parameters())
            read.append((str(layout), source.bytes_requested, own))
            for checkpoint in checkpoints:
                encoders = empty_stages(config, layout)
                load_model_state(checkpoint_folder.resolve(checkpoint), encoders)
                assert_equal_stages(encoders, wanted, f"{checkpoint} at {layout}")
            if layout.vpp is None:
                for form in FORMS if layout == LAYOUTS[0] else ["stacked"]:
                    iter_dir = Path(out) / f"{form}-{layout.tp}-{layout.pp}" / "iter_0000000"
                    _save(
                        wanted, iter_dir, form, FORMS[form], dist_checkpointing, first=torch.distributed.get_rank() == 0
                    )
    return read


def _save(
    encoders: list[EncoderStage],
    iter_dir: Path,
    form: str,
    metadata: dict[str, Any],
    dist_checkpointing: Any,
    *,
    first: bool,
) -> None:
    """As megatron-core itself writes it; ``bridge`` with Megatron-Bridge's names."""
    if first:
        iter_dir.mkdir(parents=True)
    torch.distributed.barrier()
    from megatron.core import parallel_state
    from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    sharded = encoders[0].sharded_state_dict(metadata={**metadata, "dp_cp_group": group})
    if form == "bridge":
        add_prefix_for_sharding(sharded, "language_model.")
    dist_checkpointing.save({"model": sharded}, str(iter_dir))


@pytest.fixture(scope="module")
def world(source: Source, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[Any]]:
    """(source, folder of the checkpoints that were saved, what each rank returned)"""
    folder, tmp = source("vlm", **SHAPE), tmp_path_factory.mktemp("layouts")
    checkpoints = []
    for tp, pp in ((1, 1), (2, 2), (4, 1)):
        checkpoints.append(str(tmp / f"imported-{tp}-{pp}"))
        import_hf(folder, checkpoints[-1], tp=tp, pp=pp, with_vision=tp == 2, progress=False)
    others = [str(source("llama_causal_lm", tie_word_embeddings=False, dtype="float32"))]
    others.append(str(consolidated(source("llama_model"), tmp / "consolidated", prefix="model.")))
    return folder, tmp, run_world(in_each_layout, 4, str(folder), others, checkpoints, str(tmp))


def test_imports_and_folders_load_under_every_layout(world: tuple[Path, Path, list[Any]]) -> None:
    """The comparisons are made in the ranks; here: that they were made."""
    assert all([name for name, _, _ in read] == [str(layout) for layout in LAYOUTS] for read in world[2])


def test_each_rank_reads_its_own_bytes(world: tuple[Path, Path, list[Any]]) -> None:
    for read in world[2]:
        for layout, requested, own in read:
            assert requested == pytest.approx(own, rel=0.1), layout


@pytest.mark.parametrize("saved", ["stacked-2-2", "stacked-4-1", "stacked-1-2", "bridge-2-2", "singleton-2-2"])
def test_what_megatron_core_saves_can_be_exported(
    saved: str, world: tuple[Path, Path, list[Any]], tmp_path: Path
) -> None:
    """Padded vocabularies, local-spec objects, layers stacked or numbered, Megatron-Bridge's prefix, no run_config."""
    folder, tmp, _ = world
    export_hf(tmp / saved / "iter_0000000", tmp_path / "hf", hf_model=folder, progress=False)
    assert_same_bits(tensors_of(tmp_path / "hf"), encoder_tensors_of(folder))


def test_the_checkpoint_has_megatron_cores_keys_and_shapes(world: tuple[Path, Path, list[Any]]) -> None:
    from megatron_embed.conversion.mcore.tensors import CheckpointReader

    ours = CheckpointReader(world[1] / "imported-1-1" / "iter_0000000")
    theirs = CheckpointReader(world[1] / "stacked-1-2" / "iter_0000000")
    names = [name for name in theirs.names() if not name.endswith("_extra_state")]
    assert ours.names() == names
    assert {name: ours.shape(name) for name in names} == {name: theirs.shape(name) for name in names}
