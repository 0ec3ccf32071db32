"""Comparison of two models' configs, key by key: all that changes the function, at no cost for any model size."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from megatron_embed.bridge.config import EncoderConfig, stock_text_config
from megatron_embed.bridge.errors import UserError
from megatron_embed.bridge.families import BIDIRECTIONAL, FAMILIES, VLMS, is_vlm
from megatron_embed.conversion.compare.differences import (
    NOT_STATED,
    ComparedSection,
    Difference,
    compare_values,
    flatten,
)
from megatron_embed.conversion.files.casts import dtype_name
from megatron_embed.conversion.files.json_files import read_json
from megatron_embed.conversion.hf.folder import HFFolder
from megatron_embed.conversion.hf.sidecars import without_local_paths
from megatron_embed.conversion.hf.stored_tensors import FLOATS, FP8_SCALES

#: Keys that do not change the function, with the reason; a family may name more. Every other key is compared.
NOT_COMPARED: dict[str, str] = {
    "architectures": "names the class around the same layers: an embedder's is the bare model",
    "auto_map": "remote code, which is never run",
    "transformers_version": "says who wrote the file",
    "_name_or_path": "says where the model was loaded from",
    "dtype": "held to the folder's own tensors, which are compared in the dtype of the other side",
    "torch_dtype": "held to the folder's own tensors, which are compared in the dtype of the other side",
    "quantization_config": "FP8 weights are compared as the bfloat16 values that they stand for",
    "initializer_range": "of random weights; all of these are loaded",
    "use_cache": "of generation",
    "is_causal": "compared by itself: an export says false, its source need not",
    "pooling": "compared with the sentence settings",
    "normalize": "compared with the sentence settings",
    "temperature": "of training",
    "id2label": "of classification",
    "label2id": "of classification",
    "problem_type": "of classification",
    "return_dict": "the form of what is returned",
    "output_hidden_states": "the form of what is returned",
    "output_attentions": "the form of what is returned",
    "chunk_size_feed_forward": "the order of the same products",
    "is_encoder_decoder": "of other architectures",
    "rope_parameters.type": "an old name of rope_type",
    "rope_parameters.apply_yarn_scaling": "vLLM's: compared with what the rope parameters say",
    "llama_4_scaling": "vLLM's: compared with what the rope parameters say",
    "vision_config.rope_parameters.rope_type": "the vision tower has one kind of rope, whatever a file calls it",
}

#: files with the image settings of a VLM
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


# ---- configs


def compare_configs(found: Mapping[str, Any], wanted: Mapping[str, Any], *, where: str) -> ComparedSection:
    """Compare two ``config.json``: the language towers and, where both are VLMs, everything else.

    Raises:
        UserError: one of them describes no known model, or is no valid config.
    """
    try:
        section = _compare_shared(_text_values(found), _text_values(wanted), where=where)
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('config: ')}") from None
    section += compare_values("config", *_vllm_keys(found), where=where)
    if is_vlm(found) and is_vlm(wanted):
        section += _compare_shared(_vlm_values(found), _vlm_values(wanted), where=where)
    return section


def compare_encoders(found: EncoderConfig, wanted: Mapping[str, Any], *, where: str) -> ComparedSection:
    """Compare a checkpoint's encoder with the contents of the source's ``config.json``."""
    return _compare_shared(_kept(found.to_hf().to_dict()), _text_values(wanted), where=where)


def _compare_shared(found: dict[str, Any], wanted: dict[str, Any], *, where: str) -> ComparedSection:
    """Compare as :func:`compare_values`, without keys that only one side has and that transformers does not know.

    transformers' classes fill in each of their own keys. Other keys are not part of the function, and conversions need
    not keep them. Rope parameters are the exception: all of them are compared.
    """
    both = found.keys() & wanted.keys() | {key for key in (*found, *wanted) if "rope_parameters." in key}
    left, right = ({key: value for key, value in side.items() if key in both} for side in (found, wanted))
    return compare_values("config", left, right, where=where)


def _text_values(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the language tower's config as its stock class reads it, with old spellings and defaults resolved."""
    values = _kept(stock_text_config(raw).to_dict())
    if isinstance(eos := values.get("eos_token_id"), list):  # generation stops at any; the encoder appends the first
        values["eos_token_id"] = eos[0]
    return values


