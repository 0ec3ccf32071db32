"""Comparison of two folders' tokenizers: ids of fixed texts, vocabulary and merges, special tokens."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.compare.differences import (
    NOT_STATED,
    ComparedSection,
    Difference,
    compare_values,
    flatten,
)
from megatron_embed.conversion.files.json_files import read_json
from megatron_embed.conversion.hf.tokenizer_files import write_tokenizer

#: texts in many scripts, with many kinds of white space, one that looks like a control token, and one that is cut
PROBES: tuple[str, ...] = (
    "",
    "query: how do plants turn light into sugar?",
    "The railway between the two towns was opened in 1869, and closed 97 years later.",
    "Überraschung: ein schöner Tag in Zürich, naïve façade, smørrebrød, żółć, ČŠŽ, İstanbul ıssız",
    "Παράδειγμα на русском и українською, ქართული, Հայերեն",
    "こんにちは世界。漢字かな交じり文 中文文本，繁體與简体 한국어 문장",
    "مرحبا بالعالم עברית दुनिया ไทย தமிழ் বাংলা አማርኛ",
    "🙂👩‍👩‍👧‍👦🇺🇦 e\u0301 é ﬁ ½ ①",
    "  two  spaces\tand a tab\nline\r\nline\n\n\n  end  ",
    "no\u00a0break zero\u200bwidth soft\u00adhyphen \ufeffmark \u3000wide",
    "def f(x):\n    return {'a': x**2, \"b\": [1, 2.5e-3]}  # 0xFF\n",
    "<s> [INST] text [/INST] </s> <pad> [IMG] <unk> <|begin_of_text|> <|end_of_text|>",
    "don't can't won't I'd you're 12345678901234567890 3.14159 1,000,000 http://example.org/a?b=c&d=%20",
)
_CUT = 9
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "padding_side", "truncation_side")


def compare_tokenizers(found: Path, wanted: Path) -> ComparedSection:
    """Compare the tokenizer of a conversion's output with that of its source.

    An embedder's folder must hold the result of :func:`write_tokenizer` on the source's tokenizer: BOS and EOS around
    every text, control tokens inside a text left as text. Where neither is an embedder, both are compared as stored.

    Raises:
        UserError: a tokenizer cannot be read.
    """
    if not (found / "tokenizer.json").is_file():
        return ComparedSection("tokenizer", 1, [Difference("tokenizer.json", "no such file", "the source's")])
    as_made = {path: (path / "modules.json").is_file() for path in (found, wanted)}
    edited = as_made[found] or as_made[wanted]
    left, right = load_tokenizer(found, edited=edited and not as_made[found]), load_tokenizer(wanted, edited=edited)
    section = _vocabularies(found, wanted)
    if not section.differences:  # tokenizer.json is the same; other files add tokens too
        section += _beside_tokenizer_json(left, right)
    probes = [(text, cut) for cut in (None, _CUT) for text in PROBES]
    ids = [(_ids(left, *probe), _ids(right, *probe)) for probe in probes]
    changed = [number for number, (a, b) in enumerate(ids) if a != b]
    many = f"{len(changed)} of {len(probes)}"
    differing = [_differing_ids(probes[number], *ids[number], many=many) for number in changed[:1]]
    section += ComparedSection("tokenizer", len(probes), differing)
    names = _SPECIAL if edited else (*_SPECIAL, "model_max_length")  # for an embedder it is a sentence setting
    values = ({name: getattr(side, name) for name in names} | _mask(side) for side in (left, right))
    section += compare_values("tokenizer", *values, where="tokenizer_config.json")
    # one difference stands for the ids of all texts
    return replace(section, unequal=len(section.differences) + max(len(changed) - 1, 0))


def _mask(tokenizer: Any) -> dict[str, str]:
    """Return whether texts get an attention mask; without one, padding is attended to."""
    masked = "attention_mask" in tokenizer.model_input_names
    return {"model_input_names": "with attention_mask" if masked else "without attention_mask"}


def reads_control_tokens(folder: Path) -> bool:
    """Return whether a ready embedder's own tokenizer reads ``[INST]`` inside a text as the control token."""
    settings = read_json(folder / "tokenizer_config.json", optional=True)
    return (folder / "modules.json").is_file() and settings.get("split_special_tokens") is not True


