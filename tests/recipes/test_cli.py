"""The training command line: what it reads, prints, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.tiny_models import save_model

from megatron_embed.bridge.errors import UsageError, UserError
from megatron_embed.conversion.files.atomic import atomic_file
from megatron_embed.recipes import RECIPES
from megatron_embed.recipes.cli import parse_train_arguments, run_program
from megatron_embed.recipes.config.run_config import load_run_config, save_run_config
from megatron_embed.recipes.config.schema import RecipeConfig
from megatron_embed.recipes.train import main

TINY = "ministral3_tiny_embed_config"


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)


def run(*argv: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Status, stdout and stderr of the program."""
    with pytest.raises(SystemExit) as ended:
        main(argv)
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return int(ended.value.code or 0), out, err


def test_recipe_overrides_and_config_file(tmp_path: Path) -> None:
    saved = RECIPES[TINY]()
    saved.train.seed = 7
    save_run_config(saved, tmp_path / "run_config.yaml")
    config = ["--config", str(tmp_path / "run_config.yaml")]
    assert parse_train_arguments([TINY]).cfg == RECIPES[TINY]()
    assert parse_train_arguments(config).cfg == saved
    assert parse_train_arguments([TINY, *config]).cfg == saved
    arguments = parse_train_arguments(["data.query_prompt=a b: ", *config, "train.seed=9"])
    assert arguments.cfg is not None
    assert (arguments.cfg.train.seed, arguments.cfg.data.query_prompt) == (9, "a b: ")
    assert not arguments.dry_run


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "error: no recipe; wanted one of ministral3_3b_embed_config"),
        (["ministral3_3b"], "error: unknown recipe 'ministral3_3b'; did you mean 'ministral3_3b_embed_config'?"),
        (["x"], "error: unknown recipe 'x'; known: ministral3_3b_embed_config"),
        ([TINY, "train.train_itres=1"], "error: unknown key 'train.train_itres'; did you mean 'train.train_iters'?"),
        ([TINY, "model.pooling=mean"], "error: model.pooling: found 'mean'; wanted avg, cls, last, weighted_avg"),
        ([TINY, "another"], "error: 'another' is not an override; wanted section.key=value"),
        ([TINY, "--bogus"], "error: unrecognized arguments: --bogus"),
        ([TINY, "--dry"], "error: unrecognized arguments: --dry"),
        ([TINY, "--dry-run", "--world-size", "0"], "error: argument --world-size: found '0'; wanted a whole number"),
        (["--config", "none.yaml"], "error: none.yaml: cannot be read"),
    ],
)
def test_bad_arguments_end_with_status_2(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(*argv, capsys=capsys)
    assert (status, out) == (2, "")
    assert err.startswith(message)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([TINY], "error: model.hf_model: missing"),
        ([TINY, "model.hf_model=m"], "error: data.train: missing"),
        (
            [TINY, "model.hf_model=m", "data.train=t", "model.tensor_model_parallel_size=2"],
            "error: world size: found 1",
        ),
        (
            [TINY, "--dry-run", "--world-size", "3", "model.pipeline_model_parallel_size=2"],
            "error: world size: found 3",
        ),
    ],
)
def test_a_config_that_cannot_run_ends_with_status_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(*argv, capsys=capsys)
    assert (status, out) == (2, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_list_names_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run("--list", capsys=capsys)
    assert status == 0
    for name, recipe in RECIPES.items():
        row = next(line for line in out.splitlines() if name in line)
        cfg = recipe()
        assert f"{cfg.model.tensor_model_parallel_size} × 1 × 1" in row
        assert str(cfg.train.global_batch_size) in row


@pytest.mark.parametrize("name", list(RECIPES))
def test_dry_run_prints_the_resolved_config_and_the_layout(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(name, "--dry-run", "train.train_iters=50", capsys=capsys)
    assert status == 0
    resolved = RecipeConfig.model_validate(yaml.safe_load(out))
    assert resolved.optimizer.warmup_iters == 5
    assert resolved.train.save_dir is not None
    assert f"tensor parallel {resolved.model.tensor_model_parallel_size} ×" in out
    assert "data parallel 1" in out


def test_dry_run_knows_the_stages_of_a_model_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "hf", num_hidden_layers=6)
    folder = f"model.hf_model={tmp_path / 'hf'}"
    argv = (TINY, "--dry-run", "--world-size", "8", folder, "model.pipeline_model_parallel_size=4")
    _, out, _ = run(*argv, capsys=capsys)
    assert "# layers per stage: 1, 2, 2, 1 of 6" in out
    assert "data parallel 2" in out
    assert "# queries per step: 32, 16 a replica" in out
    status, _, err = run(TINY, "--dry-run", folder, "model.tensor_model_parallel_size=3", capsys=capsys)
    assert status == 1
    assert "model.tensor_model_parallel_size: 3 does not divide" in err


def test_dry_run_yaml_runs_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(TINY, "--dry-run", "data.query_prompt=q:  ", capsys=capsys)
    (tmp_path / "c.yaml").write_text(out)
    assert load_run_config(tmp_path / "c.yaml").data.query_prompt == "q:  "


def test_programs_end_with_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    def end(error: BaseException) -> tuple[int, str]:
        def body() -> None:
            raise error

        with pytest.raises(SystemExit) as ended:
            run_program(body)
        return int(ended.value.code or 0), capsys.readouterr().err

    assert end(UsageError("model.pooling: no")) == (2, "error: model.pooling: no\n")
    assert end(UserError("a.jsonl, line 3: no 'query'")) == (1, "error: a.jsonl, line 3: no 'query'\n")
    assert end(PermissionError(13, "Permission denied", "/x")) == (1, "error: /x: Permission denied\n")
    assert end(KeyboardInterrupt()) == (130, "error: interrupted\n")
    status, err = end(ZeroDivisionError("no"))
    assert status == 1
    assert "please report it" in err
    assert "ZeroDivisionError: no" in err


def test_sigterm_ends_a_program_as_ctrl_c_does(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def ignored(*_: object) -> None:
        """Keep the tests' own process alive."""

    before = signal.signal(signal.SIGTERM, ignored)

    def body() -> None:
        with atomic_file(tmp_path / "out"):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as ended:
        run_program(body)
    assert signal.signal(signal.SIGTERM, before) is ignored
    assert ended.value.code == 130
    assert capsys.readouterr().err == "error: interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_of_several_ranks_the_first_to_fail_speaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def body() -> None:
        raise UserError("told once")

    spoken = []
    for rank in ("1", "0"):
        (tmp_path / rank).mkdir()
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / rank / "error.json"))
        with pytest.raises(SystemExit):
            run_program(body)
        spoken.append(capsys.readouterr().err)
    assert spoken == ["error: told once\n", ""]


