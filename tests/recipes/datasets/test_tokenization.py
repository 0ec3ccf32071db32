"""Training reads a text as the exported embedder does, truncated texts and control-token text included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.tiny_models import make_tiny_tokenizer

from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.hf.tokenizer_files import write_tokenizer
from megatron_embed.recipes.datasets.tokenization import TextTokenizer

BOS, EOS, PAD = 1, 2, 11
TEXTS = [
    "a list of numbers",
    "",
    " ",
    "  two  spaces, a line\nbreak and a tab\t ",
    "</s> [INST] <s> <pad>",
    "Größe “quoted” 数字 🙂",
    "return the list, " * 40,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def load(folder: Path, *, query: str = "query: ", passage: str = "passage: ", length: int = 24) -> TextTokenizer:
    return TextTokenizer.from_folder(
        folder, query_prompt=query, passage_prompt=passage, query_max_length=length, passage_max_length=2 * length
    )


def exported(folder: Path, out: Path, length: int):
    """What loads the tokenizer of an exported embedder: sentence-transformers goes through AutoTokenizer."""
    from transformers import AutoTokenizer

    out.mkdir()
    write_tokenizer(folder, out, max_length=length)
    (out / "config.json").write_text(json.dumps({"model_type": "ministral3"}))
    return AutoTokenizer.from_pretrained(str(out), local_files_only=True)


@pytest.mark.parametrize("prompt", ["", "query: ", " q:  ", "Instruct: find </s>\nQuery:"])
def test_ids_equal_the_exported_tokenizers(prompt: str, folder: Path, tmp_path: Path) -> None:
    ours = load(folder, query=prompt).tokenize(TEXTS, "query")
    theirs = exported(folder, tmp_path / "out", 24)([prompt + text for text in TEXTS], truncation=True)["input_ids"]
    assert ours == theirs


@pytest.mark.parametrize("post_processor", ["BOS and EOS", "BOS only", "none"])
def test_bos_and_eos_stand_around_every_text_whatever_the_source_does(
    post_processor: str, folder: Path, tmp_path: Path
) -> None:
    source = make_tiny_tokenizer(tmp_path / "source")
    contents = json.loads((source / "tokenizer.json").read_text())
    if post_processor == "BOS only":
        contents["post_processor"]["single"] = contents["post_processor"]["single"][:2]
    elif post_processor == "none":
        contents["post_processor"] = None
    (source / "tokenizer.json").write_text(json.dumps(contents))
    tokenizer = load(source)
    for ids in tokenizer.tokenize(TEXTS, "query"):
        assert (ids[0], ids[-1]) == (BOS, EOS)
        assert not {BOS, EOS, PAD} & set(ids[1:-1])
    assert tokenizer.tokenize(TEXTS, "query") == load(folder).tokenize(TEXTS, "query")


def test_a_ready_embedder_is_read_as_it_is(tmp_path: Path) -> None:
    source = make_tiny_tokenizer(tmp_path / "source")
    contents = json.loads((source / "tokenizer.json").read_text())
    contents["post_processor"] = None
    (source / "tokenizer.json").write_text(json.dumps(contents))
    (source / "modules.json").write_text("[]")
    ids = load(source).tokenize(["a list"], "query")[0]
    assert BOS not in ids
    assert EOS not in ids


def test_truncation_keeps_bos_and_eos_and_each_kind_has_its_length(folder: Path) -> None:
    tokenizer = load(folder)
    query, passage = tokenizer.tokenize(TEXTS[-1:], "query")[0], tokenizer.tokenize(TEXTS[-1:], "passage")[0]
    assert (len(query), len(passage)) == (24, 48)
    assert (query[0], query[-1], passage[0], passage[-1]) == (BOS, EOS, BOS, EOS)
    whole = load(folder, length=10_000).tokenize(TEXTS[-1:], "query")[0]
    assert query[:-1] == whole[:23]


def test_prompts_are_put_before_the_text_exactly_as_written(folder: Path) -> None:
    tokenizer = load(folder, query=" Q:", passage="P\n")
    assert tokenizer.text("x ", "query") == " Q:x "
    assert tokenizer.text("x ", "passage") == "P\nx "
    plain = load(folder, query="", passage="")
    assert tokenizer.tokenize(["list"], "query") == plain.tokenize([" Q:list"], "query")
    own = tokenizer.tokenize(["list", "list"], "passage", ["", "A: "])
    assert own == plain.tokenize(["list", "A: list"], "passage")


def test_control_token_text_stays_text(folder: Path) -> None:
    tokenizer = load(folder, query="")
    ids = tokenizer.tokenize(["</s>[INST]"], "query")[0]
    assert len(ids) > 4
    assert tokenizer.tokenizer.decode(ids[1:-1]) == "</s>[INST]"


def test_no_texts_and_padding_id(folder: Path) -> None:
    tokenizer = load(folder)
    assert tokenizer.tokenize([], "query") == []
    assert tokenizer.pad_token_id == PAD


def test_missing_and_damaged_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer.json; wanted a model folder with a fast tokenizer"):
        load(tmp_path)
    make_tiny_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(UserError, match=r"tokenizer.json: "):
        load(tmp_path)
