"""Where an output may be: nowhere that would remove, or become part of, what it is made from."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from support.hf_files import Source, without_checksums
from support.runs import recipe, write_pairs

from megatron_embed.conversion.convert_checkpoints import main
from megatron_embed.recipes import train

Capture = pytest.CaptureFixture[str]


def run(*args: object) -> int:
    return main([*map(str, args), "--no-progress"])


def state(folder: Path) -> dict[str, str]:
    """Every path below, with what a file holds or a link names."""
    return {
        str(path): str(path.readlink()) if path.is_symlink() else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def refused(tmp_path: Path, capsys: Capture, *args: object) -> str:
    """Run; exit 1, and nothing below ``tmp_path`` is other than before. Returns the message."""
    before = state(tmp_path)
    capsys.readouterr()
    assert run(*args) == 1
    assert state(tmp_path) == before
    return capsys.readouterr().err


@pytest.fixture
def vlm(source: Source, tmp_path: Path) -> Path:
    shutil.copytree(source("vlm", dtype="bfloat16"), tmp_path / "models" / "vlm")
    return tmp_path / "models" / "vlm"


@pytest.fixture
def checkpoint(vlm: Path, tmp_path: Path) -> Path:
    assert run("import", "--hf-model", vlm, "--megatron-path", tmp_path / "checkpoint", "--with-vision") == 0
    return tmp_path / "checkpoint"


def linked(vlm: Path, tmp_path: Path) -> Path:
    (tmp_path / "link").symlink_to(vlm.parent)
    return tmp_path / "link" / "vlm"


def dotted(vlm: Path, tmp_path: Path) -> Path:
    """By name ``tmp_path/models/vlm``, in truth where the link leads and one up."""
    (tmp_path / "elsewhere").symlink_to(vlm / "subfolder")
    (vlm / "subfolder").mkdir()
    return tmp_path / "elsewhere" / ".." / ".." / "vlm"


TARGETS: dict[str, Callable[[Path, Path], Path]] = {
    "the source": lambda vlm, tmp_path: vlm,
    "around it": lambda vlm, tmp_path: vlm.parent,
    "inside it": lambda vlm, tmp_path: vlm / "export",
    "through a link": linked,
    "through a link and up": dotted,
}


@pytest.mark.parametrize("target", ["embedder", "vlm"])
@pytest.mark.parametrize("place", TARGETS)
def test_overwrite_never_replaces_the_source_that_the_checkpoint_remembers(
    place: str, target: str, vlm: Path, checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    (vlm.parent / "config.json").write_text("{}")  # it would pass for a model folder
    out = TARGETS[place](vlm, tmp_path)
    args = ("export", "--megatron-path", checkpoint, "--hf-path", out, "--target", target, "--overwrite")
    message = refused(tmp_path, capsys, *args)
    assert f"{out}: {'lies in' if place == 'inside it' else 'holds'} the source {vlm}" in message


@pytest.mark.parametrize("place", TARGETS)
def test_overwrite_never_replaces_the_source_that_is_given(
    place: str, vlm: Path, checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    config = without_checksums(checkpoint / "iter_0000000") / "run_config.yaml"
    config.write_text(config.read_text().replace(str(vlm), str(tmp_path / "gone")))
    (vlm.parent / "config.json").write_text("{}")
    out = TARGETS[place](vlm, tmp_path)
    args = ("export", "--megatron-path", checkpoint, "--hf-model", vlm, "--hf-path", out, "--overwrite")
    assert "the source" in refused(tmp_path, capsys, *args)


@pytest.mark.parametrize("options", [[], ["--overwrite"]], ids=["new", "overwrite"])
@pytest.mark.parametrize("inside", ["megatron", "a/b/megatron", "1_Pooling"])
def test_import_into_a_folder_inside_the_source_is_refused(
    inside: str, options: list[str], vlm: Path, tmp_path: Path, capsys: Capture
) -> None:
    args = ("import", "--hf-model", vlm, "--megatron-path", vlm / inside, *options)
    assert f"{vlm / inside}: lies in the source {vlm}" in refused(tmp_path, capsys, *args)


def test_import_onto_or_around_its_source_is_refused(vlm: Path, tmp_path: Path, capsys: Capture) -> None:
    (vlm.parent / "config.json").write_text("{}")
    for out in (vlm, vlm.parent, linked(vlm, tmp_path)):
        args = ("import", "--hf-model", vlm, "--megatron-path", out, "--overwrite")
        assert "holds the source" in refused(tmp_path, capsys, *args)


def test_an_export_onto_around_or_inside_its_own_checkpoint_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    iteration = checkpoint / "iter_0000000"
    for given in (checkpoint, iteration):
        for out in (checkpoint, tmp_path, iteration, iteration / "hf", checkpoint / "export"):
            args = ("export", "--megatron-path", given, "--hf-path", out, "--overwrite")
            assert "the source" in refused(tmp_path, capsys, *args)


def test_what_training_started_from_is_a_source_too(
    vlm: Path, checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    """A run that began with an imported checkpoint names only that; what it was imported from must outlive it too."""
    run_folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(checkpoint, run_folder)
    path = without_checksums(run_folder / "iter_0000000") / "run_config.yaml"
    config = yaml.safe_load(path.read_text())
    config["model"]["hf_model"] = None
    config["checkpoint"] = {"pretrained_checkpoint": str(checkpoint), "load": None}
    path.write_text(yaml.safe_dump(config))
    for out in (vlm, checkpoint, checkpoint / "iter_0000000", vlm / "inside"):
        args = ("export", "--megatron-path", tmp_path / "run", "--hf-path", out, "--overwrite")
        assert "the source" in refused(tmp_path, capsys, *args)
    assert run("export", "--megatron-path", tmp_path / "run", "--hf-path", tmp_path / "run" / "embedder") == 0


def test_a_source_in_the_hub_cache_is_never_replaced(
    vlm: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A snapshot there is a folder of links; the files lie in ``blobs`` beside."""
    cache = tmp_path / "cache"
    repository = cache / "models--org--model"
    snapshot = repository / "snapshots" / ("a" * 40)
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    snapshot.mkdir(parents=True)
    for file in vlm.iterdir():
        blob = repository / "blobs" / hashlib.sha256(file.name.encode()).hexdigest()
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", blob.name))
    (repository / "blobs" / "config.json").write_text("{}")  # it would pass for a model folder
    (repository / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    outputs = (snapshot, repository / "blobs", repository, cache, snapshot / "inside")
    for out in outputs:
        args = ("import", "--hf-model", "org/model", "--megatron-path", out, "--overwrite")
        assert "the source" in refused(tmp_path, capsys, *args)
    assert run("import", "--hf-model", "org/model", "--megatron-path", tmp_path / "m") == 0
    for out in outputs:
        for given in ([], ["--hf-model", "org/model"], ["--hf-model", snapshot]):
            args = ("export", "--megatron-path", tmp_path / "m", "--hf-path", out, "--overwrite", *given)
            assert "the source" in refused(tmp_path, capsys, *args)


def test_files_linked_from_elsewhere_are_not_removed(vlm: Path, tmp_path: Path, capsys: Capture) -> None:
    """Only what holds them is refused: an output beside them does no harm."""
    store = tmp_path / "store"
    store.mkdir()
    (vlm / "model.safetensors").rename(store / "weights")
    (vlm / "model.safetensors").symlink_to(store / "weights")
    (store / "config.json").write_text("{}")
    args = ("import", "--hf-model", vlm, "--megatron-path")
    assert "holds the source" in refused(tmp_path, capsys, *args, store, "--overwrite")
    assert run(*args, store / "m") == 0


def test_an_output_is_made_where_links_and_dots_lead(checkpoint: Path, tmp_path: Path) -> None:
    """``link/../out`` lies beside what the link names, as it does for the operating system."""
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    assert run("export", "--megatron-path", checkpoint, "--hf-path", tmp_path / "link" / ".." / "out") == 0
    assert (tmp_path / "far" / "out" / "config.json").is_file()
    assert not (tmp_path / "out").exists()


def test_only_its_own_temporaries_are_removed(tmp_path: Path) -> None:
    """A name may hold what a glob pattern reads as a wildcard."""
    from megatron_embed.conversion.files.atomic import atomic_output

    other = tmp_path / ".out1.partial-abc"
    other.mkdir()
    with atomic_output(tmp_path / "out[1]") as folder:
        (folder / "x").touch()
    assert other.is_dir()


def test_overwrite_never_removes_a_training_run(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    """Not the run's folder, not its ``checkpoints``, not one of these; and not those of a run that has moved."""
    trained = tmp_path / "run" / "checkpoints"
    shutil.copytree(checkpoint, trained)
    (trained / "iter_0000000").rename(trained / "iter_0000002")
    (trained / "latest_checkpointed_iteration.txt").write_text("2\n")
    (tmp_path / "run" / "config.json").write_text('{"model_type": "x"}')  # it passes for a model
    (tmp_path / "run" / "model.safetensors").touch()
    young = tmp_path / "young" / "checkpoints"  # before its first checkpoint of its own
    shutil.copytree(checkpoint, young)
    for name in ("run_config.yaml", "metrics.jsonl"):
        (young.parent / name).touch()
    begun = tmp_path / "begun"
    shutil.copytree(checkpoint, begun)
    with (begun / "iter_0000000" / "run_config.yaml").open("a") as file:
        file.write("train: {seed: 1}\n")
    for out in (trained, trained.parent, trained / "iter_0000002", young, begun):
        for args in (
            ("export", "--megatron-path", checkpoint, "--hf-path", out, "--overwrite"),
            ("import", "--hf-model", tmp_path / "models" / "vlm", "--megatron-path", out, "--overwrite"),
        ):
            assert f"{out}: belongs to a training run (" in refused(tmp_path, capsys, *args)


def test_overwrite_removes_no_files_that_are_no_models(checkpoint: Path, tmp_path: Path, capsys: Capture) -> None:
    args = ("export", "--megatron-path", checkpoint, "--hf-path", tmp_path / "out", "--overwrite")
    (tmp_path / "out").mkdir()
    for text in ("{}", '{"model_type": "x"}', '{"model_type": 1}', "[]", "no JSON"):  # without weights it is none
        (tmp_path / "out" / "config.json").write_text(text)
        assert "is no model or checkpoint folder" in refused(tmp_path, capsys, *args)
    shutil.rmtree(tmp_path / "out")
    assert run(*args) == 0
    for name in ("thesis.txt", ".git/HEAD", "1_Pooling/notes.txt", "a/b/c"):
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "out" / name).touch()
    message = refused(tmp_path, capsys, *args)
    assert f"{tmp_path / 'out'}: holds .git/, a/, thesis.txt, … (4), no part of a model" in message
    for name in (".git", "a"):
        shutil.rmtree(tmp_path / "out" / name)
    (tmp_path / "out" / "thesis.txt").unlink()
    assert "holds 1_Pooling/notes.txt, no part" in refused(tmp_path, capsys, *args)
    (tmp_path / "out" / "1_Pooling" / "notes.txt").unlink()
    assert run(*args) == 0
    assert run(*args, "--target", "vlm") == 0
    assert run(*args, "--target", "vlm") == 0
    again = ("import", "--hf-model", tmp_path / "models" / "vlm", "--megatron-path", checkpoint, "--overwrite")
    (checkpoint / "thesis.txt").touch()
    assert "holds thesis.txt, no part" in refused(tmp_path, capsys, *again)
    (checkpoint / "thesis.txt").unlink()
    assert run(*again) == 0


@pytest.mark.parametrize("name", ["vlm", "renamed"])
def test_overwrite_never_replaces_a_source_that_moved_with_its_checkpoint(
    name: str, vlm: Path, checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "moved").mkdir()
    checkpoint.rename(tmp_path / "moved" / "ck")
    source = vlm.rename(tmp_path / "moved" / name)
    if name == "vlm":  # known by its name alone
        with (source / "config.json").open("a") as file:
            file.write("\n")
    args = ("export", "--megatron-path", tmp_path / "moved" / "ck", "--hf-path")
    assert f"{source}: holds the source" in refused(tmp_path, capsys, *args, source, "--overwrite")
    for target in ("embedder", "vlm"):
        out = tmp_path / target / "vlm"  # an earlier export may be called as the source was
        for options in ([], ["--overwrite"]):
            assert run(*args, out, "--target", target, *options) == 0


def test_overwrite_never_replaces_an_export_that_moved_with_the_run_that_trained_it(
    checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    project, moved = tmp_path / "project", tmp_path / "moved"
    assert run("export", "--megatron-path", checkpoint, "--hf-path", project / "embedder") == 0
    write_pairs(project / "train.jsonl", 8)
    train(recipe(project, "run", f"model.hf_model={project / 'embedder'}", "train.train_iters=1"))
    project.rename(moved)
    args = ("export", "--megatron-path", moved / "run", "--overwrite", "--hf-path")
    message = refused(tmp_path, capsys, *args, moved / "embedder")
    assert f"{moved / 'embedder'}: holds the source" in message
    for _ in range(2):  # an earlier export may be called as the source was
        assert run(*args, tmp_path / "out" / "embedder") == 0
