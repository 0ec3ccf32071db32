"""Keys of a ready embedder's files that would change its vectors and are not honoured: refused by file and name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import SentenceTransformer
from support.hf_files import edit_json
from support.ready import make_ready

from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.hf.sentence_files import (
    SentenceSettings,
    beside_the_recipe,
    default_settings,
    read_sentence_settings,
    with_the_recipes,
    write_sentence_files,
)
from megatron_embed.conversion.importing import import_hf

BERT, MODEL, POOLING = "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling/config.json"
FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (BERT, {"transformer_task": "fill-mask"}, 'transformer_task is "fill-mask"; wanted "feature-extraction"'),
    (BERT, {"module_output_name": "scores"}, 'module_output_name is "scores"; wanted "token_embeddings"'),
    (BERT, {"query_expansion": {"strategy": "min", "length": 32}}, "query_expansion is {"),
    (BERT, {"processing_kwargs": {"text": {"max_length": 5}}}, "processing_kwargs is {"),
    (BERT, {"config_kwargs": {"is_causal": False}}, 'config_kwargs is {"is_causal": false}; wanted null or {}'),
    (BERT, {"config_args": {"is_causal": False}}, "config_args is {"),
    (BERT, {"model_kwargs": {"dtype": "float16"}}, 'model_kwargs.dtype is "float16"; wanted "auto"'),
    (BERT, {"model_args": {"rotary_scaling_factor": 2}}, "model_args.rotary_scaling_factor is 2; wanted only keys"),
    (BERT, {"tokenizer_args": {"do_lower_case": True}}, "tokenizer_args.do_lower_case is true; wanted only keys"),
    (BERT, {"tokenizer_name_or_path": "bert-base"}, 'tokenizer_name_or_path is "bert-base"; wanted null'),
    (BERT, {"modality_config": {"text": {**FORWARD, "method": "get_text_features"}}}, "modality_config.text is {"),
    (BERT, {"modality_config": {"text": FORWARD, "message": FORWARD}}, "modality_config.message is {"),
    (BERT, {"max_seq_length": 0}, "max_seq_length is 0; wanted a whole number of tokens from 1 up, or null"),
    (BERT, {"query_length": 7.5}, "query_length is 7.5; wanted a whole number"),
    (BERT, {"document_length": "9"}, 'document_length is "9"; wanted a whole number'),
    (BERT, {"do_lower_case": "no"}, 'do_lower_case is "no"; wanted true or false'),
    (
        BERT,
        {"lower_case_all": True},
        "lower_case_all is true; wanted only keys whose effect is known here: max_seq_length",
    ),
    (MODEL, {"similarity_fn_name": "euclidean"}, 'similarity_fn_name is "euclidean"; wanted cosine or dot'),
    (MODEL, {"similarity_fn_name": "manhattan"}, 'similarity_fn_name is "manhattan"; wanted cosine or dot'),
    (
        MODEL,
        {"truncate_dim": 16},
        "truncate_dim is 16; wanted null: take it out, and shorten vectors with `encode --dim`",
    ),
    (MODEL, {"model_type": "SparseEncoder"}, 'model_type is "SparseEncoder"; wanted "SentenceTransformer"'),
    (
        MODEL,
        {"default_prompt_name": "s2s"},
        'default_prompt_name is "s2s"; wanted null or one of the prompts, document,',
    ),
    (MODEL, {"prompts": {"query": 5}}, "prompts.query is 5; wanted a text"),
    (MODEL, {"prompts": ["q"]}, 'prompts is ["q"]; wanted an object of texts by name'),
    (MODEL, {"whitening": True}, "whitening is true; wanted only keys whose effect is known here: __version__"),
    (POOLING, {"include_prompt": False}, "include_prompt is false; the encoder pools over the prompt's tokens as well"),
    (POOLING, {"pooling_mode": "max"}, "pooling max; wanted one of mean, cls, lasttoken, weightedmean"),
    (POOLING, {"pooling_mode": ["mean", "cls"]}, "pooling mean + cls; wanted one of"),
    (POOLING, {"power": 2}, "power is 2; wanted only keys whose effect is known here"),
    ("2_Normalize/config.json", {"module_input_name": "token_embeddings"}, 'module_input_name is "token_embeddings"'),
    ("2_Normalize/config.json", {"ord": 1}, "ord is 1; wanted only keys whose effect is known here"),
]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ready embedder."""
    path = make_ready(tmp_path_factory.mktemp("ready") / "model")
    (path / "2_Normalize").mkdir()
    (path / "2_Normalize" / "config.json").write_text('{"module_input_name": "sentence_embedding"}')
    return path


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(original, tmp_path / "ready"))


