"""Files beside the weights: the model's own come along byte for byte, whatever else lies there stays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.hf_files import Source, edit_json, without_checksums

from megatron_embed.conversion.exporting import export_hf
from megatron_embed.conversion.hf.sidecars import sidecars
from megatron_embed.conversion.importing import import_hf

OWN = (
    ".gitattributes",
    "README.md",
    "LICENSE",
    "LICENSE.txt",
    "SYSTEM_PROMPT.txt",
    "additional_chat_templates/tool_use.jinja",
    "assets/scores.png",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "modelcard.json",
    "params.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tekken.json",
    "tokenizer.model.v3",
    "vocab.json",
)
FOREIGN = (
    ".env",
    ".megatron.partial-x1y2/iter_0000000/__0_0.distcp",
    ".megatron.partial-x1y2/.writing",
    ".out.replaced/config.json",
    ".tokenizer.json.partial-x",
    "checkpoints/iter_0000200/common.pt",
    "checkpoints/iter_0000200/hf/config.json",
    "checkpoints/latest_checkpointed_iteration.txt",
    "checkpoint-500/trainer_state.json",
    "config.json.bak",
    "corpus.jsonl",
    "readme_private.md",
    "license-keys.txt",
    "my_system_prompt_draft.txt",
    "sentence_private_config.json",
    "tokenizer.model.vault",
    "data/train.jsonl",
    "eval_results.json",
    "events.out.tfevents.1",
    "merlin_metadata.json",
    "metrics.jsonl",
    "notes.txt",
    "optimizer.pt",
    "passwords.json",
    "pytorch_model.bin.index.json",
    "run_config.yaml",
    "scores.png",
    "scripts/train.py",
    "tokenizer.pkl",
    "train.parquet",
    "training_args.bin",
    "wandb/run/config.yaml",
)


@pytest.fixture
def vlm(source: Source, tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    shutil.copytree(source("vlm", dtype="bfloat16"), folder)
    for name in (*OWN, *FOREIGN):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f'{{"a file" :\r\n "called {name}"}}')
    return folder


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("with_vision", [False, True], ids=["from the source", "from the checkpoint"])
def test_only_the_models_own_files_are_kept_and_published(with_vision: bool, vlm: Path, tmp_path: Path) -> None:
    plain = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    done = import_hf(vlm, tmp_path / "m", with_vision=with_vision, progress=False)
    assert files(tmp_path / "m" / "iter_0000000" / "hf") == {*OWN, *plain}
    (note,) = (note for note in done.notes if "left out, no files of a model" in note)
    assert "corpus.jsonl" in note or "… (" in note
    export_hf(tmp_path / "m", tmp_path / "hf", target="vlm", progress=False)
    assert files(tmp_path / "hf") == {*OWN, *plain, "model.safetensors"}
    for name in {*OWN, *plain} - {"config.json"}:
        assert (tmp_path / "hf" / name).read_bytes() == (vlm / name).read_bytes(), name
    export_hf(tmp_path / "m", tmp_path / "e", hf_model=vlm, progress=False)
    assert not files(tmp_path / "e") & {*FOREIGN}


def test_what_an_older_import_kept_beside_the_weights_is_not_published(vlm: Path, tmp_path: Path) -> None:
    import_hf(vlm, tmp_path / "m", with_vision=True, progress=False)
    kept = tmp_path / "m" / "iter_0000000" / "hf"
    for name in FOREIGN:
        (kept / name).parent.mkdir(parents=True, exist_ok=True)
        (kept / name).write_text("secret")
    export_hf(tmp_path / "m", tmp_path / "hf", target="vlm", progress=False)
    assert not files(tmp_path / "hf") & {*FOREIGN}


def test_module_folders_of_sentence_transformers_are_the_models_own(tmp_path: Path) -> None:
    names = ["modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json"]
    for name in (*names, "2_Normalize/notes.txt", "3_Other/config.json", "../outside/config.json"):
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_text("{}")
    paths = ["", "1_Pooling", "2_Normalize", "../outside", str(tmp_path / "outside"), 7]
    (tmp_path / "model" / "modules.json").write_text(json.dumps([{"path": path} for path in paths]))
    assert [str(path) for path in sidecars(tmp_path / "model")] == sorted(names)


@pytest.mark.parametrize("target", ["embedder", "vlm"])
def test_no_local_path_is_published(
    target: str, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers writes where a model was loaded from into its files."""
    monkeypatch.setenv("HOME", "/home/somebody")
    folder = tmp_path / "my-model"
    shutil.copytree(source("vlm", dtype="bfloat16"), folder)
    here, gone = str(folder), "/home/somebody/gone/model"
    edit_json(folder / "config.json", lambda raw: raw.update(_name_or_path=here, auto_map={"AutoModel": "x.Y"}))
    edit_json(folder / "config.json", lambda raw: raw["text_config"].update(_name_or_path=gone))
    edit_json(
        folder / "tokenizer_config.json",
        lambda raw: raw.update(name_or_path=here, tokenizer_file="~/tokenizer.json", sep_token="/", extra=["/", 1]),
    )
    deep = [{"_name_or_path": here}, [gone, "org/model"], here, "~/tokenizer.json", 7]
    (folder / "processor_config.json").write_text(json.dumps({"path": "org/model", "deep": deep, "tokens": ["/usr"]}))
    untouched = '{"image_token":  "[IMG]", "other": "/usr-of-someone-else/x"}'
    (folder / "preprocessor_config.json").write_text(untouched)
    import_hf(folder, tmp_path / "m", progress=False)
    export_hf(tmp_path / "m", tmp_path / "hf", target=target, progress=False)  # type: ignore[arg-type]
    for path in (tmp_path / "hf").rglob("*"):
        if path.is_file():
            assert not any(word in path.read_bytes() for word in (str(tmp_path).encode(), b"somebody", b"~/"))
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert settings["sep_token"] == "/"
    assert settings["extra"] == ["/", 1]
    if target == "vlm":
        assert json.loads((tmp_path / "hf" / "processor_config.json").read_text()) == {
            "path": "org/model",
            "deep": [{}, ["org/model"], 7],
            "tokens": ["/usr"],
        }
        assert (tmp_path / "hf" / "preprocessor_config.json").read_text() == untouched


