"""Tiny random Qwen3 checkpoints of the real Hugging Face classes, with a tokenizer that has no BOS, as Qwen's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from support import tiny_models


def tiny_qwen3_config(**overrides: Any) -> Qwen3Config:
    """A Qwen3 config in small; heads × head_dim ≠ hidden, as on the 0.6B."""
    values: dict[str, Any] = {
        "vocab_size": 997,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "bos_token_id": 3,
        "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    return Qwen3Config(**{**values, **overrides})


def save_qwen3_causal_lm(path: str | Path, **kw: Any) -> Path:
    """Save a random ``Qwen3ForCausalLM``; keywords as of :func:`support.tiny_models.save_vlm`."""
    return _save(Qwen3ForCausalLM, path, kw)


def save_qwen3_model(path: str | Path, **kw: Any) -> Path:
    """Save a random ``Qwen3Model``."""
    return _save(Qwen3Model, path, kw)


def _save(model_class: Any, path: str | Path, kw: dict[str, Any]) -> Path:
    folder = tiny_models._save(model_class, tiny_qwen3_config, path, {**kw, "tokenizer": False})
    if kw.get("tokenizer", True):
        make_qwen3_tokenizer(folder)
    return folder


def make_qwen3_tokenizer(path: Path) -> None:
    """No BOS, nothing put around a text, ``<|endoftext|>`` for padding."""
    tiny_models.make_tiny_tokenizer(path)
    text = (path / "tokenizer.json").read_text()
    for old, new in {"<s>": "<|im_start|>", "</s>": "<|im_end|>", "<pad>": "<|endoftext|>"}.items():
        text = text.replace(json.dumps(old), json.dumps(new))
    tokenizer = json.loads(text)
    tokenizer["post_processor"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 131072,
        "tokenizer_class": "Qwen2Tokenizer",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