def _vlm_values(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything but the language tower's keys: vision tower, projector, image token.

    The values are those that transformers' class reads, overlaid with those in the file, because other programs read
    keys that the class derives.
    """
    import transformers

    config_class: Any = transformers.CONFIG_MAPPING[raw["model_type"]]
    try:
        filled = config_class.from_dict(copy.deepcopy(dict(raw))).to_dict()
    except Exception as error:  # transformers' validators raise a dozen kinds
        reason = " ".join(str(error).split())
        raise UserError(f"config.json: not a valid {config_class.__name__} ({reason})") from None
    values = _kept(flatten(filled) | flatten(raw))
    beside = (key for key in values if not key.startswith("text_config.") and key != "tie_word_embeddings")
    return {key: values[key] for key in beside}


def _vllm_keys(raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return an embedder's keys for vLLM, and the values that its rope parameters imply; empty without such keys."""
    rope = raw.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return {}, {}
    found: dict[str, Any] = {}
    wanted: dict[str, Any] = {}
    if "apply_yarn_scaling" in rope:
        found["rope_parameters.apply_yarn_scaling"] = rope["apply_yarn_scaling"]
        wanted["rope_parameters.apply_yarn_scaling"] = False
    if "llama_4_scaling" in raw:
        found["llama_4_scaling"] = raw["llama_4_scaling"]
        wanted["llama_4_scaling"] = {
            "beta": rope.get("llama_4_scaling_beta"),
            "original_max_position_embeddings": rope.get("original_max_position_embeddings"),
        }
    return found, wanted


def _kept(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values flat, without the keys that are not compared, at any depth."""
    family = FAMILIES.get(str(values.get("model_type")))
    names = (*NOT_COMPARED, *(family.not_compared if family else ()))
    flat = flatten(values).items()
    return {key: value for key, value in flat if not any(f".{name}." in f".{key}." for name in names)}


# ---- dtype


def compare_stated_dtype(found: HFFolder) -> ComparedSection:
    """Compare the dtypes that a folder's ``config.json`` states with that of its tensors.

    transformers casts the tensors to the stated dtype at loading. Where a VLM's other tensors are wider than its
    language tower's, either dtype may be stated.
    """
    names = [name for name in found.names() if not name.endswith(FP8_SCALES)]
    tower = _widest(found, [name for name in names if name.startswith(found.prefix)])
    allowed = (tower, _widest(found, names))
    text = found.config.get("text_config") if is_vlm(found.config) else None
    stated = {
        f"{place}{key}": dtype_name(values[key])
        for place, values in (("", found.config), ("text_config.", text if isinstance(text, Mapping) else {}))
        for key in ("dtype", "torch_dtype")
        if values.get(key) not in (None, "auto")
    }
    differences = [
        Difference(f"config.json: {key}", value, f"{tower}, in which the tensors are stored")
        for key, value in stated.items()
        if value not in allowed
    ]
    return ComparedSection("dtype", len(stated), differences)


def _widest(folder: HFFolder, names: list[str]) -> str:
    dtypes = {folder.tensor_dtype(name) for name in names}
    return dtype_name(reduce(torch.promote_types, dtypes & {*FLOATS} or dtypes))


# ---- attention


def stated_causality(raw: Mapping[str, Any]) -> bool | None:
    """Return a ``config.json``'s ``is_causal``, or None without one, in which case transformers computes causally."""
    if raw.get("model_type") in BIDIRECTIONAL:
        return False  # AutoModel's class is bidirectional whatever the file says
    text = raw.get("text_config") if raw.get("model_type") in VLMS else raw
    value = text.get("is_causal") if isinstance(text, Mapping) else None
    return None if value is None else bool(value)


def compare_attention(found: bool | None, *, causal: bool, where: str) -> ComparedSection:
    """Compare the ``is_causal`` of a conversion's output with the wanted value.

    Args:
        found: the output's value.
        causal: whether the output must be causal, which holds for a ready embedder that declares it. A base model is
            causal too but becomes bidirectional; this is the one expected difference.
        where: the file and key that would hold the value.
    """
    if (found is not False) == causal:
        return ComparedSection("attention", 1)
    own = "True, as the source embeds (--bidirectional if it was taken as a base model)"
    wanted = own if causal else "False"
    return ComparedSection("attention", 1, [Difference(where, NOT_STATED if found is None else str(found), wanted)])


# ---- processor


def compare_processors(found: Path, wanted: Path) -> list[ComparedSection]:
    """Compare two VLM folders' image preparation, key by key; return an empty list where neither states any."""
    section = ComparedSection("processor", 0)
    for name in PROCESSOR_FILES:
        if (wanted / name).is_file() and not (found / name).is_file():
            section += ComparedSection("processor", 1, [Difference(name, "no such file", "the source's")])
        elif (found / name).is_file():
            left, right = (
                flatten(without_local_paths(read_json(path / name, optional=True))) for path in (found, wanted)
            )
            section += compare_values("processor", left, right, where=name)
    return [section] if section.compared else []
