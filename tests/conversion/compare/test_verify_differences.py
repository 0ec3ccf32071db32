"""``verify`` names what differs: one key, file or setting of an export or a checkpoint changed by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hf_files import Source, edit_json, without_checksums
from support.places import FIXTURES
from support.run_files import edit_encoder, edit_run

from megatron_embed.conversion.compare.tokenizers import compare_tokenizers
from megatron_embed.conversion.exporting import export_hf
from megatron_embed.conversion.importing import import_hf
from megatron_embed.conversion.verify import verify


@pytest.fixture(scope="module")
def made(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VLM with a processor in ``source``; of it the checkpoint ``m``, the embedder ``hf`` and the VLM ``vlm``."""
    root = tmp_path_factory.mktemp("made")
    shutil.copytree(source("vlm", dtype="bfloat16"), root / "source")
    shutil.copy(FIXTURES / "processor_config.json", root / "source")
    import_hf(root / "source", root / "m", with_vision=True, progress=False)
    export_hf(root / "m", root / "hf", progress=False)
    export_hf(root / "m", root / "vlm", target="vlm", progress=False)
    return root


def set_to(**values: Any) -> Callable[[dict[str, Any]], object]:
    """An edit of a JSON object; ``None`` removes the key, ``a__b`` stands for ``b`` in ``a``."""

    def edit(raw: dict[str, Any]) -> None:
        for name, value in values.items():
            *path, key = name.split("__")
            inner = raw
            for part in path:
                inner = inner[part]
            if value is None:
                del inner[key]
            else:
                inner[key] = value

    return edit


def swap_two_ids(tokenizer: dict[str, Any]) -> None:
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["e"] = vocab["e"], vocab["a"]