def load_tokenizer(folder: Path, *, edited: bool) -> Any:
    """Load a folder's fast tokenizer, unchanged or with the edits that conversion makes for an embedder.

    Raises:
        UserError: the tokenizer cannot be read.
    """
    # AutoTokenizer's result beside a tekken.json depends on whether mistral_common is installed.
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory(prefix="tokenizer-") as other:
        if edited:
            write_tokenizer(folder, Path(other), max_length=1 << 20)
        try:
            return PreTrainedTokenizerFast.from_pretrained(other if edited else str(folder), local_files_only=True)
        except Exception as error:  # tokenizers raises a bare Exception for a malformed file
            raise UserError(f"{folder / 'tokenizer.json'}: cannot be read ({error})") from None


def _ids(tokenizer: Any, text: str, cut: int | None) -> list[int]:
    ids: list[int] = tokenizer(text, truncation=cut is not None, max_length=cut)["input_ids"]
    return ids


def _differing_ids(probe: tuple[str, int | None], found: list[int], wanted: list[int], *, many: str) -> Difference:
    text, cut = probe
    at = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), min(len(found), len(wanted)))
    first = f"{text[:24]!r}" + (f" cut to {cut}" if cut else "") + f" from token {at} on"
    return Difference(f"tokenizer: ids of {many} texts, {first}", _some(found[at:]), _some(wanted[at:]))


def _some(ids: list[int]) -> str:
    return " ".join(map(str, ids[:6])) + (" …" if len(ids) > 6 else "") if ids else "end"


# ---- vocabulary


def _vocabularies(found: Path, wanted: Path) -> ComparedSection:
    left, right = (read_json(path / "tokenizer.json") for path in (found, wanted))
    section = compare_values("tokenizer", _pipeline(left), _pipeline(right), where="tokenizer.json")
    parts: dict[str, Callable[[Mapping[str, Any]], Mapping[int, Any]]] = {"vocabulary": _vocabulary, "merges": _merges}
    for name, of in parts.items():
        a, b = of(left), of(right)
        keys = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
        section += ComparedSection("tokenizer", 1)
        if keys:
            here, there = (f"{_hash(side)}: {', '.join(f'{k} {side.get(k)!r}' for k in keys[:2])}" for side in (a, b))
            section.differences.append(Difference(f"tokenizer.json: {name}, {len(keys)} places", here, there))
    return section


def _beside_tokenizer_json(found: Any, wanted: Any) -> ComparedSection:
    """Compare all tokens of two loaded tokenizers: id, text and, of an added token, how it is matched."""
    left, right = (
        {number: token for token, number in side.get_vocab().items()}
        | {number: repr(token) for number, token in side.added_tokens_decoder.items()}
        for side in (found, wanted)
    )
    keys = [key for key in sorted(left.keys() | right.keys()) if left.get(key) != right.get(key)]
    here, there = (", ".join(f"{key} {side.get(key, NOT_STATED)}" for key in keys[:2]) for side in (left, right))
    name = f"added_tokens.json, tokenizer_config.json: tokens beside tokenizer.json, {len(keys)} places"
    return ComparedSection("tokenizer", 1, [Difference(name, here, there)] if keys else [])


def _vocabulary(tokenizer: Mapping[str, Any]) -> dict[int, str]:
    """Return id → token of a ``tokenizer.json``, with the added tokens."""
    held = tokenizer.get("model", {}).get("vocab", {})
    pairs = held.items() if isinstance(held, Mapping) else ((entry[0], i) for i, entry in enumerate(held))
    found = {int(number): str(token) for token, number in pairs}
    return found | {token["id"]: token["content"] for token in tokenizer.get("added_tokens", [])}


def _merges(tokenizer: Mapping[str, Any]) -> dict[int, tuple[str, ...]]:
    merges = tokenizer.get("model", {}).get("merges") or []
    return {i: tuple(merge.split(" ") if isinstance(merge, str) else merge) for i, merge in enumerate(merges)}


def _pipeline(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the other parts that decide on ids; the ids of :data:`PROBES` show the effect of the post-processor."""
    model = {key: value for key, value in tokenizer.get("model", {}).items() if key not in ("vocab", "merges")}
    added = {str(token["id"]): {**token} for token in tokenizer.get("added_tokens", [])}
    parts = {"normalizer": tokenizer.get("normalizer"), "pre_tokenizer": tokenizer.get("pre_tokenizer")}
    return flatten({"model": model, "added_tokens": added, **parts})


def _hash(values: Mapping[int, Any]) -> str:
    return hashlib.sha256(json.dumps(sorted(values.items())).encode()).hexdigest()[:12]
