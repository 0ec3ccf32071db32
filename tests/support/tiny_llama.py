"""Tiny random Llama checkpoints of the real Hugging Face classes, with a tokenizer like Llama 3's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from support import tiny_models

ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def tiny_llama_config(**overrides: Any) -> LlamaConfig:
    """A Llama 3 config in small; ``head_dim`` is not stated, as on the 8B. ``rope_parameters`` replace :data:`ROPE`."""
    values: dict[str, Any] = {
        "vocab_size": 997,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "rope_parameters": ROPE,
    }
    return LlamaConfig(**{**values, **overrides})


def save_llama_causal_lm(path: str | Path, **kw: Any) -> Path:
    """Save a random ``LlamaForCausalLM``; keywords as of :func:`support.tiny_models.save_vlm`."""
    return _save(LlamaForCausalLM, path, kw)


def save_llama_model(path: str | Path, **kw: Any) -> Path:
    """Save a random ``LlamaModel``."""
    return _save(LlamaModel, path, kw)


def _save(model_class: Any, path: str | Path, kw: dict[str, Any]) -> Path:
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


def make_llama_tokenizer(path: Path) -> None:
    """Named tokens and template of Llama 3: BOS in front, nothing behind, no padding token."""
    tiny_models.make_tiny_tokenizer(path)
    names = {"<s>": "<|begin_of_text|>", "</s>": "<|end_of_text|>", "<pad>": "<|finetune_right_pad_id|>"}
    text = (path / "tokenizer.json").read_text()
    for old, new in names.items():
        text = text.replace(json.dumps(old), json.dumps(new))
    tokenizer = json.loads(text)
    bos = {"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, bos, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|begin_of_text|>": {"id": "<|begin_of_text|>", "ids": [1], "tokens": ["<|begin_of_text|>"]}
        },
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    tokenizer["post_processor"] = {"type": "Sequence", "processors": [byte_level, template]}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    Tokenizer.from_file(str(path / "tokenizer.json"))
    settings = {
        "bos_token": "<|begin_of_text|>",
        "clean_up_tokenization_spaces": True,
        "eos_token": "<|end_of_text|>",
        "model_max_length": 131072,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
