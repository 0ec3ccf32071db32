"""Tiny random checkpoints of the real Hugging Face classes, and a tokenizer, all made on the spot."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Ministral3Config,
    Ministral3ForCausalLM,
    Ministral3Model,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedModel,
)

#: the first ids of Ministral 3's own vocabulary; a document may hold any of them
SPECIAL_TOKENS = (
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
)

ROPE: dict[str, Any] = {
    "rope_type": "yarn",
    "type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def tiny_config(**overrides: Any) -> Ministral3Config:
    """A Ministral 3 text config in small: heads x head_dim != hidden, grouped KV heads, an odd vocabulary.

    ``rope_parameters`` given as an override are laid over :data:`ROPE`.
    """
    values: dict[str, Any] = {
        "vocab_size": 997,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "attention_dropout": 0.0,
        "pad_token_id": 11,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    rope = {**ROPE, **overrides.pop("rope_parameters", {})}
    return Ministral3Config(**{**values, **overrides}, rope_parameters=rope)


def tiny_vlm_config(**overrides: Any) -> Mistral3Config:
    """The whole VLM's config around :func:`tiny_config`, which takes ``overrides``."""
    text = tiny_config(**overrides)
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
        "image_size": 28,
        "patch_size": 14,
    }
    return Mistral3Config(
        text_config=text.to_dict(),
        vision_config=vision,
        image_token_index=10,
        spatial_merge_size=2,
        multimodal_projector_bias=False,
        tie_word_embeddings=text.tie_word_embeddings,
    )


def save_vlm(path: str | Path, **kw: Any) -> Path:
    """Save a random ``Mistral3ForConditionalGeneration``; see :func:`_save` for the keywords."""
    return _save(Mistral3ForConditionalGeneration, tiny_vlm_config, path, kw)


def save_causal_lm(path: str | Path, **kw: Any) -> Path:
    """Save a random ``Ministral3ForCausalLM``; see :func:`_save` for the keywords."""
    return _save(Ministral3ForCausalLM, tiny_config, path, kw)


def save_model(path: str | Path, **kw: Any) -> Path:
    """Save a random ``Ministral3Model``; see :func:`_save` for the keywords."""
    return _save(Ministral3Model, tiny_config, path, kw)


def _save(model_class: type[PreTrainedModel], make_config: Any, path: str | Path, kw: dict[str, Any]) -> Path:
    """Build, randomise and save.

    Keywords: ``seed`` (0), ``scale`` (0.2, of the weights), ``dtype`` ("float32"), ``max_shard_size`` ("5GB"),
    ``tokenizer`` (True: make one beside the weights); everything else goes to :func:`tiny_config`.
    """
    scale = kw.pop("scale", 0.2)
    seed, dtype = kw.pop("seed", 0), getattr(torch, kw.pop("dtype", "float32"))
    max_shard_size, tokenizer = kw.pop("max_shard_size", "5GB"), kw.pop("tokenizer", True)
    config = make_config(**kw)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
        randomize(model, scale=scale)
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    if tokenizer:
        make_tiny_tokenizer(path, vocab_size=min(997, kw.get("vocab_size", 997)))
    return Path(path)


@torch.no_grad()
def randomize(model: torch.nn.Module, *, scale: float = 0.2) -> None:
    """Weights large enough that every part of the model shows in its output; norms near, but not at, one."""
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter) * scale
        parameter.copy_(1.0 + noise if "norm" in name else noise)


def make_tiny_tokenizer(path: str | Path, texts: Iterable[str] | None = None, vocab_size: int = 997) -> Path:
    """Train a byte-level BPE that adds ``<s> … </s>`` and save it as a ``transformers`` tokenizer in folder ``path``.

    Args:
        texts: what to train on; by default this project's own prose.
        vocab_size: an upper bound, at least 270 (special tokens and bytes).
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts if texts is not None else [_TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "backend": "tokenizers",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": 1024,
        "pad_token": "<pad>",
        "tokenizer_class": "TokenizersBackend",
        "unk_token": "<unk>",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return path


_TEXT = " ".join(
    filter(
        None,
        (
            str(thing.__doc__)
            for thing in (
                str,
                int,
                dict,
                list,
                set,
                float,
                bytes,
                tuple,
                type,
                Exception,
                open,
                print,
                sorted,
                zip,
                map,
                filter,
                range,
                enumerate,
                sum,
                max,
                min,
                torch.nn.Linear,
                torch.nn.Embedding,
                json,
            )
        ),
    )
)
