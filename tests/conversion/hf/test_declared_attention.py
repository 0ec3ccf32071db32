"""A ready embedder of causal attention: every command refuses it by name, and takes it as a base model on request."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from sentence_transformers import SentenceTransformer
from support.hf_files import edit_json, without_checksums
from support.ready import make_ready
from support.runs import recipe, write_pairs
from transformers import AutoModel

from megatron_embed.bridge.errors import UserError
from megatron_embed.bridge.families import BIDIRECTIONAL
from megatron_embed.conversion import convert_checkpoints
from megatron_embed.conversion.exporting import export_hf
from megatron_embed.conversion.hf.declared_attention import declares_causal
from megatron_embed.conversion.importing import import_hf
from megatron_embed.recipes import Encoder, data, encode, evaluate, mine, train

TEXTS = ["how do plants eat?", "one two three " * 20]
CAUSAL = {
    "true": (True, "is_causal is true; wanted false"),
    "missing": (None, "is_causal is missing, which transformers takes for true; wanted false"),
    "text": ("false", 'is_causal is "false"; wanted false'),
    "0": (0, "is_causal is 0; wanted false"),
}
WAY_OUT = "to take it as a base model, to be trained bidirectionally, give "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``causal``, a ready embedder that says nothing of its attention, with last-token pooling; and data."""
    root = tmp_path_factory.mktemp("causal")
    make_ready(root / "causal", causal=None, pooling="lasttoken", transformer={"max_seq_length": 64})
    write_pairs(root / "train.jsonl", 16)
    (root / "words" / "qrels").mkdir(parents=True)
    (root / "words" / "corpus.jsonl").write_text('{"_id": "d", "text": "w1"}\n{"_id": "e", "text": "w2 w3"}\n')
    (root / "words" / "queries.jsonl").write_text('{"_id": "q", "text": "w1"}\n')
    (root / "words" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    return root


@pytest.fixture
def unasked(folder: Path, tmp_path: Path) -> Path:
    """A checkpoint that was imported before anything was asked."""
    import_hf(folder / "causal", tmp_path / "unasked", bidirectional=True, progress=False)
    _edit_run(tmp_path / "unasked", lambda run: run["model"].pop("bidirectional"))
    return tmp_path / "unasked"


def _edit_run(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = without_checksums(checkpoint / "iter_0000000") / "run_config.yaml"
    run = yaml.safe_load(path.read_text())
    change(run)
    path.write_text(yaml.safe_dump(run))


@pytest.mark.parametrize("stated", CAUSAL)
@pytest.mark.parametrize("vlm", [False, True])
def test_the_message_names_the_key_what_is_found_and_the_way_out(stated: str, vlm: bool, tmp_path: Path) -> None:
    value, found = CAUSAL[stated]
    model = make_ready(tmp_path / "m", causal=value, vlm=vlm)
    message = f"{model / 'config.json'}: {'text_config.' if vlm else ''}{found}"
    for refused in (lambda: import_hf(model, tmp_path / "out"), lambda: Encoder.from_pretrained(model, device="cpu")):
        with pytest.raises(UserError, match=f"^{re.escape(message)}.*{re.escape(WAY_OUT)}--bidirectional"):
            refused()
    assert not (tmp_path / "out").exists()


def test_what_is_bidirectional_or_no_embedder_is_not_asked(folder: Path, tmp_path: Path) -> None:
    causal = json.loads((folder / "causal" / "config.json").read_text())
    assert declares_causal(folder / "causal", causal)
    assert declares_causal(folder / "causal", {**causal, "is_causal": False}) is None
    for model_type in BIDIRECTIONAL:  # AutoModel's own classes
        assert declares_causal(folder / "causal", {**causal, "model_type": model_type}) is None
    assert declares_causal(folder, causal) is None  # no modules.json: a base model
    # a VLM's top-level key is no part of its text model
    assert declares_causal(folder / "causal", {"model_type": "mistral3", "text_config": {}, "is_causal": False})
    assert not declares_causal(folder / "causal", {"model_type": "mistral3", "text_config": {"is_causal": False}})


COMMANDS: dict[str, Callable[[Path, Path], tuple[Callable[[list[str]], Any], list[str]]]] = {
    "import": lambda folder, out: (
        convert_checkpoints.main,
        ["import", "--hf-model", str(folder / "causal"), "--megatron-path", str(out)],
    ),
    "encode": lambda folder, out: (
        encode.main,
        ["--model", str(folder / "causal"), "--input", str(folder / "words"), "--output", str(out), "--device", "cpu"],
    ),
    "evaluate": lambda folder, out: (
        evaluate.main,
        ["--model", str(folder / "causal"), "--data", str(folder / "words"), "--output", str(out), "--device", "cpu"],
    ),
    "mine": lambda folder, out: (
        mine.main,
        f"--model {folder}/causal --data {folder}/train.jsonl --corpus {folder}/words --device cpu "
        f"--output {out} --cache {out}-cache".split(),
    ),
}


def _status(main: Callable[[list[str]], Any], arguments: list[str]) -> int:
    try:
        return int(main(arguments) or 0)
    except SystemExit as ended:
        return int(ended.code or 0)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_and_takes_it_on_request(
    command: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main, arguments = COMMANDS[command](folder, tmp_path / "out")
    capsys.readouterr()
    assert _status(main, arguments) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {folder / 'causal' / 'config.json'}: is_causal is missing")
    assert WAY_OUT + "--bidirectional" in line
    assert not list(tmp_path.iterdir())
    assert _status(main, [*arguments, "--bidirectional"]) == 0
    assert (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["embedder", "vlm"])
def test_export_refuses_it_as_recorded_source_and_as_hf_model(
    target: str, folder: Path, unasked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = ["export", "--megatron-path", str(unasked), "--hf-path", str(tmp_path / "hf"), "--no-progress"]
    export += ["--target", target]
    recorded = unasked / "iter_0000000" / "hf" / "config.json"
    assert convert_checkpoints.main(export) == 1
    assert f"error: {recorded}: is_causal is missing" in capsys.readouterr().err
    shutil.rmtree(unasked / "iter_0000000" / "hf")  # as a checkpoint of another program, which keeps no files
    given = [*export, "--hf-model", str(folder / "causal")]
    assert convert_checkpoints.main(given) == 1
    assert f"error: {folder / 'causal' / 'config.json'}: is_causal is missing" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
    if target == "embedder":
        assert convert_checkpoints.main([*given, "--bidirectional"]) == 0
        assert "an embedder with causal attention" in (tmp_path / "hf" / "README.md").read_text()


def test_a_checkpoint_from_before_it_was_asked(unasked: Path) -> None:
    with pytest.raises(UserError, match=r"hf/config.json: is_causal is missing.*--bidirectional"):
        Encoder.from_pretrained(unasked, device="cpu")
    with Encoder.from_pretrained(unasked, device="cpu", bidirectional=True) as encoder:
        assert encoder.source is not None
        assert encoder.source.made_bidirectional
    _edit_run(unasked, lambda run: run.update(train={"train_iters": 1}))  # trained since, and so bidirectionally
    Encoder.from_pretrained(unasked, device="cpu").close()


def test_on_request_it_is_the_bidirectional_model_and_says_so(folder: Path, tmp_path: Path) -> None:
    """Import, export and both encoders give the vectors of the same folder with ``is_causal: false``."""
    other = tmp_path / "other"
    shutil.copytree(folder / "causal", other)
    edit_json(other / "config.json", lambda raw: raw.update(is_causal=False))
    wanted = SentenceTransformer(str(other), device="cpu").encode_query(TEXTS)
    own = SentenceTransformer(str(folder / "causal"), device="cpu").encode_query(TEXTS)
    assert (wanted * own).sum(1).max() < 0.99
    import_hf(folder / "causal", tmp_path / "m", bidirectional=True, progress=False)
    run = yaml.safe_load((tmp_path / "m" / "iter_0000000" / "run_config.yaml").read_text())
    assert run["model"]["bidirectional"] is True
    export_hf(tmp_path / "m", tmp_path / "hf", progress=False)  # the checkpoint says so
    assert AutoModel.from_pretrained(tmp_path / "hf").config.is_causal is False
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "It was made from an embedder with causal attention, taken as a base model" in card
    exported = SentenceTransformer(str(tmp_path / "hf"), device="cpu").encode_query(TEXTS)
    np.testing.assert_allclose(exported, wanted, atol=1e-5)
    for path, asked in ((folder / "causal", True), (tmp_path / "m", False), (tmp_path / "hf", False)):
        with Encoder.from_pretrained(path, device="cpu", bidirectional=asked) as encoder:
            np.testing.assert_allclose(encoder.encode(TEXTS), wanted, atol=1e-5)
    import_hf(other, tmp_path / "m2", progress=False)
    export_hf(tmp_path / "m2", tmp_path / "hf2", progress=False)
    assert "causal attention" not in (tmp_path / "hf2" / "README.md").read_text()


def test_training_wants_the_recipe_to_say_so_and_keeps_it(folder: Path, tmp_path: Path) -> None:
    step = ("train.train_iters=1", f"data.train={folder / 'train.jsonl'}", f"train.save_dir={tmp_path / 'run'}")
    straight = recipe(folder, "run", *step, f"model.hf_model={folder / 'causal'}")
    with pytest.raises(UserError, match=rf"is_causal is missing.*{WAY_OUT}model.bidirectional=true$"):
        train(straight)
    assert not (tmp_path / "run").exists()
    straight.model.bidirectional = True
    train(straight)
    import_hf(folder / "causal", tmp_path / "m", bidirectional=True, progress=False)
    again = [*step, f"train.save_dir={tmp_path / 'again'}", f"checkpoint.pretrained_checkpoint={tmp_path / 'm'}"]
    train(recipe(folder, "again", *again))
    for name in ("run", "again"):
        run = yaml.safe_load((tmp_path / name / "checkpoints" / "iter_0000001" / "run_config.yaml").read_text())
        assert run["model"]["bidirectional"] is True
        export_hf(tmp_path / name, tmp_path / f"{name}-hf", progress=False)
        assert "from an embedder with causal attention" in (tmp_path / f"{name}-hf" / "README.md").read_text()
        assert AutoModel.from_pretrained(tmp_path / f"{name}-hf").config.is_causal is False


def test_training_from_a_base_model_needs_no_word(folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(folder / "causal", base)
    (base / "modules.json").unlink()
    step = ("train.train_iters=1", f"data.train={folder / 'train.jsonl'}", f"train.save_dir={tmp_path / 'run'}")
    train(recipe(folder, "run", *step, f"model.hf_model={base}"))
    run = yaml.safe_load((tmp_path / "run" / "checkpoints" / "iter_0000001" / "run_config.yaml").read_text())
    assert run["model"]["bidirectional"] is False
    export_hf(tmp_path / "run", tmp_path / "hf", progress=False)
    assert "causal attention" not in (tmp_path / "hf" / "README.md").read_text()


def test_its_tokenizer_can_be_looked_at(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``data --model`` computes no attention."""
    arguments = [str(folder / "train.jsonl"), "--model", str(folder / "causal")]
    assert _status(data.main, arguments) == 0
    assert "tokens" in capsys.readouterr().out


def test_causal_attention_is_what_transformers_takes_a_missing_key_for(folder: Path) -> None:
    """The reason for the refusal: the last token does not move the first state."""
    model = AutoModel.from_pretrained(folder / "causal").eval()
    with torch.no_grad():
        a, b = (model(input_ids=torch.tensor([[1, 300, 301, last]])).last_hidden_state[0, 0] for last in (2, 400))
    torch.testing.assert_close(a, b)
