"""The tokenizer of an exported embedder: the source's, changed to always add BOS and EOS and to have no chat form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_embed.bridge.errors import UserError
from megatron_embed.conversion.files.json_files import read_json, write_json
from megatron_embed.conversion.hf.sidecars import without_local_paths

#: the files of a fast tokenizer. tekken.json is left out on purpose: with it, AutoTokenizer's result depends on
#: whether mistral_common is installed
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a fast tokenizer."""
    return (folder / "tokenizer.json").is_file()


def write_tokenizer(source: Path, out: Path, *, max_length: int) -> None:
    """Copy a tokenizer with the edits that an embedder needs.

    * ``model_max_length`` is set.
    * Control tokens inside a text (``[INST]``) stay text, as in training.
    * Every text gets ``<s> … </s>``, or ``… </s>`` where there is no BOS. A file that does so already stays unchanged,
      and so does a ready embedder's, which was trained with it.
    * The chat template is removed: with it sentence-transformers 6 would read every text as a chat message.
    * Keys that name a processor, remote code or a path of this machine are removed.
    * ``model_input_names`` without the attention mask is removed: the default has it, and padding needs it.
    * A tokenizer without a padding token, such as Llama's, gets one: batches need it.
    * The class is the one that reads only ``tokenizer.json``; training uses it too.

    Raises:
        UserError: there is no ``tokenizer.json``.
    """
    if not has_tokenizer(source):
        found = ", ".join(sorted(p.name for p in source.glob("*tok*"))) or "nothing of the kind"
        raise UserError(
            f"{source}: no tokenizer.json (found {found}), without which no one can use the embedder; "
            f"give --hf-model a folder that has one"
        )
    for name in FILES:
        if (source / name).is_file():
            (out / name).write_bytes((source / name).read_bytes())
    settings = without_local_paths(read_json(source / "tokenizer_config.json", optional=True))
    for key in ("chat_template", "processor_class", "auto_map"):
        settings.pop(key, None)
    if "attention_mask" not in (settings.get("model_input_names") or ()):
        settings.pop("model_input_names", None)
    settings["model_max_length"] = max_length
    settings["split_special_tokens"] = True
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer = read_json(source / "tokenizer.json")
    ready = (source / "modules.json").is_file()
    for key in ("add_bos_token", "add_eos_token"):
        if key in settings and not ready:  # these keys make transformers rebuild the post-processor
            settings[key] = key == "add_eos_token" or _has_bos(settings, _ids(tokenizer))
    if (pad := _missing_pad_token(source, settings, tokenizer)) is not None:
        settings["pad_token"] = pad
    write_json(out / "tokenizer_config.json", settings)
    if not ready and add_bos_eos(tokenizer, settings):
        (out / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def add_bos_eos(tokenizer: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Change the contents of a ``tokenizer.json`` to put BOS before and EOS after every text.

    A tokenizer that names no BOS and has no ``<s>``, such as Qwen's, gets EOS alone.

    Args:
        tokenizer: changed in place.
        settings: contents of ``tokenizer_config.json``, which name the two tokens.

    Returns:
        Whether the contents were changed.
    """
    bos, eos = (_token(settings.get(key), default) for key, default in (("bos_token", "<s>"), ("eos_token", "</s>")))
    ids = _ids(tokenizer)
    front = [bos] if _has_bos(settings, ids) else []
    for token in (*front, eos):
        if token not in ids:
            raise UserError(
                f"tokenizer.json: has no token {token!r}, the default or the one that tokenizer_config.json names; "
                f"wanted both files of one tokenizer"
            )
    post = tokenizer.get("post_processor")
    steps = post["processors"] if post and post.get("type") == "Sequence" else [post] if post else []
    if any(_adds(step, [*front, "A", eos]) for step in steps):
        return False
    before = [_special(token) for token in front]
    template = {
        "type": "TemplateProcessing",
        "single": [*before, _sequence("A"), _special(eos)],
        "pair": [*before, _sequence("A"), _special(eos), _sequence("B"), _special(eos)],
        "special_tokens": {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in (*front, eos)},
    }
    others = [step for step in steps if step["type"] == "ByteLevel"]  # it only trims offsets
    tokenizer["post_processor"] = {"type": "Sequence", "processors": [*others, template]} if others else template
    return True


def _missing_pad_token(source: Path, settings: dict[str, Any], tokenizer: dict[str, Any]) -> str | None:
    """Return a padding token for a tokenizer without one; padding is masked, so any token serves, EOS included."""
    if settings.get("pad_token") or read_json(source / "special_tokens_map.json", optional=True).get("pad_token"):
        return None
    known = ("<|finetune_right_pad_id|>", "<pad>", "[PAD]")
    ids = _ids(tokenizer)
    return next((token for token in known if token in ids), _token(settings.get("eos_token"), "</s>"))


def _has_bos(settings: dict[str, Any], ids: dict[str, int]) -> bool:
    return bool(settings.get("bos_token")) or "<s>" in ids


def _adds(step: dict[str, Any], wanted: list[str]) -> bool:
    if step.get("type") != "TemplateProcessing":
        return False
    return [next(iter(part.values()))["id"] for part in step["single"]] == wanted


def _ids(tokenizer: dict[str, Any]) -> dict[str, int]:
    model = tokenizer.get("model", {}).get("vocab", {})
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    return {**(model if isinstance(model, dict) else {}), **added}


def _token(value: Any, default: str) -> str:
    """Return a token's name, given plainly or as an object with a ``content``."""
    return str(value.get("content", default)) if isinstance(value, dict) else str(value or default)


def _special(token: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": token, "type_id": 0}}


def _sequence(name: str) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": 0}}
