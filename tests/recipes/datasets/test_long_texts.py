"""A long text's ids from its beginning alone are those of the whole text, whatever stands in it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.tiny_models import make_tiny_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_embed.recipes.datasets import long_texts
from megatron_embed.recipes.datasets.long_texts import knows_borders, tokenize_starts
from megatron_embed.recipes.datasets.tokenization import TextTokenizer


def split_by(regex: str) -> Any:
    steps = [
        pre_tokenizers.Split(Regex(regex), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    return pre_tokenizers.Sequence(steps)


KNOWN = {
    "GPT-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "Tekken": split_by(long_texts._TEKKEN),
    "Llama 3": split_by(long_texts._LLAMA),
}
#: what the expressions tell apart, and what joins, changes in normal form, or is white space to some
PARTS = [*" \t\n\r/.,'!-_aAé名字1२٣ǅʰ\u0301\u180e\u00a0\u2028\u0085\x1c\x1f\0🙂"]
PARTS += [" ", "word", "return the list", "'s", "'LL", "\r\n", "</s>", "[INST]", "e\u0301"]
TEXTS = st.lists(st.sampled_from(PARTS), max_size=60).map("".join) | st.text(max_size=60)


def tokenizer(folder: Path, pre_tokenizer: Any = None, normalizer: Any = None) -> PreTrainedTokenizerFast:
    make_tiny_tokenizer(folder)
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", split_special_tokens=True
    )


def ids_of(tokenizer: Any, texts: list[str], length: int | None) -> list[list[int]]:
    return tokenizer(texts, truncation=length is not None, max_length=length)["input_ids"]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {name: tokenizer(tmp_path_factory.mktemp("t"), step) for name, step in KNOWN.items()}


@pytest.mark.parametrize("name", KNOWN)
@settings(max_examples=400, deadline=None)
@given(text=TEXTS)
@example(text="a   \n   \n  b c")
@example(text="word ' s it'll  \u0301x 12 345 6!\n\n/ a")
@example(text="a_\n b")
def test_what_stands_before_a_border_is_split_as_if_the_text_ended_there(name: str, text: str) -> None:
    """Every border of the text, not only those that a length leads to; pieces, for not every cut shows in ids."""
    whole = KNOWN[name].pre_tokenize_str(text)
    for border in long_texts._BORDER.finditer(text):
        start = KNOWN[name].pre_tokenize_str(text[: border.start()])
        assert whole[: len(start)] == start


@pytest.mark.parametrize("name", KNOWN)
@settings(max_examples=200, deadline=None)
@given(texts=st.lists(TEXTS, max_size=4), length=st.integers(3, 20), repeated=st.integers(1, 30))
@example(texts=["a" * 500, " " * 500, "名" * 500 + " a", " b" * 500, "\n " * 500], length=4, repeated=1)
def test_ids_equal_those_of_whole_texts(
    name: str, texts: list[str], length: int, repeated: int, known: dict[str, Any]
) -> None:
    texts = [text * repeated for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_texts, "_CHARACTERS", 1)  # so that short starts are too short, too
        patch.setattr(long_texts, "_GROWTH", 2)
        found = tokenize_starts(lambda starts: ids_of(known[name], starts, length), texts, length)
    assert found == (ids_of(known[name], texts, length) if texts else [])


def make_changes(folder: Path) -> dict[str, Any]:
    """Tokenizers for which nothing has been shown."""
    made = (folder / str(number) for number in itertools.count())
    added = tokenizer(next(made))
    added.add_tokens([AddedToken("two words", normalized=False)])
    left = tokenizer(next(made))
    left.truncation_side = "left"
    control = tokenizer(next(made))
    control.split_special_tokens = False
    return {
        "a normal form": tokenizer(next(made), normalizer=normalizers.NFC()),
        "a prefix": tokenizer(next(made), normalizer=normalizers.Prepend("▁")),
        "another expression": tokenizer(next(made), split_by(r"\w+ \w+|.")),
        "words by ▁": tokenizer(next(made), pre_tokenizers.Metaspace()),
        "a space before all": tokenizer(next(made), pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "no splitting": tokenizer(next(made), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        "an added token": added,
        "the end is kept": left,
        "control tokens": control,
    }


def test_what_has_not_been_shown_is_not_relied_on(tmp_path: Path, known: dict[str, Any]) -> None:
    assert all(map(knows_borders, known.values()))
    changes = make_changes(tmp_path)
    assert [name for name, changed in changes.items() if knows_borders(changed)] == []


@pytest.mark.parametrize("change", ["none", "a normal form", "another expression", "an added token"])
@settings(max_examples=50, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=3), repeated=st.integers(1, 200))
@example(texts=["two words " * 10, "x" * 9 + " a" * 20], repeated=2)
def test_encode_gives_the_ids_of_whole_texts(
    change: str, texts: list[str], repeated: int, tokenizers: dict[str, TextTokenizer]
) -> None:
    texts = [text * repeated for text in texts]
    ours = tokenizers[change]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(long_texts, "_CHARACTERS", 1)
        assert ours.tokenize(texts, "passage") == ids_of(ours.tokenizer, [f"p: {text}" for text in texts], 12)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextTokenizer]:
    made = {"none": tokenizer(tmp_path_factory.mktemp("t")), **make_changes(tmp_path_factory.mktemp("changed"))}
    return {
        name: TextTokenizer(one, query_prompt="", passage_prompt="p: ", query_max_length=8, passage_max_length=12)
        for name, one in made.items()
        if name not in ("the end is kept", "control tokens")
    }


@pytest.mark.parametrize(("change", "most"), [("none", 20_000), ("an added token", None)])
def test_little_of_a_long_text_is_looked_at_where_that_will_do(
    change: str, most: int | None, tokenizers: dict[str, TextTokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    ours = tokenizers[change]
    call = type(ours.tokenizer).__call__

    def counted(self: Any, texts: list[str], **options: Any) -> Any:
        seen.extend(map(len, texts))
        return call(self, texts, **options)

    monkeypatch.setattr(type(ours.tokenizer), "__call__", counted)
    texts = ["word " * 20_000, " " * 4000 + "word " * 20_000, "short"]
    found = ours.tokenize(texts, "passage")
    assert [len(ids) for ids in found[:2]] == [12, 12]
    if most is None:
        assert sum(seen) == sum(map(len, texts)) + 3 * len("p: ")
    else:
        assert sum(seen) < most
