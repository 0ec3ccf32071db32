"""Tokenize only the beginning of a text that is far longer than its maximal length, if that changes no id.

A byte-level tokenizer splits a text by a regular expression and gives each piece its ids, regardless of the text around
it. In the expressions below, no alternative matches a space after anything but white space, and none can tell such a
space from the end of the text. A space after a letter or digit, called a border here, therefore begins a piece in every
text, and the text before it is split as if it ended there. So the ids of that beginning are the first ids of the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

#: expressions for which this has been shown
_TEKKEN = (  # Ministral 3
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA = (  # Llama 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# A character that matches \w is not white space to the tokenizer either, in any version of Unicode.
_BORDER = re.compile(r"(?<=\w) ")
_CHARACTERS = 16  # characters to read for each token of the length; prose has 4 to 6 characters in a token
_GROWTH = 8


def tokenize_starts(
    tokenize: Callable[[list[str]], list[list[int]]], texts: Sequence[str], length: int
) -> list[list[int]]:
    """Return the ids that ``tokenize`` gives for the texts, from a beginning of each text that fills ``length``.

    Args:
        tokenize: texts → ids, truncated to ``length``, of a tokenizer that :func:`knows_borders` accepts.
        length: most tokens of a text.
    """
    found: list[list[int]] = [[]] * len(texts)
    left, size = list(range(len(texts))), _CHARACTERS * length
    while left:
        starts = [_start(texts[i], size) for i in left]
        for i, ids in zip(left, tokenize(starts), strict=True):
            found[i] = ids
        # Ids that fill the length are those of the whole text. Fewer ids may mean that the beginning was too short.
        left = [
            i for i, start in zip(left, starts, strict=True) if len(start) < len(texts[i]) and len(found[i]) < length
        ]
        size *= _GROWTH
    return found


def _start(text: str, size: int) -> str:
    """Return the text up to the first border at or after ``size`` characters."""
    if len(text) <= size or (border := _BORDER.search(text, size)) is None:
        return text
    return text[: border.start()]


def knows_borders(tokenizer: Any) -> bool:
    """Return whether a tokenizer is known to treat the text before a border independently of the text after it.

    This is not so with a normalizer, with tokens that are found before the text is split, or if the end is kept.
    """
    backend = tokenizer.backend_tokenizer
    return (
        backend.normalizer is None
        and all(token.special for token in tokenizer.added_tokens_decoder.values())
        and tokenizer.split_special_tokens
        and tokenizer.truncation_side == "right"
        and getattr(backend.model, "dropout", None) is None
        and backend.pre_tokenizer is not None
        and _splits_at_borders(json.loads(backend.pre_tokenizer.__getstate__()))
    )


def _splits_at_borders(pre_tokenizer: dict[str, Any]) -> bool:
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:  # GPT-2's expression
            return True
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return regex in (_TEKKEN, _LLAMA)
    return False
