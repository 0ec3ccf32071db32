"""The keys of sentence-transformers' files: keys that are honoured, keys that change no vector, and refused keys.

An unknown key, such as one that a later sentence-transformers adds, may change the vectors, so it is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NoReturn

from megatron_embed.bridge.errors import UserError

#: the path of a text through the model; any other path would give other vectors
TEXT_MODALITY = {"method": "forward", "method_output_name": "last_hidden_state"}

#: keys of ``sentence_bert_config.json`` that are honoured, or that change no vector
_TRANSFORMER_HONOURED = ("max_seq_length", "do_lower_case", "query_length", "document_length", "unpad_inputs")
#: keys of that file that are accepted with one meaning only
_TRANSFORMER_ONLY: Mapping[str, tuple[Any, ...]] = {
    "transformer_task": ("feature-extraction",),
    "module_output_name": ("token_embeddings",),
    "query_expansion": (None,),
    "processing_kwargs": (None, {}),
    "tokenizer_name_or_path": (None,),
    "config_kwargs": (None, {}),
    "config_args": (None, {}),
}
#: keyword arguments of ``from_pretrained``, under new and old names, that the file may hold: key → values, or any
_ANY = object()
_MODEL_KWARGS: Mapping[str, Any] = {
    "attn_implementation": _ANY,
    "trust_remote_code": _ANY,  # sentence-transformers reads it from no file
    "dtype": ("auto",),
    "torch_dtype": ("auto",),
}
_PROCESSOR_KWARGS: Mapping[str, Any] = {"padding_side": _ANY, "trust_remote_code": _ANY, "model_max_length": _ANY}
_KWARGS = {
    "model_kwargs": _MODEL_KWARGS,
    "model_args": _MODEL_KWARGS,
    "processor_kwargs": _PROCESSOR_KWARGS,
    "tokenizer_args": _PROCESSOR_KWARGS,
}

_MODEL = ("__version__", "model_type", "prompts", "default_prompt_name", "similarity_fn_name", "truncate_dim")
_POOLING = ("word_embedding_dimension", "embedding_dimension", "pooling_mode", "include_prompt")


def refuse(path: Path, key: str, found: Any, wanted: str) -> NoReturn:
    """Raise a :class:`UserError` that names the file, the key, the value found there and the value wanted."""
    raise UserError(f"{path}: {key} is {json.dumps(found, ensure_ascii=False)}; wanted {wanted}")


def check_tokenizer(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a ``tokenizer_config.json`` by which texts get no attention mask: padding would be part of the vectors.

    Raises:
        UserError: ``model_input_names`` are stated without ``attention_mask``.
    """
    names = config.get("model_input_names")
    if names is not None and not (isinstance(names, list) and "attention_mask" in names):
        refuse(path, "model_input_names", names, 'a list with "attention_mask": padding is never attended to here')


def check_transformer(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse keys of a ``sentence_bert_config.json`` beyond the settings that are honoured.

    Raises:
        UserError: the message names the key.
    """
    for key, value in config.items():
        if key in _KWARGS:
            _check_kwargs(path, key, value, _KWARGS[key])
        elif key == "modality_config":
            _check_modalities(path, value)
        elif key in _TRANSFORMER_ONLY:
            _check_only(path, key, value, _TRANSFORMER_ONLY[key])
        elif key not in _TRANSFORMER_HONOURED:
            _refuse_unknown(path, key, value, [*_TRANSFORMER_HONOURED, *_TRANSFORMER_ONLY, "modality_config", *_KWARGS])
    if not isinstance(config.get("do_lower_case", False), bool):
        refuse(path, "do_lower_case", config["do_lower_case"], "true or false")
    for key in ("max_seq_length", "query_length", "document_length"):
        check_length(path, key, config.get(key))


def check_length(path: Path, key: str, value: Any) -> None:
    """Refuse a maximal length that is no whole number of tokens; null means that no length is stated."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        refuse(path, key, value, "a whole number of tokens from 1 up, or null")


def check_pooling(path: Path, config: Mapping[str, Any], flags: Collection[str]) -> None:
    """Refuse unknown keys of a Pooling's ``config.json``, and pooling without the prompt's tokens."""
    for key, value in config.items():
        if key not in (*_POOLING, *flags):
            _refuse_unknown(path, key, value, [*_POOLING, *flags])
    if config.get("include_prompt") is False:
        raise UserError(
            f"{path}: include_prompt is false; the encoder pools over the prompt's tokens as well; wanted true"
        )


def check_normalize(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a Normalize that reads anything but the sentence's vector, or writes elsewhere."""
    known = {"module_input_name": ("sentence_embedding",), "module_output_name": ("sentence_embedding", None)}
    for key, value in config.items():
        if key not in known:
            _refuse_unknown(path, key, value, known)
        _check_only(path, key, value, known[key])


def check_model(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse keys of a ``config_sentence_transformers.json`` beyond the settings that are honoured.

    Raises:
        UserError: the message names the key.
    """
    for key, value in config.items():
        if key not in _MODEL:
            _refuse_unknown(path, key, value, _MODEL)
    _check_only(path, "model_type", config.get("model_type", "SentenceTransformer"), ("SentenceTransformer",))
    if config.get("truncate_dim") is not None:
        refuse(
            path, "truncate_dim", config["truncate_dim"], "null: take it out, and shorten vectors with `encode --dim`"
        )
    if config.get("similarity_fn_name") not in (None, "cosine", "dot"):
        refuse(path, "similarity_fn_name", config["similarity_fn_name"], "cosine or dot, by which vectors are compared")
    prompts = config.get("prompts") or {}
    if not isinstance(prompts, Mapping):
        refuse(path, "prompts", prompts, "an object of texts by name")
    for name, prompt in prompts.items():
        if not isinstance(prompt, str | None):
            refuse(path, f"prompts.{name}", prompt, "a text")
    default = config.get("default_prompt_name")
    known = {"query", "document", *prompts}
    if default is not None and default not in known:
        refuse(path, "default_prompt_name", default, f"null or one of the prompts, {', '.join(sorted(known))}")


def _check_kwargs(path: Path, key: str, value: Any, known: Mapping[str, Any]) -> None:
    if not isinstance(value, Mapping | None):
        refuse(path, key, value, "an object")
    for name, given in (value or {}).items():
        if name not in known:
            _refuse_unknown(path, f"{key}.{name}", given, list(known))
        if known[name] is not _ANY:
            _check_only(path, f"{key}.{name}", given, known[name])
    check_length(path, f"{key}.model_max_length", (value or {}).get("model_max_length"))


def _check_modalities(path: Path, value: Any) -> None:
    if not isinstance(value, Mapping) or value.get("text") != TEXT_MODALITY:
        found = value.get("text") if isinstance(value, Mapping) else value
        refuse(path, "modality_config.text", found, json.dumps(TEXT_MODALITY))
    if "message" in value:
        refuse(path, "modality_config.message", value["message"], "no such key: texts are read without a chat template")


def _check_only(path: Path, key: str, value: Any, wanted: tuple[Any, ...]) -> None:
    if value not in wanted:
        refuse(path, key, value, " or ".join(json.dumps(one) for one in wanted))


def _refuse_unknown(path: Path, key: str, value: Any, known: Collection[str]) -> NoReturn:
    refuse(path, key, value, f"only keys whose effect is known here: {', '.join(known)}; take it out if it has none")
