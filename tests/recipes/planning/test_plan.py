"""The planner's arithmetic by hand, and its command line. Against real ranks: tests/distributed/test_plan_memory.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.places import HF_CONFIGS
from support.tiny_models import save_model, tiny_config

from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.errors import UserError
from megatron_embed.bridge.layout import Layout
from megatron_embed.recipes import RECIPES, SIZES
from megatron_embed.recipes.config.overrides import apply_overrides
from megatron_embed.recipes.config.schema import RecipeConfig
from megatron_embed.recipes.encoding.micro_batches import BatchingPlan
from megatron_embed.recipes.plan import main
from megatron_embed.recipes.planning.activations import Shape, in_flight
from megatron_embed.recipes.planning.layouts import GIB, layouts, plan_layout, plan_world, recommend
from megatron_embed.recipes.planning.model_sizes import encoder_of
from megatron_embed.recipes.planning.state import chunks_of, states
from megatron_embed.recipes.planning.step import bubble, step_of, traffic

FIXTURES = {
    "mistralai/Ministral-3-3B-Base-2512": "ministral-3-3b",
    "mistralai/Ministral-3-3B-Instruct-2512": "ministral-3-3b-instruct-fp8",
    "mistralai/Ministral-3-8B-Base-2512": "ministral-3-8b",
    "mistralai/Ministral-3-14B-Base-2512": "ministral-3-14b",
    "meta-llama/Llama-3.2-1B": "llama-3.2-1b",
    "meta-llama/Llama-3.1-8B": "llama-3.1-8b",
    "Qwen/Qwen3-0.6B-Base": "qwen3-0.6b",
    "Qwen/Qwen3-4B-Base": "qwen3-4b",
    "Qwen/Qwen3-8B-Base": "qwen3-8b",
}
TINY, LARGE = "ministral3_tiny_embed_config", "ministral3_14b_embed_config"


def recipe(name: str, *overrides: str) -> RecipeConfig:
    return apply_overrides(RECIPES[name](), overrides)


def encoder() -> EncoderConfig:
    return EncoderConfig.from_hf(tiny_config(num_hidden_layers=4))


def run(*argv: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.mark.parametrize("name", FIXTURES)
def test_known_sizes_are_the_models_own(name: str) -> None:
    read = EncoderConfig.from_hf(json.loads((HF_CONFIGS / f"{FIXTURES[name]}.json").read_text()))
    for key in (
        *("family", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings"),
        "rms_norm_eps",
    ):
        assert getattr(SIZES[name], key) == getattr(read, key), key
    for key, value in SIZES[name].rope_parameters.items():
        assert read.rope_parameters[key] == value, key


def test_every_recipe_names_a_known_model() -> None:
    for name in RECIPES:
        if name != TINY:
            assert encoder_of(RECIPES[name](), SIZES).num_hidden_layers > 10


def test_an_8b_rank_by_hand() -> None:
    config = SIZES["mistralai/Ministral-3-8B-Base-2512"]
    layer = 4096 * (4096 + 2 * 1024 + 4096 + 3 * 14336) + 2 * 4096
    values = 131072 * 4096 + 34 * layer + 4096
    (whole,) = states(config, Layout(), 0, precision="bf16", distributed=False, replicas=1)
    assert (whole.parameters, whole.gradients, whole.optimizer) == (2 * values, 4 * values, 12 * values)
    sharded = states(config, Layout(), 0, precision="bf16", distributed=True, replicas=8)
    assert sum(state.optimizer for state in sharded) == 12 * values
    assert max(state.optimizer for state in sharded) == pytest.approx(12 * values / 8, rel=1e-6)
    (wide,) = states(config, Layout(), 0, precision="fp32", distributed=False, replicas=1)
    assert (wide.parameters, wide.gradients, wide.optimizer) == (4 * values, 4 * values, 8 * values)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["data.packing=false"],
        ["train.micro_batch_size=5"],
        ["train.micro_batch_size=500"],
        ["data.query_max_length=37", "model.tensor_model_parallel_size=4", "train.micro_batch_tokens=700"],
        ["model.pipeline_model_parallel_size=4", "model.virtual_pipeline_model_parallel_size=2"],
    ],
)
def test_micro_batches_are_those_of_training(overrides: list[str]) -> None:
    cfg = recipe(TINY, "train.global_batch_size=16", "data.negatives_per_query=2", *overrides)
    model = cfg.model
    layout = Layout(
        model.tensor_model_parallel_size,
        model.pipeline_model_parallel_size,
        vpp=model.virtual_pipeline_model_parallel_size,
    )
    step = step_of(cfg, layout, 2)
    texts = [[5] * cfg.data.query_max_length] * 8 + [[5] * cfg.data.passage_max_length] * 24
    plan = BatchingPlan(
        pad_id=0,
        packed=cfg.data.packing,
        max_tokens=cfg.train.micro_batch_tokens,
        max_texts=cfg.train.micro_batch_size,
        multiple_of=layout.tp * layout.cp,
        count_multiple_of=layout.pp if layout.vpp else 1,
    )
    direct = layout.pp == 1 and plan.holds(texts)
    real = [Shape.of(batch.tokens) for batch in (plan.join if direct else plan.split)(texts)]
    assert step.mode == ("direct" if direct else "cached")
    assert [(s.lengths, s.columns) for s in step.micro_batches] == [(s.lengths, s.columns) for s in real]
    assert step.texts == len(texts)


def test_micro_batches_in_flight() -> None:
    assert [in_flight([10], 4, rank, 8) for rank in range(4)] == [40, 30, 20, 10]
    assert [in_flight([10], 4, rank, 2) for rank in range(4)] == [20, 20, 20, 10]
    # Narayanan et al. 2021, figure 4: 4 devices, 2 chunks: 2 · 3 + 4 before the first 1F1B, and its forward
    assert [in_flight([1, 1], 4, rank, 8) for rank in range(4)] == [11, 9, 7, 5]
    assert in_flight([1, 1], 4, 0, 4) == 8
    assert in_flight([3, 5], 2, 1, 2) == 3 + 3 + 5


def test_bubble_and_traffic_by_hand() -> None:
    assert bubble(Layout(pp=4), 12) == 3 / 12
    assert bubble(Layout(pp=4, vpp=2), 12) == 3 / 24
    assert bubble(Layout(), 12) == 0
    cfg = recipe(TINY, "train.global_batch_size=8", "data.negatives_per_query=0", "loss.mode=cached")
    config = encoder()

    def sent(layout: Layout, recompute: str = "none", sequence_parallel: bool = True, replicas: int = 1) -> Any:
        step = step_of(cfg, layout, replicas)
        cfg.model.sequence_parallel = sequence_parallel and layout.tp > 1
        return traffic(
            cfg,
            config,
            layout,
            step,
            chunks_of(config, layout, 0),
            replicas=replicas,
            recompute=recompute,
            parameters=1000,
            gradients=1000,
        )

    tokens = 16 * 128
    hidden = tokens * 48 * 4
    # 4 layers, two passes of 4 and a backward of 6; embedding and end of the stack; norms' gradients
    assert sent(Layout(tp=2)).tensor == (4 * hidden * 14 + 3 * hidden + 2 * hidden + 2 * 9 * 48 * 4) // 2
    assert sent(Layout(tp=2), sequence_parallel=False).tensor == (4 * hidden * 12 + 4 * hidden) // 2
    assert sent(Layout(tp=2), "full").tensor - sent(Layout(tp=2)).tensor == 4 * hidden * 4 // 2
    assert sent(Layout(pp=2)).pipeline == 2 * hidden  # the first stage: forward in both passes
    assert sent(Layout(pp=2, vpp=2)).pipeline == 2 * 2 * hidden + hidden
    keys_and_values = 4 * tokens * 2 * 4 * 8 * 4
    pooled = 2 * 2 * 16 * 48 * 4
    assert sent(Layout(cp=2)).context == (3 * keys_and_values + pooled) // 2
    assert sent(Layout(cp=2), "selective").context == (4 * keys_and_values + pooled) // 2
    assert sent(Layout(), replicas=4).data == 2000 * 3 // 4
    assert sent(Layout(), replicas=4).loss == 2 * 8 * 48 * 4 * 3 // 4
    assert sent(Layout()).total == 0


def test_every_possible_layout_and_no_other() -> None:
    found = {(x.tp, x.pp, x.cp, x.vpp) for x in layouts(encoder(), 4)}
    assert {(1, 1, 1, None), (1, 1, 4, None), (2, 2, 1, 2), (1, 4, 1, None), (4, 1, 1, None)} <= found
    assert (1, 4, 1, 2) not in found  # 8 stages of 4 layers
    plans = plan_world(recipe(TINY, "model.hf_model=x"), encoder(), 8, gpu_memory=80)
    assert all(plan.layout.tp <= 4 for plan in plans)  # 4 KV heads
    assert len({str(plan.layout) for plan in plans}) == len(plans)
    with pytest.raises(UserError, match=r"no layout of 5 ranks .* train.global_batch_size: 32 is not a multiple"):
        plan_world(recipe(TINY, "data.query_max_length=9999"), encoder().replace(num_hidden_layers=2), 5, gpu_memory=80)


def test_recompute_is_the_least_that_fits_and_can_be_pinned() -> None:
    cfg, config = recipe("ministral3_3b_embed_config"), SIZES["mistralai/Ministral-3-3B-Base-2512"]
    by_recompute = plan_layout(cfg, config, 1)
    full = by_recompute["full"].total / GIB
    assert by_recompute["none"].total / GIB > 80 > full
    (plan,) = plan_world(cfg, config, 1, gpu_memory=80)
    assert plan.recompute == "full"
    assert recommend([plan], 80) is plan
    assert recommend([plan], full) is None  # a share is left for CUDA itself
    (plan,) = plan_world(cfg, config, 1, gpu_memory=1000)
    assert plan.recompute == "none"
    (plan,) = plan_world(cfg, config, 1, gpu_memory=80, recompute="none")
    assert not plan.fits(80)


@pytest.mark.parametrize("name", [name for name in RECIPES if name != TINY])
def test_shipped_recipes_are_planned_without_files(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(name, "--world-size", "8", capsys=capsys)
    assert (status, err) == (0, "")
    assert f"{name} on 8 ranks" in out
    (line,) = (line for line in out.splitlines() if line.startswith("Recommended: TP "))
    assert "fit into 80 GiB" in line
    # the line ends in overrides that plan just that layout
    status, out, _ = run(name, "--world-size", "8", *line.rpartition(": ")[2].split(), capsys=capsys)
    assert status == 0
    assert line.partition(", recompute")[0].removeprefix("Recommended: ") in out


def test_a_layout_that_is_given_in_detail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    layout = ["model.tensor_model_parallel_size=4", "model.pipeline_model_parallel_size=4"]
    argv = (LARGE, "--world-size", "64", *layout, "model.recompute=full", "--json", str(file))
    status, out, _ = run(*argv, capsys=capsys)
    assert status == 0
    assert "TP 4 × PP 4 × CP 1 × DP 4: GiB on the fullest rank of each stage" in out
    assert "recompute full fits into 80 GiB" in out
    (plan,) = json.loads(file.read_text())["layouts"]
    assert (plan["data"], plan["layers"], plan["recompute"]) == (4, [10, 10, 10, 10], "full")
    assert plan["bubble"] == 3 / plan["micro_batches"]
    for stage in plan["stages"]:
        assert stage["optimizer"] == stage["optimizer_sharded"] < stage["optimizer_whole"]
        assert stage["activations"]["full"] < stage["activations"]["selective"]
        kept = stage["parameters"] + stage["gradients"] + stage["optimizer"]
        backward = stage["activations"]["full"] + stage["working"]["full"]
        assert stage["total"] == kept + max(backward, stage["loss"])
    assert plan["total_bytes"] == max(stage["total"] for stage in plan["stages"])


def test_a_model_folder_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "hf", num_hidden_layers=4, tokenizer=False)
    for weights in (tmp_path / "hf").glob("*.safetensors"):
        weights.unlink()
    capsys.readouterr()
    folder = f"model.hf_model={tmp_path / 'hf'}"
    status, out, err = run(TINY, "--world-size", "4", "--top", "2", folder, "device=cpu", capsys=capsys)
    assert (status, err) == (0, "")
    assert "activations of a CPU" in out
    assert "more layouts: --top 0 shows all" in out
    status, out, _ = run(TINY, "--world-size", "1", "--gpu-memory", "0.0001", folder, capsys=capsys)
    assert status == 0
    assert "Recommended: none of 1 layouts fits into 0.0001 GiB" in out


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        ([], 2, "error: the following arguments are required: --world-size"),
        (["--world-size", "4"], 2, "error: no recipe; wanted one of"),
        ([LARGE, "--world-size", "0"], 2, "error: argument --world-size: found '0'; wanted a whole number"),
        ([LARGE, "--world-size", "4", "--gpu-memory", "nan"], 2, "error: argument --gpu-memory: found 'nan'; wanted"),
        (["ministral3_3b", "--world-size", "4"], 2, "error: unknown recipe 'ministral3_3b'; did you mean"),
        ([LARGE, "--world-size", "4", "model.tp=2"], 2, "error: unknown key 'model.tp'"),
        ([TINY, "--world-size", "4"], 2, "error: model.hf_model: missing"),
        ([TINY, "--world-size", "4", "model.hf_model=a/b"], 1, "error: model.hf_model: 'a/b' is no folder, and its"),
        (
            [LARGE, "--world-size", "48", "model.tensor_model_parallel_size=3"],
            1,
            "error: model.tensor_model_parallel_size: 3 does not divide num_attention_heads 32",
        ),
        (
            [LARGE, "--world-size", "256", "model.pipeline_model_parallel_size=64"],
            1,
            "error: model.pipeline_model_parallel_size: 64 is more than the model's 40 layers",
        ),
        ([LARGE, "--world-size", "6", "model.context_parallel_size=4"], 2, "error: world size: found 6; wanted"),
        (
            [LARGE, "--world-size", "1024", "model.context_parallel_size=1"],
            2,
            "error: train.global_batch_size: 128 is smaller than the data-parallel size 256",
        ),
        (
            [LARGE, "--world-size", "8", "data.passage_max_length=20000"],
            2,
            "error: no layout of 8 ranks can run this recipe; data.passage_max_length: 20000 does not fit",
        ),
        (
            [LARGE, "--world-size", "8", "loss.matryoshka_dims=[9000]"],
            1,
            "error: no layout of 8 ranks can run this recipe; loss.matryoshka_dims: 9000 is above",
        ),
        (
            [LARGE, "--world-size", "4", "model.context_parallel_size=1", "loss.mode=direct"],
            1,
            "error: loss.mode: direct needs a rank's whole batch in one micro-batch",
        ),
    ],
)
def test_bad_input_ends_with_one_message(
    argv: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found, out, err = run(*argv, capsys=capsys)
    assert (found, out) == (status, "")
    assert err.startswith(message)


def test_kept_graphs_cost_memory_and_save_forward_passes() -> None:
    def plan_of(kept: object) -> Any:
        cfg = recipe("ministral3_3b_embed_config", "train.global_batch_size=256", f"loss.kept_micro_batches={kept}")
        return plan_layout(cfg, encoder_of(cfg, SIZES), 8)["none"]

    none, some, auto, everything = (plan_of(kept) for kept in (0, 2, "auto", 1000))
    count = len(none.step.micro_batches)
    assert count > 4
    assert [plan.step.forwards for plan in (none, some, auto, everything)] == [2, 2 - 2 / count, 2, 1]
    assert some.seconds < none.seconds
    one = none.worst.activations["none"]
    assert some.worst.activations["none"] == 2 * one
    assert everything.worst.activations["none"] == count * one
    assert auto.total == none.total < some.total < everything.total