def drop_a_merge(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["merges"].pop()


def no_eos(tokenizer: dict[str, Any]) -> None:
    tokenizer["post_processor"]["single"].pop()


CONFIG, SENTENCES, PROCESSOR = "config.json", "sentence-transformers files", "processor_config.json"
PROMPTS, LENGTHS = "config_sentence_transformers.json", "sentence_bert_config.json"
STORED = "bfloat16, in which the tensors are stored"
#: (which, file, edit, name, found, wanted)
CHANGES: dict[str, tuple[str, str, Callable[[dict[str, Any]], object], str, str, str]] = {
    "rope_theta": (
        *("hf", CONFIG, set_to(rope_parameters__rope_theta=1e4)),
        *(f"{CONFIG}: rope_parameters.rope_theta", "10000.0", "1000000.0"),
    ),
    "rms_norm_eps": ("hf", CONFIG, set_to(rms_norm_eps=1e-6), f"{CONFIG}: rms_norm_eps", "1e-06", "1e-05"),
    **{
        f"no attention mask in {which}": (
            *(which, "tokenizer_config.json", set_to(model_input_names=["input_ids"])),
            *("tokenizer_config.json: model_input_names", "'without attention_mask'", "'with attention_mask'"),
        )
        for which in ("hf", "vlm")
    },
    "dtype": ("hf", CONFIG, set_to(dtype="float16"), f"{CONFIG}: dtype", "float16", STORED),
    "torch_dtype": ("hf", CONFIG, set_to(torch_dtype="float32"), f"{CONFIG}: torch_dtype", "float32", STORED),
    "dtype of a VLM": (
        *("vlm", CONFIG, set_to(text_config__dtype="float16")),
        *(f"{CONFIG}: text_config.dtype", "float16", STORED),
    ),
    "is_causal": ("hf", CONFIG, set_to(is_causal=True), f"{CONFIG}: is_causal", "True", "False"),
    "is_causal missing": ("hf", CONFIG, set_to(is_causal=None), f"{CONFIG}: is_causal", "not stated", "False"),
    "is_causal missing in a VLM": (
        *("vlm", CONFIG, set_to(text_config__is_causal=None)),
        *(f"{CONFIG}: text_config.is_causal", "not stated", "False"),
    ),
    "empty prompts": (
        *("hf", PROMPTS, set_to(prompts={"query": "", "document": ""})),
        *(f"{SENTENCES}: query_prompt", "''", "'query: '"),
    ),
    "no prompts": ("hf", PROMPTS, set_to(prompts={}), f"{SENTENCES}: passage_prompt", "''", "'passage: '"),
    "max_seq_length": (
        *("hf", LENGTHS, set_to(max_seq_length=77)),
        *(f"{SENTENCES}: query_max_length", "77", "512"),
    ),
    "two token ids swapped": ("hf", "tokenizer.json", swap_two_ids, "tokenizer.json: vocabulary, 2 places", "", ""),
    "vision patch_size": (
        *("vlm", CONFIG, set_to(vision_config__patch_size=7)),
        *(f"{CONFIG}: vision_config.patch_size", "7", "14"),
    ),
    # beyond the eight above
    "llama_4_scaling_beta": (
        *("hf", CONFIG, set_to(rope_parameters__llama_4_scaling_beta=0.2)),
        *(f"{CONFIG}: rope_parameters.llama_4_scaling_beta", "0.2", "0.1"),
    ),
    "original length": (
        *("hf", CONFIG, set_to(rope_parameters__original_max_position_embeddings=128)),
        *(f"{CONFIG}: rope_parameters.original_max_position_embeddings", "128", "64"),
    ),
    "factor missing": (
        *("vlm", CONFIG, set_to(text_config__rope_parameters__beta_fast=None)),
        *(f"{CONFIG}: rope_parameters.beta_fast", "not stated", "32.0"),
    ),
    "vLLM's query scale": (
        *("hf", CONFIG, set_to(llama_4_scaling__beta=0.3)),
        *(f"{CONFIG}: llama_4_scaling", "{'beta': 0.3, 'original_max_position_embeddings': 64}", ""),
    ),
    "vLLM's yarn factor": (
        *("hf", CONFIG, set_to(rope_parameters__apply_yarn_scaling=True)),
        *(f"{CONFIG}: rope_parameters.apply_yarn_scaling", "True", "False"),
    ),
    "heads": ("hf", CONFIG, set_to(num_attention_heads=16, head_dim=4), f"{CONFIG}: num_attention_heads", "16", "8"),
    "hidden_act": ("hf", CONFIG, set_to(hidden_act="gelu"), f"{CONFIG}: hidden_act", "'gelu'", "'silu'"),
    "sliding_window": ("hf", CONFIG, set_to(sliding_window=8), f"{CONFIG}: sliding_window", "8", "None"),
    "max positions": (
        *("hf", CONFIG, set_to(max_position_embeddings=2048)),
        *(f"{CONFIG}: max_position_embeddings", "2048", "1024"),
    ),
    "tie": ("vlm", CONFIG, set_to(tie_word_embeddings=False), f"{CONFIG}: tie_word_embeddings", "False", "True"),
    "layers": ("hf", CONFIG, set_to(num_hidden_layers=1), f"{CONFIG}: num_hidden_layers", "1", "2"),
    "projector": (
        *("vlm", CONFIG, set_to(projector_hidden_act="relu")),
        *(f"{CONFIG}: projector_hidden_act", "'relu'", "'gelu'"),
    ),
    "merge size": ("vlm", CONFIG, set_to(spatial_merge_size=1), f"{CONFIG}: spatial_merge_size", "1", "2"),
    "query_length": ("hf", LENGTHS, set_to(query_length=9), f"{SENTENCES}: query_max_length", "9", "512"),
    "lower case": ("hf", LENGTHS, set_to(do_lower_case=True), f"{SENTENCES}: do_lower_case", "True", "False"),
    "another prompt": ("hf", PROMPTS, set_to(prompts__sts="x"), f"{SENTENCES}: prompts.sts", "'x'", "not stated"),
    "default prompt": (
        *("hf", PROMPTS, set_to(default_prompt_name="query")),
        *(f"{SENTENCES}: default_prompt_name", "'query'", "None"),
    ),
    "bare pooling": ("hf", CONFIG, set_to(pooling="cls"), f"{CONFIG}: pooling", "'cls'", "'avg'"),
    "processor": ("vlm", PROCESSOR, set_to(patch_size=16), f"{PROCESSOR}: patch_size", "16", "14"),
    "merges": ("hf", "tokenizer.json", drop_a_merge, "tokenizer.json: merges, 1 places", "", ""),
    "no EOS": ("hf", "tokenizer.json", no_eos, "tokenizer: ids of 26 of 26 texts, '' from token 1 on", "end", "2"),
    "pad token": (
        "vlm",
        "tokenizer_config.json",
        set_to(pad_token="</s>"),
        "tokenizer_config.json: pad_token_id",
        "2",
        "11",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_verify_names_what_differs(change: str, made: Path, tmp_path: Path) -> None:
    """One key of an export changed: the outcome names it, with what was found and what was wanted."""
    which, file, edit, name, found, wanted = CHANGES[change]
    shutil.copytree(made / which, tmp_path / which)
    edit_json(tmp_path / which / file, edit)
    outcome = verify(made / "source", hf_path=tmp_path / which, progress=False)
    assert not outcome
    (difference,) = [difference for difference in outcome.differences if difference.name == name]
    assert difference.found == found or not found
    assert difference.wanted == wanted or not wanted
    assert difference.found != difference.wanted


PLACES = "added_tokens.json, tokenizer_config.json: tokens beside tokenizer.json, 1 places"


@pytest.mark.parametrize(
    ("file", "added"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"999": {"content": "zebra"}}}),
        ("tokenizer_config.json", {"extra_special_tokens": ["zebra"]}),
        ("added_tokens.json", {"zebra": 999}),
    ],
    ids=["added_tokens_decoder", "extra_special_tokens", "added_tokens.json"],
)
def test_tokens_added_beside_the_tokenizer_json(file: str, added: dict[str, Any], made: Path, tmp_path: Path) -> None:
    """No text whose ids are compared holds them."""
    shutil.copytree(made / "hf", tmp_path / "hf")
    path = tmp_path / "hf" / file
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | added))
    differences = compare_tokenizers(tmp_path / "hf", made / "source").differences
    assert PLACES in [difference.name for difference in differences]


