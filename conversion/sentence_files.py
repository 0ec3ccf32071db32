"""The files that make a folder a sentence-transformers model: read from a ready embedder, written for an export."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from megatron_embed.bridge.config import EncoderConfig, Pooling
from megatron_embed.bridge.errors import UserError

QUERY_PROMPT, PASSAGE_PROMPT, MAX_LENGTH = "query: ", "passage: ", 512

#: our pooling → sentence-transformers' name; 6.x writes it as ``pooling_mode``, 5.x as a flag
MODES: dict[str, str] = {"avg": "mean", "cls": "cls", "last": "lasttoken", "weighted_avg": "weightedmean"}
_FLAGS: dict[str, str] = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


@dataclass(frozen=True, kw_only=True)
class SentenceSettings:
    """How texts become vectors around the encoder."""

    pooling: Pooling = "avg"
    normalize: bool = True
    query_prompt: str = QUERY_PROMPT
    passage_prompt: str = PASSAGE_PROMPT
    query_max_length: int = MAX_LENGTH
    passage_max_length: int = MAX_LENGTH


def read_sentence_settings(folder: Path) -> SentenceSettings | None:
    """What a ready sentence-transformers model says of itself; None where the folder is none.

    Raises:
        UserError: a module that would change the vectors and that the encoder does not compute.
    """
    if not (folder / "modules.json").is_file():
        return None
    modules = _load(folder / "modules.json")
    kinds = [str(module["type"]).rsplit(".", 1)[-1] for module in modules]
    foreign = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if foreign or "Pooling" not in kinds:
        raise UserError(
            f"{folder / 'modules.json'}: modules {', '.join(kinds)}; wanted Transformer, Pooling and perhaps Normalize"
        )
    prompts = _load_optional(folder / "config_sentence_transformers.json").get("prompts") or {}
    limit = _load_optional(folder / "sentence_bert_config.json").get("max_seq_length")
    limit = limit or _load_optional(folder / "tokenizer_config.json").get("model_max_length")
    length = int(limit) if isinstance(limit, int) and limit < 1 << 24 else MAX_LENGTH
    return SentenceSettings(
        pooling=_read_pooling(folder / modules[kinds.index("Pooling")]["path"] / "config.json"),
        normalize="Normalize" in kinds,
        query_prompt=str(prompts.get("query", "")),
        passage_prompt=str(prompts.get("document", prompts.get("passage", ""))),
        query_max_length=length,
        passage_max_length=length,
    )


def _read_pooling(path: Path) -> Pooling:
    config = _load(path)
    modes = config.get("pooling_mode") or [mode for mode, flag in _FLAGS.items() if config.get(flag)]
    modes = [modes] if isinstance(modes, str) else list(modes)
    ours = {theirs: ours for ours, theirs in MODES.items()}
    if len(modes) != 1 or modes[0] not in ours:
        raise UserError(f"{path}: pooling {' + '.join(modes) or 'unknown'}; wanted one of {', '.join(ours)}")
    if config.get("include_prompt") is False:
        raise UserError(f"{path}: include_prompt is false; the encoder pools over the prompt's tokens as well")
    return cast(Pooling, ours[modes[0]])


def write_sentence_files(out: Path, config: EncoderConfig, settings: SentenceSettings) -> None:
    """Write ``modules.json`` and what it names, in the form that sentence-transformers 5.3 and 6.2 both load."""
    length = min(max(settings.query_max_length, settings.passage_max_length), config.max_position_embeddings)
    modules = [("Transformer", ""), ("Pooling", "1_Pooling")]
    if config.normalize:
        modules.append(("Normalize", "2_Normalize"))
    write_json(
        out / "modules.json",
        [
            # the old class paths: 5.x has no others, 6.x still knows them
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (kind, path) in enumerate(modules)
        ],
    )
    mode = MODES[config.pooling]
    flags = {flag: name == mode for name, flag in _FLAGS.items()}
    (out / "1_Pooling").mkdir()
    write_json(
        out / "1_Pooling" / "config.json",
        {"word_embedding_dimension": config.hidden_size, **flags, "include_prompt": True},
    )
    write_json(out / "sentence_bert_config.json", {"max_seq_length": length, "do_lower_case": False})
    write_json(
        out / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "prompts": {"query": settings.query_prompt, "document": settings.passage_prompt},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine" if config.normalize else "dot",
        },
    )


def write_json(path: Path, value: Any) -> None:
    """JSON as people read it: indented, UTF-8, a newline at the end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, though modules.json speaks of it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


def _load_optional(path: Path) -> Mapping[str, Any]:
    return _load(path) if path.is_file() else {}
