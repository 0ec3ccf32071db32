"""Sizes of the models that the recipes name, so that their layouts can be planned before anything is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.errors import UsageError, UserError
from megatron_embed.recipes.config import RecipeConfig

_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "llama_4_scaling_beta": 0.1,
}
_MINISTRAL3: dict[str, Any] = {
    "vocab_size": 131072,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "rope_parameters": _YARN,
}
_LLAMA: dict[str, Any] = {
    "family": "llama",
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "original_max_position_embeddings": 8192},
}
_QWEN3: dict[str, Any] = {
    "family": "qwen3",
    "vocab_size": 151936,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}


def _sizes(common: dict[str, Any], layers: int, hidden: int, ffn: int, tied: bool, **own: Any) -> EncoderConfig:
    return EncoderConfig(
        **{**common, **own},
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=ffn,
        tie_word_embeddings=tied,
    )


#: Hub id → encoder. For arithmetic only: what is computed with is always read from the model's own config.json.
SIZES: dict[str, EncoderConfig] = {
    **{
        f"mistralai/Ministral-3-{size}-{kind}-2512": config
        for size, config in {
            "3B": _sizes(_MINISTRAL3, 26, 3072, 9216, True),
            "8B": _sizes(_MINISTRAL3, 34, 4096, 14336, False),
            "14B": _sizes(_MINISTRAL3, 40, 5120, 16384, False, rope_parameters={**_YARN, "rope_theta": 1e9}),
        }.items()
        for kind in ("Base", "Instruct", "Reasoning")
    },
    **{
        f"meta-llama/{name}{kind}": config
        for name, config in {
            "Llama-3.2-1B": _sizes(_LLAMA, 16, 2048, 8192, True, head_dim=64),
            "Llama-3.1-8B": _sizes(_LLAMA, 32, 4096, 14336, False, head_dim=128),
        }.items()
        for kind in ("", "-Instruct")
    },
    **{
        f"Qwen/Qwen3-{size}{kind}": config
        for size, config in {
            "0.6B": _sizes(_QWEN3, 28, 1024, 3072, True, num_attention_heads=16),
            "4B": _sizes(_QWEN3, 36, 2560, 9728, True),
            "8B": _sizes(_QWEN3, 36, 4096, 12288, False),
        }.items()
        for kind in ("", "-Base")
    },
}


def encoder_of(cfg: RecipeConfig) -> EncoderConfig:
    """The encoder that a recipe trains: from its folder or checkpoint, or by its hub id. No weight, no network.

    Raises:
        UserError: no model is named, its folder holds none, or its hub id is not in :data:`SIZES`.
    """
    stated = {"pooling": cfg.model.pooling, "normalize": cfg.model.normalize, "temperature": cfg.loss.temperature}
    checkpoint = cfg.checkpoint.pretrained_checkpoint or (None if cfg.model.hf_model else cfg.checkpoint.load)
    if checkpoint:
        from megatron_embed.conversion import checkpoint_folder

        iter_dir = checkpoint_folder.resolve(checkpoint)
        config = checkpoint_folder.encoder_config(iter_dir)
        if config is None:
            raise UserError(f"{iter_dir}: says nothing of its model; wanted run_config.yaml with 'encoder:'")
        return config.replace(**stated)
    name = cfg.model.hf_model
    if not name:
        raise UsageError("model.hf_model: missing; wanted a Hugging Face model folder or id, model.hf_model=DIR_OR_ID")
    folder = Path(name).expanduser()
    if folder.exists():
        return EncoderConfig.from_hf(folder).replace(**stated)
    if name not in SIZES:
        raise UserError(
            f"model.hf_model: {name!r} is no folder, and its sizes are not known; wanted a folder with config.json, "
            f"or one of {', '.join(SIZES)}"
        )
    return SIZES[name].replace(**stated)