@pytest.mark.parametrize(("file", "change", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_settings_that_are_not_honoured_are_refused_by_name(
    file: str, change: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    edit_json(folder / file, lambda value: value.update(change))
    with pytest.raises(UserError, match=f"^{re.escape(f'{folder / file}: {message}')}"):
        import_hf(folder, tmp_path / "m", progress=False)
    assert not (tmp_path / "m").exists()


MODULES: dict[str, Callable[[list[dict[str, Any]]], object]] = {
    "modules Transformer, Pooling, Normalize, Dense; wanted": lambda modules: modules.append(
        {"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"}
    ),
    "modules Pooling, Normalize; wanted": lambda modules: modules.pop(0),
    "modules Transformer, Normalize, Pooling; wanted": lambda modules: modules.append(modules.pop(1)),
    "modules own_code.Transformer, Pooling, Normalize; wanted": lambda modules: modules[0].update(
        type="own_code.Transformer"
    ),
    "the Transformer lies in '0_Transformer'; wanted it beside": lambda modules: modules[0].update(
        path="0_Transformer"
    ),
    "not a list of modules, each with its type and path": lambda modules: modules[0].pop("type"),
}


@pytest.mark.parametrize("message", MODULES)
def test_modules_that_would_change_the_vectors(message: str, folder: Path) -> None:
    edit_json(folder / "modules.json", MODULES[message])  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"^{re.escape(f'{folder}/modules.json: {message}')}"):
        read_sentence_settings(folder)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        (BERT, {"unpad_inputs": False}),
        (BERT, {"query_expansion": None, "query_length": None, "processing_kwargs": {}}),
        (BERT, {"model_kwargs": {"attn_implementation": "sdpa", "dtype": "auto"}}),
        (BERT, {"tokenizer_args": {"padding_side": "left", "trust_remote_code": True}}),
        (BERT, {"modality_config": {"text": FORWARD, "image": {"method": "get_image_features"}}}),
        (MODEL, {"similarity_fn_name": None, "truncate_dim": None, "prompts": None}),
        (MODEL, {"prompts": {"query": None}}),
        (POOLING, {"pooling_mode": ["mean"]}),
    ],
    ids=str,
)
def test_settings_that_change_no_vector_are_passed_over(file: str, change: dict[str, Any], folder: Path) -> None:
    wanted = read_sentence_settings(folder)
    edit_json(folder / file, lambda value: value.update(change))
    assert read_sentence_settings(folder) == wanted


LENGTHS: list[tuple[dict[str, Any], dict[str, Any], tuple[int, int, int | None]]] = [
    ({}, {}, (1024, 1024, None)),  # the tokenizer's, which is the config's too
    ({}, {"model_max_length": 9}, (9, 9, None)),
    ({}, {"model_max_length": 1_000_000_000_000_000_019_884_624_838_656}, (1024, 1024, None)),
    ({}, {"model_max_length": None}, (1024, 1024, None)),
    ({"max_seq_length": 30}, {"model_max_length": 9}, (30, 30, None)),
    ({"max_seq_length": 5000}, {}, (5000, 5000, None)),  # beyond the positions, but stated
    ({"max_seq_length": 30, "tokenizer_args": {"model_max_length": 8}}, {}, (8, 8, None)),
    ({"max_seq_length": 30, "query_length": 5}, {}, (5, 30, None)),
    ({"max_seq_length": 30, "query_length": 5, "document_length": 9}, {}, (5, 9, 30)),
    ({"max_seq_length": 4, "query_length": 5, "document_length": 9}, {}, (5, 9, 4)),
]