def swap_ids_kept(iter_dir: Path) -> None:
    edit_json(iter_dir / "hf" / "tokenizer.json", swap_two_ids)


def patch_size_kept(iter_dir: Path) -> None:
    edit_json(iter_dir / "hf" / CONFIG, set_to(vision_config__patch_size=7))


def no_processor(iter_dir: Path) -> None:
    (iter_dir / "hf" / PROCESSOR).unlink()


@pytest.mark.parametrize(
    ("edit", "name"),
    [
        (lambda path: edit_encoder(path.parent, rms_norm_eps=1e-6), "run_config.yaml: encoder: rms_norm_eps"),
        (lambda path: edit_encoder(path.parent, tie_word_embeddings=False), "run_config.yaml: encoder: tie_word_emb"),
        (lambda path: edit_run(path.parent, "data", query_prompt=""), "run_config.yaml: data: query_prompt"),
        (lambda path: edit_run(path.parent, "data", passage_max_length=9), "run_config.yaml: data: passage_max_length"),
        (swap_ids_kept, "tokenizer.json: vocabulary, 2 places"),
        (patch_size_kept, "hf/config.json: vision_config.patch_size"),
        (no_processor, "processor_config.json"),
    ],
    ids=["eps", "tie", "prompt", "length", "ids", "patch_size", "processor"],
)
def test_verify_names_what_differs_in_a_checkpoint(
    edit: Callable[[Path], object], name: str, made: Path, tmp_path: Path
) -> None:
    shutil.copytree(made / "m", tmp_path / "m")
    edit(without_checksums(tmp_path / "m" / "iter_0000000"))
    outcome = verify(made / "source", megatron_path=tmp_path / "m", progress=False)
    assert any(difference.name.startswith(name) for difference in outcome.differences)


