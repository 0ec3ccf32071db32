"""Bad inputs to every command: one line on stderr that says what, found, wanted and the way out; no traceback.

Exit status 2 is for what the command line or the config says wrongly, whatever lies on the disk; 1 is for the rest.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.runs import write_pairs
from support.tiny_models import save_model

from megatron_embed.conversion import convert_checkpoints
from megatron_embed.conversion.importing import import_hf
from megatron_embed.recipes import data, encode, evaluate, mine, plan, report
from megatron_embed.recipes.train import main as train_main

TINY = "ministral3_tiny_embed_config"
TRAIN = ("train", TINY, "model.hf_model=model", "data.train=pairs.jsonl", "train.save_dir=out", "device=cpu")
DRY = (*TRAIN, "--dry-run")
ENCODE = ("encode", "--model", "model", "--input", "beir", "--output", "out", "--device", "cpu")
MINE = ("mine", "--model", "model", "--data", "pairs.jsonl", "--corpus", "beir", "--output", "out", "--device", "cpu")
EVALUATE = ("evaluate", "--model", "model", "--data", "beir", "--output", "out", "--device", "cpu")
IMPORT = ("convert", "import", "--hf-model", "model", "--megatron-path", "out")
EXPORT = ("convert", "export", "--megatron-path", "checkpoint", "--hf-path", "out")
PLAN = ("plan", "ministral3_8b_embed_config", "--world-size", "8")

COMMANDS: dict[str, Callable[[list[str]], Any]] = {
    "train": train_main,
    "plan": plan.main,
    "evaluate": evaluate.main,
    "encode": encode.main,
    "mine": mine.main,
    "data": data.main,
    "report": report.main,
    "convert": lambda argv: sys.exit(convert_checkpoints.main([*argv, *["--no-progress"] * bool(argv)])),
}

#: what the command line or the config says wrongly: (command, parts of the message)
USAGE: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("train",), ("no recipe; wanted one of ministral3_3b_embed_config", "--config FILE.yaml")),
    (("train", "ministral3_3b"), ("unknown recipe 'ministral3_3b'", "did you mean 'ministral3_3b_embed_config'?")),
    ((*TRAIN, "--dryrun"), ("unrecognized arguments: --dryrun", "did you mean --dry-run?")),
    ((*TRAIN, "optimizer.learning_rate=1"), ("unknown key 'optimizer.learning_rate'", "did you mean 'optimizer.lr'?")),
    ((*TRAIN, "optimizer.foo=1"), ("unknown key 'optimizer.foo'", "keys of optimizer: lr, min_lr")),
    ((*TRAIN, "train.seed"), ("train.seed: has no value; wanted train.seed=…",)),
    ((*MINE, "--data", ""), ("argument --data: found ''; wanted a name or a path",)),
    ((*EVALUATE, "--output", ""), ("argument --output: found ''; wanted a name or a path",)),
    ((*ENCODE, "--model", " "), ("argument --model: found ' '; wanted a name or a path",)),
    ((*IMPORT, "--hf-model", ""), ("argument --hf-model: found ''; wanted a name or a path",)),
    ((*EXPORT, "--hf-path", ""), ("argument --hf-path: found ''; wanted a name or a path",)),
    ((*EXPORT, "--megatron-path", ""), ("argument --megatron-path: found ''; wanted a name or a path",)),
    ((*TRAIN, "train.train_iters=1.5"), ("train.train_iters: found '1.5'; wanted a whole number",)),
    ((*TRAIN, "model.pooling=mean"), ("model.pooling: found 'mean'; wanted avg, cls, last, weighted_avg",)),
    ((*TRAIN, "loss.matryoshka_dims=64"), ("loss.matryoshka_dims: found '64'; wanted a list, [a,b]",)),
    ((*TRAIN, "data.train={path: a, weigth: 2}"), ("data.train.0.weigth", "wanted keys path, weight")),
    (("train", "--config", "none.yaml"), ("none.yaml: cannot be read (No such file", "wanted a run_config.yaml")),
    (("train", "--config", "typo.yaml"), ("typo.yaml: unknown key 'train.train_itres'", "'train.train_iters'?")),
    (("train", "--config", "utf16.jsonl"), ("utf16.jsonl: not valid YAML",)),
    (("train", TINY), ("model.hf_model: missing; wanted a Hugging Face model folder or id, model.hf_model=DIR_OR_ID",)),
    (("train", TINY, "model.hf_model=model"), ("data.train: missing; wanted", "data.train=FILE.jsonl")),
    ((*TRAIN, "model.tensor_model_parallel_size=2"), ("world size: found 1; wanted a multiple of 2", "torchrun")),
    ((*DRY, "--world-size", "64"), ("train.global_batch_size: 32 is smaller than the data-parallel size 64",)),
    ((*DRY, "--world-size", "none"), ("argument --world-size: found 'none'; wanted a whole number from 1 up",)),
    ((*DRY, "optimizer.min_lr=1"), ("optimizer.min_lr: 1 is above optimizer.lr",)),
    ((*DRY, "optimizer.warmup_iters=9999"), ("optimizer.warmup_iters: 9999 is above train.train_iters",)),
    (
        (*DRY, "model.virtual_pipeline_model_parallel_size=2"),
        ("model.pipeline_model_parallel_size of at least 2",),
    ),
    (
        (*DRY, "model.virtual_pipeline_model_parallel_size=1", "model.pipeline_model_parallel_size=2"),
        ("model.virtual_pipeline_model_parallel_size: found 1; wanted", "2 or more, or null"),
    ),
    ((*DRY, "train.micro_batch_tokens=100"), ("does not fit train.micro_batch_tokens 100; raise the latter or set",)),
    ((*DRY, "data.query_max_length=2"), ("data.query_max_length: found 2; wanted at least 3",)),
    ((*DRY, "loss.in_batch_negatives=false", "loss.symmetric=true"), ("loss.symmetric: true needs loss.in_batch",)),
    ((*DRY, "data.train=[{path: pairs.jsonl, weight: 1}, other.jsonl]"), ("other.jsonl has no weight", "wanted a")),
    ((*DRY, "data.eval=[beir,beir]"), ("data.eval: two BEIR folders are named 'beir'", "rename one")),
    (PLAN[:2], ("the following arguments are required: --world-size", "--help shows the arguments")),
    ((*PLAN, "--gpu-memory", "lots"), ("argument --gpu-memory: found 'lots'; wanted a number above 0",)),
    ((*PLAN[:3], "6", "model.context_parallel_size=4"), ("world size: found 6; wanted a multiple of 8",)),
    (EVALUATE[:3], ("the following arguments are required: --data",)),
    ((*EVALUATE, "--device", "tpu"), ("argument --device: invalid choice: 'tpu'", "'auto', 'cpu', 'cuda'")),
    (ENCODE[:3], ("the following arguments are required: --input, --output",)),
    ((*ENCODE, "--dim", "0"), ("argument --dim: found '0'; wanted a whole number from 1 up",)),
    ((*ENCODE, "--tp", "2"), ("--tp 2 --pp 1: their product does not divide 1 ranks", "torchrun")),
    ((*MINE, "--rank-range", "5"), ("argument --rank-range: found '5'; wanted A:B, two whole numbers",)),
    ((*MINE, "--rank-range", "9:3"), ("--rank-range: found 9:3; wanted A:B with 0 <= A < B",)),
    ((*MINE, "--max-score-ratio", "-1"), ("--max-score-ratio -1: wanted numbers above 0",)),
    ((*MINE, "--scores", "--cross-encoder", "x"), ("--cross-encoder: not allowed with argument --scores",)),
    (("data",), ("nothing to look through: wanted a FILE, or --config FILE.yaml",)),
    (("data", "--config", "typo.yaml"), ("typo.yaml: unknown key 'train.train_itres'",)),
    (("report",), ("the following arguments are required: RUN_DIR",)),
    (("convert",), ("the following arguments are required: import|export|verify",)),
    ((*IMPORT, "--tp", "0"), ("argument --tp: found '0'; wanted a whole number from 1 up",)),
    ((*EXPORT, "--max-shard-size", "big"), ("argument --max-shard-size: ", "'big'")),
    ((*EXPORT, "--target", "onnx"), ("argument --target: invalid choice: 'onnx'", "'embedder', 'vlm'")),
    (("convert", "verify", "--hf-model", "model"), ("one of the arguments --megatron-path --hf-path is required",)),
]

#: what lies on the disk, or does not
FOUND: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    ((*DRY, "data.train=none.jsonl"), ("data.train: none.jsonl: no such file or folder; wanted JSON lines",)),
    ((*DRY, "data.train=empty"), ("data.train: empty: a folder, but no BEIR folder; wanted corpus.jsonl",)),
    (
        (*DRY, "data.train=hf://name"),
        ("data.train: hf://name: not an address of hub data; wanted hf://org/name or hf://org/name/config",),
    ),
    ((*DRY, "data.train=pairs.csv"), ("data.train: pairs.csv: found a table between commas (query, positive)",)),
    ((*DRY, "data.eval=none"), ("data.eval: none: no such folder; wanted a BEIR folder with corpus.jsonl",)),
    ((*DRY, "data.eval=no_test"), ("data.eval: no_test/qrels/test.tsv: no such split; present: dev",)),
    (
        (*DRY, "model.hf_model=none"),
        ("model.hf_model: none: no such folder, and not to be had from", "HF_TOKEN"),
    ),
    ((*DRY, "model.hf_model=./none"), ("model.hf_model: ./none: no such folder; wanted a Hugging Face model folder",)),
    ((*DRY, "model.hf_model=pairs.jsonl"), ("model.hf_model: pairs.jsonl: is a file; wanted the folder that holds",)),
    ((*DRY, "model.hf_model=bare"), ("model.hf_model: bare: no tokenizer.json", "save_pretrained('bare')")),
    ((*DRY, "model.hf_model=lacking"), ("model.hf_model: lacking: ", "norm.weight: missing; wanted shape [48]")),
    (
        (*DRY, "model.tensor_model_parallel_size=8"),
        ("8 does not divide num_key_value_heads 4; wanted one of 1, 2, 4",),
    ),
    ((*DRY, "model.pipeline_model_parallel_size=4"), ("4 is more than the model's 2 layers",)),
    ((*DRY, "loss.matryoshka_dims=[64]"), ("loss.matryoshka_dims: 64 is above the model's hidden_size 48",)),
    ((*DRY, "checkpoint.pretrained_checkpoint=empty"), ("checkpoint.pretrained_checkpoint: empty: not a Megatron",)),
    (
        (*DRY, "checkpoint.pretrained_checkpoint=cut"),
        ("checkpoint.pretrained_checkpoint: cut/", ".distcp: damaged: found ", " bytes, wanted "),
    ),
    ((*DRY, "checkpoint.load=none"), ("checkpoint.load: none: no such folder; wanted a Megatron checkpoint",)),
    ((*DRY, "train.save_dir=pairs.jsonl"), ("train.save_dir: pairs.jsonl: is a file; wanted a folder",)),
    (
        (*DRY, "train.save_dir=pairs.jsonl/run"),
        ("train.save_dir: pairs.jsonl/run: cannot be written to", "give another"),
    ),
    ((*DRY, "logger.wandb_project=mine"), ("logger.wandb_project: found 'mine', but wandb is not installed; pip",)),
    ((*TRAIN, "train.save_dir=pairs.jsonl/run"), ("train.save_dir: pairs.jsonl/run: cannot be written to",)),
    ((*TRAIN, "model.hf_model=bare"), ("model.hf_model: bare: no tokenizer.json", "save_pretrained('bare')")),
    ((*TRAIN, "logger.wandb_project=mine"), ("logger.wandb_project: found 'mine', but wandb is not installed",)),
    ((*TRAIN, "data.train=utf16.jsonl"), ("utf16.jsonl: found UTF-16 text; wanted UTF-8", "iconv -f UTF-16 -t UTF-8")),
    ((*TRAIN, "data.train=pairs.jsonl.gz"), ("found compressed by gzip; wanted", "gzip -dk pairs.jsonl.gz")),
    ((*TRAIN, "data.train=keys.jsonl"), ("keys.jsonl, line 1: no 'query'; found keys: q, a; wanted", "of 9 rows none")),
    ((*TRAIN, "data.train=broken.jsonl"), ("broken.jsonl, line 2: not JSON: ", " at column ")),
    ((*TRAIN, "train.global_batch_size=64"), ("pairs.jsonl: 40 examples do not fill one batch of train.global_batch",)),
    ((*PLAN, "model.hf_model=a/b"), ("model.hf_model: 'a/b' is no folder, and its sizes are not known; wanted",)),
    ((*EVALUATE[:4], "none"), ("none: no such folder; wanted a BEIR folder with corpus.jsonl",)),
    ((*EVALUATE, "--split", "dev"), ("beir/qrels/dev.tsv: no such split; present: test, train",)),
    ((*EVALUATE, "--model", "./none"), ("./none: no such folder; wanted a Hugging Face model folder",)),
    ((*EVALUATE, "--output", "pairs.jsonl/out"), ("--output: pairs.jsonl: is a file; wanted a folder",)),
    ((*ENCODE, "--input", "none"), ("none: no such file or folder; wanted JSON lines",)),
    ((*ENCODE, "--input", "utf16.jsonl"), ("utf16.jsonl: found UTF-16 text; wanted UTF-8", "iconv -f UTF-16")),
    ((*ENCODE, "--model", "empty"), ("empty/config.json: no such file",)),
    ((*ENCODE, "--dim", "49"), ("dim: found 49; wanted 1 to the model's hidden_size 48",)),
    ((*ENCODE, "--output", "beir"), ("beir: holds corpus.jsonl, ", "wanted an empty folder")),
    ((*MINE, "--data", "none.jsonl"), ("none.jsonl: no such file or folder; wanted JSON lines",)),
    ((*MINE, "--output", "pairs.jsonl"), ("pairs.jsonl: is there already; name another file, or --overwrite",)),
    (("data", "none.jsonl"), ("none.jsonl: no such file or folder; wanted JSON lines",)),
    (("data", "noise.bin"), ("noise.bin: found binary data, beginning with 00 ff", "wanted UTF-8 text")),
    (
        ("data", "keys.jsonl"),
        ("keys.jsonl, line 1: no 'query'; found keys: q, a; wanted an object with query, positive",),
    ),
    (("data", "pairs.tsv"), ("pairs.tsv: found a table between tabs (query, positive)", "sep='\\t'")),
    (("report", "empty"), ("empty/metrics.jsonl: no such file; wanted the folder of a run (train.save_dir)",)),
    ((*IMPORT, "--hf-model", "./none"), ("./none: no such folder; wanted a Hugging Face model folder or the id",)),
    ((*IMPORT, "--hf-model", "pickled"), ("pickled: holds pickled weights only", "Convert them to safetensors")),
    ((*IMPORT, "--hf-model", "lacking"), ("lacking: the weights do not fit the config: norm.weight: missing",)),
    ((*IMPORT, "--tp", "3"), ("3 does not divide num_attention_heads 8; wanted one of 1, 2, 4,",)),
    ((*IMPORT, "--megatron-path", "pairs.jsonl/x"), ("pairs.jsonl",)),
    ((*EXPORT, "--megatron-path", "empty"), ("empty: not a Megatron checkpoint: no latest_checkpointed_iteration",)),
    ((*EXPORT, "--hf-path", "beir"), ("beir: exists already",)),
    (("convert", "verify", "--hf-model", "model", "--hf-path", "./none"), ("./none: no such folder",)),
]

CASES = [(2, *case) for case in USAGE] + [(1, *case) for case in FOUND]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands name, relative to it."""
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "model")
    for name in ("bare", "lacking", "pickled"):
        shutil.copytree(folder / "model", folder / name)
    (folder / "bare" / "tokenizer.json").unlink()
    (folder / "pickled" / "model.safetensors").rename(folder / "pickled" / "pytorch_model.bin")
    tensors = load_file(folder / "lacking" / "model.safetensors")
    del tensors["norm.weight"]
    save_file(tensors, folder / "lacking" / "model.safetensors")
    import_hf(folder / "model", folder / "checkpoint", progress=False)
    shutil.copytree(folder / "checkpoint", folder / "cut")
    for file in (folder / "cut" / "iter_0000000").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:-5000])

    write_pairs(folder / "pairs.jsonl", 40)
    lines = (folder / "pairs.jsonl").read_text()
    (folder / "utf16.jsonl").write_bytes(lines.encode("utf-16"))
    (folder / "pairs.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "noise.bin").write_bytes(bytes([0, 255, 254, 128, 3, 200, 1, 7]) * 99)
    (folder / "keys.jsonl").write_text('{"q": "what?", "a": "this"}\n' * 9)
    (folder / "broken.jsonl").write_text('{"query": "q", "positive": "p"}\n{"query": "q"\n')
    (folder / "pairs.csv").write_text('query,positive\n"what, then?",007\nwhy?,\n')
    (folder / "pairs.tsv").write_text("query\tpositive\nwhat?\tthis\n")
    (folder / "typo.yaml").write_text("train:\n  train_itres: 5\n")
    (folder / "empty").mkdir()
    for name, splits in (("beir", ("test", "train")), ("no_test", ("dev",))):
        (folder / name / "qrels").mkdir(parents=True)
        (folder / name / "corpus.jsonl").write_text('{"_id": "a", "text": "one"}\n')
        (folder / name / "queries.jsonl").write_text('{"_id": "q", "text": "what?"}\n')
        for split in splits:
            (folder / name / "qrels" / f"{split}.tsv").write_text("q\ta\t1\n")
    return folder


@pytest.fixture(autouse=True)
def _alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    for name in ("WORLD_SIZE", "RANK", "TORCHELASTIC_ERROR_FILE", "SAVE_DIR"):
        monkeypatch.delenv(name, raising=False)


def test_there_are_enough_of_every_command() -> None:
    assert len(CASES) >= 60
    assert {status for status, *_ in CASES} == {1, 2}
    assert {argv[0] for _, argv, _ in CASES} == set(COMMANDS)


@pytest.mark.parametrize(("status", "argv", "parts"), CASES, ids=[" ".join(argv) for _, argv, _ in CASES])
def test_one_line_and_the_exit_status(
    status: int, argv: tuple[str, ...], parts: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        COMMANDS[argv[0]](list(argv[1:]))
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (status, ""), err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    for part in parts:
        assert part in err
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("module", "argv", "status", "part"),
    [
        ("recipes.train", (*TRAIN[1:], "train.seed=x"), 2, "train.seed: found 'x'; wanted a whole number"),
        ("recipes.train", (*DRY[1:], "data.train=none.jsonl"), 1, "data.train: none.jsonl: no such file"),
        ("recipes.encode", ENCODE[1:3], 2, "required: --input, --output"),
        ("recipes.mine", (*MINE[1:], "--data", "none.jsonl"), 1, "none.jsonl: no such file or folder"),
        ("conversion.convert_checkpoints", (*EXPORT[1:], "--megatron-path", "empty"), 1, "not a Megatron checkpoint"),
    ],
)
def test_in_a_process_of_its_own(module: str, argv: tuple[str, ...], status: int, part: str) -> None:
    """No warning of a library, no bar, no traceback: the line alone."""
    command = [sys.executable, "-m", f"megatron_embed.{module}", *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert part in done.stderr


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.tsv"])
def test_the_way_out_of_a_table_converts_it(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(folder / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        data.main([name])
    convert = re.search(r'python -c "(.*)"$', capsys.readouterr().err.strip())
    assert convert is not None
    subprocess.run([sys.executable, "-c", convert[1]], check=True)
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    if name == "pairs.csv":  # what looks like a number, or like nothing, is text as it stood there
        assert rows == [{"query": "what, then?", "positive": "007"}, {"query": "why?", "positive": ""}]
    else:
        assert rows == [{"query": "what?", "positive": "this"}]


def test_a_folder_called_wandb_is_no_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B itself leaves one in the working folder, where ``python -m`` looks for packages."""
    from megatron_embed.recipes.datasets.inputs import _is_installed

    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert os.path.isdir("wandb")
    assert not _is_installed("wandb")
    assert _is_installed("yaml")