def test_a_relative_path_is_no_hub_id(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``models/vlm`` looks like one; the card may not name a base model that others would look for on the hub."""
    shutil.copytree(source("vlm", dtype="bfloat16"), tmp_path / "models" / "vlm")
    monkeypatch.chdir(tmp_path)
    import_hf("models/vlm", "m", progress=False)
    path = without_checksums(tmp_path / "m" / "iter_0000000") / "run_config.yaml"
    path.write_text(path.read_text().replace(str(tmp_path / "models" / "vlm"), "models/vlm"))
    export_hf("m", "hf", progress=False)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "base_model" not in card
    assert "models/vlm" not in card
    assert "| base model | `vlm` |" in card


def test_links_are_followed_only_inside_the_folder_or_into_a_hub_caches_blobs(source: Source, tmp_path: Path) -> None:
    folder, blobs = tmp_path / "source", tmp_path / "models--org--model" / "blobs"
    shutil.copytree(source("vlm", dtype="bfloat16"), folder)
    (tmp_path / "secrets").mkdir()
    for path in (blobs / "1", folder / "inside", tmp_path / "secrets" / "1.jinja"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    (folder / "vocab.txt").symlink_to("/etc/passwd")
    (folder / "additional_chat_templates").symlink_to(tmp_path / "secrets")
    (folder / "merges.txt").symlink_to(blobs / "1")
    (folder / "NOTICE").symlink_to("inside")
    done = import_hf(folder, tmp_path / "m", with_vision=True, progress=False)
    kept = files(tmp_path / "m" / "iter_0000000" / "hf")
    assert {"merges.txt", "NOTICE"} <= kept
    assert not {"vocab.txt", "additional_chat_templates/1.jinja"} & kept
    (note,) = (note for note in done.notes if "links that lead out of the folder" in note)
    assert "vocab.txt → /etc/passwd" in note
    done = export_hf(tmp_path / "m", tmp_path / "hf", target="vlm", hf_model=folder, progress=False)
    assert "vocab.txt" not in files(tmp_path / "hf")
    assert note in done.notes
