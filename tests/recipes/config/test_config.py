"""Recipe sections, overrides, YAML: what is accepted, and the message for everything else."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import yaml

from megatron_embed.bridge.errors import UsageError, UserError
from megatron_embed.recipes import RECIPES
from megatron_embed.recipes.config.messages import ALIASES
from megatron_embed.recipes.config.overrides import apply_overrides
from megatron_embed.recipes.config.run_config import changed_keys, load_run_config, save_run_config
from megatron_embed.recipes.config.schema import DataSource, OptimizerSection, RecipeConfig, keys

# What users rely on: adding a key is a feature, renaming one or changing a default is a break.
DEFAULTS = {
    "recipe": "custom",
    "device": "auto",
    "model.hf_model": None,
    "model.tensor_model_parallel_size": 1,
    "model.pipeline_model_parallel_size": 1,
    "model.context_parallel_size": 1,
    "model.virtual_pipeline_model_parallel_size": None,
    "model.sequence_parallel": None,
    "model.pooling": "avg",
    "model.normalize": True,
    "model.bidirectional": False,
    "model.precision": "bf16",
    "model.recompute": "none",
    "loss.temperature": 0.02,
    "loss.learn_temperature": False,
    "loss.mode": "auto",
    "loss.kept_micro_batches": "auto",
    "loss.in_batch_negatives": True,
    "loss.cross_rank_negatives": True,
    "loss.symmetric": False,
    "loss.query_query_negatives": False,
    "loss.passage_passage_negatives": False,
    "loss.false_negative_margin": None,
    "loss.matryoshka_dims": [],
    "loss.score_distillation_weight": 0.0,
    "loss.embedding_distillation_weight": 0.0,
    "data.train": None,
    "data.query_prompt": "query: ",
    "data.passage_prompt": "passage: ",
    "data.query_max_length": 512,
    "data.passage_max_length": 512,
    "data.negatives_per_query": 4,
    "data.packing": RecipeConfig().data.packing,  # false until packing exists, then true
    "data.eval": None,
    "train.global_batch_size": 128,
    "train.micro_batch_size": None,
    "train.micro_batch_tokens": 16384,
    "train.train_iters": 1000,
    "train.eval_interval": 200,
    "train.save_interval": 200,
    "train.log_interval": 10,
    "train.save_dir": None,
    "train.seed": 42,
    "train.timeout_minutes": 10.0,
    "optimizer.lr": 5e-6,
    "optimizer.min_lr": 0.0,
    "optimizer.temperature_lr": 1e-2,
    "optimizer.weight_decay": 0.01,
    "optimizer.clip_grad": 1.0,
    "optimizer.warmup_iters": None,
    "optimizer.lr_decay_style": "linear",
    "optimizer.distributed": True,
    "optimizer.overlap_grad_reduce": True,
    "checkpoint.pretrained_checkpoint": None,
    "checkpoint.load": None,
    "checkpoint.resume": True,
    "checkpoint.allow_fallback": False,
    "logger.tensorboard": True,
    "logger.wandb_project": None,
}


def value_of(cfg: RecipeConfig, key: str) -> object:
    section, _, name = key.rpartition(".")
    return getattr(getattr(cfg, section) if section else cfg, name)


def override(*overrides: str) -> RecipeConfig:
    return apply_overrides(RecipeConfig(), overrides)


def test_every_key_has_its_default_and_a_description() -> None:
    cfg = RecipeConfig()
    assert {key: value_of(cfg, key) for key, _ in keys()} == DEFAULTS
    assert all(field.description for _, field in keys())


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("optimizer.lr=5e-6", 5e-6),
        ("optimizer.lr=1", 1.0),
        ("train.train_iters=7", 7),
        ("train.micro_batch_size=null", None),
        ("train.micro_batch_size=8", 8),
        ("model.sequence_parallel=false", False),
        ("model.virtual_pipeline_model_parallel_size=2", 2),
        ("model.pooling=last", "last"),
        ("loss.matryoshka_dims=[64,128]", [64, 128]),
        ("loss.matryoshka_dims=[]", []),
        ("loss.false_negative_margin=-0.1", -0.1),
        ("data.query_prompt=q: ", "q: "),
        ("data.query_prompt= a=b: [x] #c ", " a=b: [x] #c "),
        ("data.query_prompt=", ""),
        ("data.query_prompt=null", "null"),
        ("data.query_prompt=5e-6", "5e-6"),
        ("data.query_prompt={q}", "{q}"),
        ("train.save_dir= with space", " with space"),
        ("train.save_dir=1.0", "1.0"),
        ("checkpoint.load=null", None),
        ("logger.wandb_project=true", "true"),
        ("device=cpu", "cpu"),
        ("data.eval=a b", ["a b"]),
        ("data.eval=[a,b]", ["a", "b"]),
        ("data.eval=null", None),
    ],
)
def test_override_values(text: str, value: object) -> None:
    found = value_of(override(text), text.partition("=")[0])
    assert found == value
    assert type(found) is type(value)


def test_train_sources_are_a_path_or_paths_or_objects() -> None:
    def paths(text: str) -> list[DataSource]:
        return override(f"data.train={text}").data.train or []

    assert paths("my data.jsonl") == [DataSource(path="my data.jsonl")]
    assert paths("[a.jsonl,hf://org/name]") == [DataSource(path="a.jsonl"), DataSource(path="hf://org/name")]
    assert paths('[{path: a, weight: 2, query_prompt: "q: "}, b]') == [
        DataSource(path="a", weight=2.0, query_prompt="q: "),
        DataSource(path="b"),
    ]
    assert paths("{path: a}") == [DataSource(path="a")]
    cfg = RecipeConfig()
    cfg.data.train = "a.jsonl"  # type: ignore[assignment]
    assert cfg.data.train == [DataSource(path="a.jsonl")]


def test_sources_inherit_prompts() -> None:
    cfg = override('data.train=[{path: a, query_prompt: ""}, b]', "data.query_prompt=Q ", "data.passage_prompt=P ")
    assert [(s.query_prompt, s.passage_prompt) for s in cfg.data.sources()] == [("", "P "), ("Q ", "P ")]


def test_last_override_wins_and_the_config_given_stays_as_it_was() -> None:
    cfg = RecipeConfig()
    assert apply_overrides(cfg, ["train.seed=1", "train.seed=2"]).train.seed == 2
    assert cfg == RecipeConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.train_itres=5", r"unknown key 'train.train_itres'; did you mean 'train.train_iters'\?"),
        ("trian.seed=5", r"unknown key 'trian.seed'; did you mean 'train.seed'\?"),
        ("train.lr=1", r"unknown key 'train.lr'; did you mean 'optimizer.lr'\?"),
        ("lr=1", r"unknown key 'lr'; did you mean 'optimizer.lr'\?"),
        ("model=x", r"unknown key 'model'; wanted one of its keys, such as model\."),
        (
            "zzz.qqq=1",
            r"unknown key 'zzz.qqq'; known sections: checkpoint, data, loss|known sections: checkpoint, data",
        ),
        ("train.train_iters", r"train.train_iters: has no value; wanted train.train_iters=…"),
        ("train.sed", r"'train.sed' is not an override; wanted section.key=value; did you mean 'train.seed'"),
        ("model.pooling=mean", r"model.pooling: found 'mean'; wanted avg, cls, last, weighted_avg"),
        ("loss.mode=fast", r"loss.mode: found 'fast'; wanted auto, direct, cached"),
        ("device=tpu", r"device: found 'tpu'; wanted auto, cpu, cuda"),
        ("train.train_iters=1.5", r"train.train_iters: found '1.5'; wanted a whole number"),
        ("train.train_iters=true", r"train.train_iters: found 'true'; wanted a whole number"),
        ("train.train_iters=", r"train.train_iters: found ''; wanted a whole number"),
        ("train.train_iters=0", r"train.train_iters: found '0'; wanted a number from 1 up"),
        ("train.seed=-1", r"train.seed: found '-1'; wanted a number from 0 up"),
        ("optimizer.lr=abc", r"optimizer.lr: found 'abc'; wanted a number"),
        ("optimizer.lr=true", r"optimizer.lr: found 'true'; wanted a number"),
        ("optimizer.lr=nan", r"optimizer.lr: found 'nan'; wanted a finite number"),
        ("optimizer.lr=0", r"optimizer.lr: found '0'; wanted a number above 0"),
        ("optimizer.lr=[1", r"optimizer.lr: found '\[1'; wanted a number"),
        ("loss.temperature=0", r"loss.temperature: found '0'; wanted a number above 0"),
        ("model.normalize=1", r"model.normalize: found '1'; wanted true or false"),
        ("loss.matryoshka_dims=64", r"loss.matryoshka_dims: found '64'; wanted a list"),
        (
            "loss.matryoshka_dims=[16,8,16]",
            r"loss.matryoshka_dims: found '\[16,8,16\]'; wanted each width once; 16 is listed twice",
        ),
        ("optimizer.temperature_lr=0", r"optimizer.temperature_lr: found '0'; wanted a number above 0"),
        ("data.train=[3]", r"data.train.0: found '\[3\]'; wanted a path or \{path, weight"),
        ("data.train=[{weight: 2}]", r"data.train.0.path: .*wanted keys path, weight"),
        ("data.train={path: a, weigth: 2}", r"data.train.0.weigth: .*wanted keys path, weight"),
        ("data.train={path: a, weight: 0}", r"data.train.0.weight: .*wanted a number above 0"),
    ],
)
def test_bad_overrides(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        override(text)


def test_in_python_a_wrong_value_or_key_is_an_error_for_users_too() -> None:
    cfg = RecipeConfig()
    cfg.train.train_iters = 100
    with pytest.raises(UsageError, match=r"^train.train_iters: found 'many'; wanted a whole number$"):
        cfg.train.train_iters = "many"  # type: ignore[assignment]
    with pytest.raises(UsageError, match=r"^unknown key 'train.train_itres'; did you mean 'train.train_iters'\?$"):
        cfg.train.train_itres = 5  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=r"^unknown key 'optimizer.learning_rate'; did you mean 'optimizer.lr'\?$"):
        cfg.optimizer.learning_rate = 1e-5  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=r"^data.train.1.weigth: found 2; wanted keys path, weight"):
        cfg.data.train = ["a", {"path": "b", "weigth": 2}]  # type: ignore[list-item]
    with pytest.raises(UsageError, match=r"^unknown key 'trian'; did you mean the section 'train'\?$"):
        RecipeConfig(trian={})  # type: ignore[call-arg]
    with pytest.raises(UsageError, match=r"^train.seed: found 'x'; wanted a whole number$"):
        RecipeConfig(train={"seed": "x"})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"^optimizer.lr: found -1; wanted a number above 0$"):
        OptimizerSection(lr=-1)
    assert cfg.train.train_iters == 100
    assert cfg.data.train is None


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("optimizer.learning_rate", "optimizer.lr"),
        ("learning_rate", "optimizer.lr"),
        ("batch_size", "train.global_batch_size"),
        ("train.batch-size", "train.global_batch_size"),
        ("tp", "model.tensor_model_parallel_size"),
        ("model.pp", "model.pipeline_model_parallel_size"),
        ("model.tensor_parallel_size", "model.tensor_model_parallel_size"),
        ("train.max_steps", "train.train_iters"),
        ("output_dir", "train.save_dir"),
        ("optimizer.learnin_rate", "optimizer.lr"),
        ("data.max_length", "data.passage_max_length"),
    ],
)
def test_what_other_programs_call_a_key_is_known(key: str, meant: str) -> None:
    with pytest.raises(UsageError, match=rf"^unknown key '{key}'; did you mean '{meant}'\?$"):
        override(f"{key}=1")


def test_every_alias_leads_to_a_key_and_is_none() -> None:
    known = {key for key, _ in keys()}
    assert set(ALIASES.values()) <= known
    assert not set(ALIASES) & {key.rpartition(".")[2] for key in known}


def test_where_nothing_is_near_the_keys_of_the_section_are_listed() -> None:
    with pytest.raises(UsageError, match=r"^unknown key 'optimizer.foo'; keys of optimizer: lr, min_lr, "):
        override("optimizer.foo=1")


def test_configs_do_not_share_sections() -> None:
    first = RecipeConfig()
    first.train.seed = 7
    first.loss.matryoshka_dims.append(8)
    assert RecipeConfig().train.seed == 42
    assert RecipeConfig().loss.matryoshka_dims == []


def test_yaml_round_trip(tmp_path: Path) -> None:
    cfg = override(
        'data.train=[{path: "ä b", weight: 2}]', "data.query_prompt= q:\t ", "optimizer.lr=3e-7", "device=cpu"
    )
    path = tmp_path / "run" / "run_config.yaml"
    save_run_config(cfg, path)
    save_run_config(cfg, path)  # over an old one
    assert load_run_config(path) == cfg
    assert [file.name for file in path.parent.iterdir()] == ["run_config.yaml"]
    assert stat.S_IMODE(path.stat().st_mode) & 0o044 == 0o044


def test_partial_yaml_is_laid_over_the_recipe_that_it_names(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("recipe: ministral3_8b_embed_config\noptimizer:\n  lr: 1e-5\n")
    cfg = load_run_config(path, recipes=RECIPES)
    assert cfg.model.tensor_model_parallel_size == 2
    assert cfg.optimizer.lr == 1e-5
    assert load_run_config(path, base=RecipeConfig()).model.tensor_model_parallel_size == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  train_itres: 5\n", r"c.yaml: unknown key 'train.train_itres'; did you mean 'train.train_iters'"),
        ("trian:\n  seed: 5\n", r"c.yaml: unknown key 'trian'"),
        ("train: 5\n", r"c.yaml: train: found 5; wanted keys such as train\."),
        ("train:\n  seed: x\n", r"c.yaml: train.seed: found 'x'; wanted a whole number"),
        ("- a\n", r"c.yaml: found list; wanted sections"),
        ("a: [\n", r"c.yaml: not valid YAML"),
        ("", r"c.yaml: found NoneType; wanted sections"),
        ("model:\n  hf_model: !!python/object/apply:os.system [true]\n", r"c.yaml: not valid YAML"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_run_config(path)


def test_absent_yaml(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.yaml: cannot be read \(No such file"):
        load_run_config(tmp_path / "none.yaml")


def test_differences_name_keys_and_both_values() -> None:
    a = override("optimizer.lr=1e-5", "train.seed=1", "train.train_iters=5")
    b = override("train.train_iters=9", "data.query_prompt=x", "train.seed=1")
    assert changed_keys(a, b, ("model.hf_model", "data.", "optimizer.", "train.seed")) == [
        ("data.query_prompt", "query: ", "x"),
        ("optimizer.lr", 1e-5, 5e-6),
    ]


def test_resolved_fills_derived_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAVE_DIR", raising=False)
    cfg = override("model.tensor_model_parallel_size=2", "train.train_iters=250", "recipe=mine")
    resolved = cfg.resolved()
    assert resolved.model.sequence_parallel is True
    assert resolved.optimizer.warmup_iters == 25
    assert resolved.train.save_dir == "runs/mine"
    assert cfg.optimizer.warmup_iters is None
    assert (
        override("model.sequence_parallel=true").resolved().model.sequence_parallel is False
    )  # TP 1: nothing to split
    monkeypatch.setenv("SAVE_DIR", "/elsewhere")
    assert cfg.resolved().train.save_dir == "/elsewhere"
    cfg.train.save_dir = "~/runs"
    assert cfg.resolved().train.save_dir == str(Path.home() / "runs")
    assert override("train.save_dir=here").resolved().train.save_dir == "here"


def test_every_recipe_is_named_after_its_function_and_survives_yaml(tmp_path: Path) -> None:
    layouts = {}
    for name, recipe in RECIPES.items():
        cfg = recipe()
        assert cfg.recipe == name
        assert recipe() == cfg
        save_run_config(cfg, tmp_path / name)
        assert load_run_config(tmp_path / name) == cfg
        assert yaml.safe_load((tmp_path / name).read_text())["recipe"] == name
        layouts[name] = (cfg.model.tensor_model_parallel_size, cfg.train.global_batch_size, cfg.optimizer.lr)
    assert layouts["ministral3_3b_embed_config"] == (1, 128, 5e-6)
    assert layouts["ministral3_8b_embed_config"] == (2, 128, 5e-6)
    assert layouts["ministral3_14b_embed_config"] == (4, 128, 5e-6)
