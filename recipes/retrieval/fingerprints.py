"""Fingerprints of vectors: hashes and settings of everything that tells vectors of one model or input from others."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from megatron_embed.recipes.datasets.corpus import Texts, file_digest
from megatron_embed.recipes.datasets.tokenization import Kind
from megatron_embed.recipes.encoding.encoder import Encoder
from megatron_embed.recipes.encoding.source import ModelSource


def fingerprint(
    encoder: Encoder,
    texts: Texts,
    kind: Kind,
    dim: int | None = None,
    precision: str = "float32",
    *,
    model: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the fingerprint of vectors. It reads the whole model and input, so only one rank should call it.

    Args:
        model: the :func:`model_fingerprint`, if already known.
    """
    assert encoder.source is not None, "an encoder from Encoder.from_pretrained"
    tokenizer = encoder.tokenizer
    return {
        **(model or model_fingerprint(encoder.source)),
        "compute_dtype": str(next(encoder.stages[0].parameters()).dtype).removeprefix("torch."),
        "kind": kind,
        "prompt": tokenizer.prompts[kind],
        "max_length": tokenizer.max_lengths[kind],
        # The key is present only if lower-casing is on, so that older folders keep their fingerprints.
        **({"do_lower_case": True} if tokenizer.do_lower_case else {}),
        "dim": dim or encoder.config.hidden_size,
        "precision": precision,
        "input_sha256": texts.digest(),
        "rows": len(texts),
    }


def model_fingerprint(source: ModelSource) -> dict[str, Any]:
    """Return hashes of a model's weights, settings and tokenizer; the place of its folder does not matter."""
    if source.iter_dir is not None:
        weights = sorted([*source.iter_dir.glob("*.distcp"), source.iter_dir / ".metadata"])
    else:
        weights = sorted(p for p in source.files.glob("*.safetensors") if not p.name.startswith("consolidated"))
    names = ("tokenizer.json", "tokenizer_config.json", "modules.json")
    tokenizer = [source.files / name for name in names if (source.files / name).is_file()]
    config = {name: value for name, value in asdict(source.config).items() if name != "temperature"}
    return {
        "weights_sha256": file_digest(*weights),
        "encoder": json.dumps(config, sort_keys=True, default=str),
        "tokenizer_sha256": file_digest(*tokenizer),
    }