_TWO_ENDS = """
import threading
from megatron_embed.recipes import cli

speaks, claimed, other = cli._speaks_for_all, threading.Event(), threading.Event()

def slowly():
    if claimed.is_set():
        other.set()
        return speaks()
    claimed.set()
    found = speaks()
    other.wait(1)  # where the other thread may come as far as this, it does
    return found

cli._speaks_for_all = slowly
threading.Thread(target=cli._exit_with, args=(1, "rank 1 is gone"), daemon=True).start()
claimed.wait()
cli._exit_with(1, "the connection broke")
"""


def test_of_two_threads_that_end_a_rank_the_first_finishes_its_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "0").mkdir()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0" / "error.json"))
    ended = _python(_TWO_ENDS)
    assert (ended.returncode, ended.stderr) == (1, "error: rank 1 is gone\n")


def _python(code: str, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code] if code else [sys.executable, *argv]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "before",
    ["", "import megatron_embed.recipes.train", "import megatron_embed.recipes.training.loop"],
)
def test_train_is_callable_whatever_was_imported_before(before: str) -> None:
    done = _python(
        f"{before}\n"
        "from megatron_embed.recipes import ministral3_tiny_embed_config, train\n"
        "from megatron_embed.bridge.errors import UsageError, UserError\n"
        "try:\n    train(ministral3_tiny_embed_config())\n"
        "except UserError as error:\n    print(error)\n"
    )
    assert done.stdout.startswith("model.hf_model: missing"), done.stderr


def test_importing_the_package_is_quick() -> None:
    done = _python(
        "import sys\n"
        "from megatron_embed.recipes import RECIPES, ministral3_3b_embed_config\n"
        "import megatron_embed.recipes.train\n"
        "print([name for name in ('torch', 'megatron.core', 'transformers') if name in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr


_HEAVY = ("torch", "megatron.core", "transformers", "datasets", "matplotlib", "pandas")
_HELP = """
import runpy, sys
sys.argv = [{module!r}, *{argv!r}, "--help"]
try:
    runpy.run_module({module!r}, run_name="__main__")
finally:
    print([name for name in {heavy!r} if name in sys.modules])
"""


@pytest.mark.parametrize(
    ("module", "argv"),
    [
        *((f"megatron_embed.recipes.{name}", ()) for name in ("train", "plan", "evaluate", "encode", "mine", "data")),
        ("megatron_embed.recipes.report", ()),
        *(("megatron_embed.conversion.convert_checkpoints", argv) for argv in ((), ("import",), ("export",))),
    ],
)
def test_help_waits_for_no_library_and_says_nothing_else(module: str, argv: tuple[str, ...]) -> None:
    done = _python(_HELP.format(module=module, argv=argv, heavy=_HEAVY))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_programs_run_as_modules() -> None:
    done = _python("", "-m", "megatron_embed.recipes.train", "ministral3_8b_embd_config")
    assert done.returncode == 2
    assert (
        done.stderr == "error: unknown recipe 'ministral3_8b_embd_config'; did you mean 'ministral3_8b_embed_config'?\n"
    )
    done = _python("", "-m", "megatron_embed.recipes.evaluate", "--model", "m", "--data", "no-such-folder")
    assert done.returncode == 1
    assert done.stderr.startswith("error: no-such-folder: no such folder")
    done = _python("", "-m", "megatron_embed.recipes.evaluate", "--model", "m")
    assert done.returncode == 2