@pytest.mark.parametrize(("transformer", "tokenizer", "wanted"), LENGTHS, ids=str)
def test_lengths_are_those_of_sentence_transformers(
    transformer: dict[str, Any], tokenizer: dict[str, Any], wanted: tuple[int, int, int | None], tmp_path: Path
) -> None:
    folder = make_ready(tmp_path / "m", transformer=transformer)
    edit_json(folder / "tokenizer_config.json", lambda value: value.update(tokenizer))
    settings = read_sentence_settings(folder)
    assert settings is not None
    assert (settings.query_max_length, settings.passage_max_length, settings.max_length) == wanted
    model = SentenceTransformer(str(folder), device="cpu")
    longest = {
        kind: model.preprocess(["w " * 6000], task=kind)["input_ids"].shape[1] for kind in ("query", "document", None)
    }
    assert longest == {
        "query": settings.query_max_length,
        "document": settings.passage_max_length,
        None: settings.text_max_length,
    }


def test_files_of_older_versions(tmp_path: Path) -> None:
    """Another name, flags for the pooling, none of them set, no model file."""
    folder = make_ready(tmp_path / "m")
    (folder / BERT).unlink()
    (folder / MODEL).unlink()
    (folder / "sentence_roberta_config.json").write_text('{"max_seq_length": 12, "do_lower_case": true}')
    flags = {"word_embedding_dimension": 48, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / POOLING).write_text(json.dumps(flags))
    settings = read_sentence_settings(folder)
    assert settings == SentenceSettings(
        pooling="cls",
        query_prompt="",
        passage_prompt="",
        query_max_length=12,
        passage_max_length=12,
        do_lower_case=True,
    )
    edit_json(folder / POOLING, lambda value: value.pop("pooling_mode_cls_token"))
    settings = read_sentence_settings(folder)
    assert settings is not None
    assert settings.pooling == "avg"  # sentence-transformers' default


EXPORTED: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "one length": ({"query_max_length": 20, "passage_max_length": 20}, {"max_seq_length": 20}),
    "two lengths": (
        {"query_max_length": 8, "passage_max_length": 20},
        {"max_seq_length": 20, "query_length": 8, "document_length": 20},
    ),
    "three lengths": (
        {"query_max_length": 8, "passage_max_length": 20, "max_length": 30},
        {"max_seq_length": 30, "query_length": 8, "document_length": 20},
    ),
}


@pytest.mark.parametrize("name", EXPORTED)
def test_exports_state_query_and_passage_lengths_each(name: str, folder: Path, tmp_path: Path) -> None:
    """One length for all is stated as sentence-transformers 5.3 knows it; 5.3 refuses the two keys of version 6."""
    lengths, wanted = EXPORTED[name]
    write_sentence_files(tmp_path, EncoderConfig.from_hf(folder), SentenceSettings(**lengths))  # type: ignore[arg-type]
    assert json.loads((tmp_path / BERT).read_text()) == {**wanted, "do_lower_case": False}
    settings = read_sentence_settings(tmp_path)
    assert {key: getattr(settings, key) for key in lengths} == lengths


def test_what_no_recipe_states_survives_a_run_config(folder: Path) -> None:
    usual = default_settings(EncoderConfig.from_hf(folder))
    assert beside_the_recipe(usual) == {}
    settings = SentenceSettings(
        query_max_length=9,
        passage_max_length=8,
        max_length=7,
        prompts={"a": "A: "},
        default_prompt_name="a",
        do_lower_case=True,
        similarity="dot",
    )
    kept = json.loads(json.dumps(beside_the_recipe(settings)))
    assert len(kept) == 5
    others = SentenceSettings(query_max_length=9, passage_max_length=8)
    assert with_the_recipes(kept, others, "run_config.yaml") == settings
    for wrong, message in (
        ({"lower": True}, r"sentence.lower: no such setting; known: max_length, prompts,"),
        ({"similarity": "euclidean"}, "sentence.similarity is 'euclidean'; wanted cosine or dot"),
        ({"default_prompt_name": "b"}, "sentence.default_prompt_name is 'b'; wanted one of query, document, a"),
    ):
        with pytest.raises(UserError, match=f"^run_config.yaml: {message}"):
            with_the_recipes({**kept, **wrong}, others, "run_config.yaml")
