"""Tiny random checkpoints of the families beside Ministral 3, of the real classes, with tokenizers like their own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from support import tiny_models

ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_COMMON: dict[str, Any] = {
    "vocab_size": 997,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}


def tiny_llama_config(**overrides: Any) -> LlamaConfig:
    """A Llama 3 config in small; ``head_dim`` is not stated, as on the 8B. ``rope_parameters`` replace :data:`ROPE`."""
    values = {"hidden_size": 64, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": [2, 3]}
    return LlamaConfig(**{**_COMMON, **values, "rope_parameters": ROPE, **overrides})


def tiny_qwen3_config(**overrides: Any) -> Qwen3Config:
    """A Qwen3 config in small; heads × head_dim ≠ hidden, as on the 0.6B."""
    values = {"hidden_size": 48, "head_dim": 16, "rms_norm_eps": 1e-6, "bos_token_id": 3, "eos_token_id": 2}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    return Qwen3Config(**{**_COMMON, **values, "rope_parameters": rope, **overrides})


def save_llama(path: str | Path, *, head: bool = True, **kw: Any) -> Path:
    """Save a random ``LlamaForCausalLM``, or ``LlamaModel`` without a head; keywords as of ``tiny_models.save_vlm``."""
    model_class = LlamaForCausalLM if head else LlamaModel
    folder = tiny_models._save(model_class, tiny_llama_config, path, {**kw, "tokenizer": False})
    if kw.get("tokenizer", True):
        make_llama_tokenizer(folder)
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("head_dim")  # transformers fills it in; Llama 3.1's own config.json does not state it
    # and has the rope settings in their older form
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def save_qwen3(path: str | Path, *, head: bool = True, **kw: Any) -> Path:
    """Save a random ``Qwen3ForCausalLM``, or ``Qwen3Model`` without a head; keywords as of ``tiny_models.save_vlm``."""
    model_class = Qwen3ForCausalLM if head else Qwen3Model
    folder = tiny_models._save(model_class, tiny_qwen3_config, path, {**kw, "tokenizer": False})
    if kw.get("tokenizer", True):
        make_qwen3_tokenizer(folder)
    return folder


def make_llama_tokenizer(path: Path) -> None:
    """Named tokens and template of Llama 3: BOS in front, nothing behind, no padding token."""
    bos = {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}
    a, b = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
    template = {
        "type": "TemplateProcessing",
        "single": [bos, a],
        "pair": [bos, a, bos, b],
        "special_tokens": {
            "<|begin_of_text|>": {"id": "<|begin_of_text|>", "ids": [1], "tokens": ["<|begin_of_text|>"]}
        },
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    _make_tokenizer(
        path,
        {"<s>": "<|begin_of_text|>", "</s>": "<|end_of_text|>", "<pad>": "<|finetune_right_pad_id|>"},
        {"type": "Sequence", "processors": [byte_level, template]},
        {
            "bos_token": "<|begin_of_text|>",
            "clean_up_tokenization_spaces": True,
            "eos_token": "<|end_of_text|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )


def make_qwen3_tokenizer(path: Path) -> None:
    """No BOS, nothing put around a text, ``<|endoftext|>`` for padding."""
    _make_tokenizer(
        path,
        {"<s>": "<|im_start|>", "</s>": "<|im_end|>", "<pad>": "<|endoftext|>"},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        {
            "add_bos_token": False,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "Qwen2Tokenizer",
        },
    )


def _make_tokenizer(path: Path, names: Mapping[str, str], post: dict[str, Any], settings: dict[str, Any]) -> None:
    """The tiny tokenizer with other names of its special tokens, another post-processor and other settings."""
    tiny_models.make_tiny_tokenizer(path)
    text = (path / "tokenizer.json").read_text()
    for old, new in names.items():
        text = text.replace(json.dumps(old), json.dumps(new))
    (path / "tokenizer.json").write_text(json.dumps({**json.loads(text), "post_processor": post}))
    (path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 131072, **settings}))
