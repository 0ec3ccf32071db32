"""Ready embedders: folders as sentence-transformers 6.2 saves them, with any of their settings changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.tiny_models import save_model, save_vlm

_TYPES = {
    "Transformer": ("", "sentence_transformers.base.modules.transformer.Transformer"),
    "Pooling": ("1_Pooling", "sentence_transformers.sentence_transformer.modules.pooling.Pooling"),
    "Normalize": ("2_Normalize", "sentence_transformers.base.modules.normalize.Normalize"),
}


def make_ready(
    folder: Path,
    *,
    pooling: str = "mean",
    normalize: bool = True,
    causal: Any = False,
    transformer: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    vlm: bool = False,
) -> Path:
    """A tiny fp32 embedder.

    Args:
        pooling: sentence-transformers' name.
        causal: ``is_causal``, in the text config of a VLM; None: the key is missing.
        transformer: contents of ``sentence_bert_config.json``, beside what every such file holds.
        model: contents of ``config_sentence_transformers.json``, in the same way.
    """
    save_vlm(folder) if vlm else save_model(folder)
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"] if vlm else config
    text.pop("is_causal", None)
    if causal is not None:
        text["is_causal"] = causal
    modules = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    files: dict[str, Any] = {
        "config.json": config,
        "modules.json": [
            {"idx": idx, "name": str(idx), "path": _TYPES[kind][0], "type": _TYPES[kind][1]}
            for idx, kind in enumerate(modules)
        ],
        "1_Pooling/config.json": {"embedding_dimension": 48, "pooling_mode": pooling, "include_prompt": True},
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
            "module_output_name": "token_embeddings",
            **(transformer or {}),
        },
        "config_sentence_transformers.json": {
            "__version__": {"sentence_transformers": "6.2.0"},
            "model_type": "SentenceTransformer",
            "prompts": {"query": "", "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
            **(model or {}),
        },
    }
    for name, value in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return folder