def test_an_export_is_held_to_its_checkpoints_settings(made: Path, tmp_path: Path) -> None:
    """Trained with other prompts: what the checkpoint says counts, not what an import would set."""
    shutil.copytree(made / "m", tmp_path / "m")
    edit_run(tmp_path / "m", "data", query_prompt="", query_max_length=40, passage_max_length=40)
    export_hf(tmp_path / "m", tmp_path / "hf", progress=False)
    assert verify(tmp_path / "hf", megatron_path=tmp_path / "m", progress=False)
    outcome = verify(tmp_path / "hf", megatron_path=made / "m", progress=False)
    assert {difference.name for difference in outcome.differences} == {
        f"run_config.yaml: data: {name}" for name in ("query_prompt", "query_max_length", "passage_max_length")
    }


def test_files_that_are_missing_are_named(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "hf", tmp_path / "hf")
    for name in ("modules.json", "tokenizer.json"):
        (tmp_path / "hf" / name).unlink()
    outcome = verify(made / "source", hf_path=tmp_path / "hf", progress=False)
    assert {(d.name, d.found) for d in outcome.differences} == {
        ("modules.json", "no such file"),
        ("tokenizer.json", "no such file"),
    }


@pytest.mark.parametrize("stated", [True, None], ids=["true", "not stated"])
def test_a_causal_ready_embedder_is_not_its_bidirectional_export(
    stated: bool | None, made: Path, tmp_path: Path
) -> None:
    """Its own vectors are causal; what is made of it here is not: both the key and the vectors differ."""
    folder = tmp_path / "ready"
    shutil.copytree(made / "hf", folder)
    assert verify(folder, hf_path=made / "hf", progress=False)
    edit_json(folder / CONFIG, set_to(is_causal=stated))
    for other in ({"hf_path": made / "hf"}, {"megatron_path": made / "m"}):
        outcome = verify(folder, **other, progress=False)  # type: ignore[arg-type]
        assert [d.name.rpartition(" ")[2] for d in outcome.differences] == ["is_causal", "embeddings"]
        assert outcome.differences[0].found == "False"
        assert outcome.differences[0].wanted.startswith("True")
        assert verify(folder, **other, bidirectional=True, progress=False)  # type: ignore[arg-type]


def test_a_causal_embedder_taken_as_a_base_model(made: Path, tmp_path: Path) -> None:
    """The checkpoint says so itself."""
    folder = tmp_path / "ready"
    shutil.copytree(made / "hf", folder)
    edit_json(folder / CONFIG, set_to(is_causal=True))
    import_hf(folder, tmp_path / "m", bidirectional=True, progress=False)
    outcome = verify(folder, megatron_path=tmp_path / "m", progress=False)
    assert outcome
    assert outcome.notes == [
        "the source is an embedder with causal attention, taken as a base model: both sides bidirectional"
    ]


def test_rope_theta_is_named_where_nothing_is_embedded(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of a parallel run the Megatron side cannot be run."""
    shutil.copytree(made / "m", tmp_path / "m")
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 64}
    edit_encoder(tmp_path / "m", rope_parameters=rope)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    outcome = verify(made / "source", megatron_path=tmp_path / "m", progress=False)
    found = {difference.name: difference.found for difference in outcome.differences}
    assert found["run_config.yaml: encoder: rope_parameters.rope_theta"] == "10000.0"
    assert outcome.embeddings is None
    assert outcome.notes[-1].startswith("embeddings not compared: ")
