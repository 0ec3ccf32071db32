"""README.md of an exported embedder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.errors import UserError
from megatron_embed.bridge.families import FAMILIES
from megatron_embed.conversion.files.json_files import read_json
from megatron_embed.conversion.hf.hub import is_hub_id
from megatron_embed.conversion.hf.sentence_files import SentenceSettings, has_one_length

_BEGINNING = "A bidirectional text embedder: a stock `"


def model_card(
    config: EncoderConfig,
    settings: SentenceSettings,
    run: Mapping[str, Any],
    iter_dir: Path,
    *,
    made_bidirectional: bool,
) -> str:
    """Return the card: the model's description, its use, its training data, and the measured metrics.

    Args:
        run: contents of the checkpoint's ``run_config.yaml``; a trained checkpoint's names recipe and data.
        iter_dir: the checkpoint; a run's ``metrics.jsonl`` is two folders up.
        made_bidirectional: whether the model comes from an embedder with causal attention.
    """
    model = _section(run, "model")
    base = model.get("hf_model")
    front: dict[str, Any] = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "feature-extraction", "sentence-similarity", config.family],
    }
    if _is_hub_id(base):
        front["base_model"] = base
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {_title(base)}\n",
        _about(config, made_bidirectional=made_bidirectional),
        _usage(settings),
        _facts(config, settings, base),
        _training(run),
        _metrics(iter_dir),
    ]
    return "\n".join(part for part in parts if part)


def is_export(folder: Path) -> bool:
    """Return whether a model folder is an earlier export: an embedder with such a card, or a bidirectional VLM."""
    card = folder / "README.md"
    if card.is_file() and _BEGINNING in card.read_text(encoding="utf-8", errors="replace"):
        return True
    try:
        return _section(read_json(folder / "config.json"), "text_config").get("is_causal") is False
    except UserError:
        return False


def _is_hub_id(base: object) -> bool:
    """Return whether the base model is on the hub; a path of this machine means nothing to others."""
    return isinstance(base, str) and "/" in base and is_hub_id(base) and not Path(base).exists()


def _title(base: object) -> str:
    return f"Embedder from {Path(base).name}" if isinstance(base, str) and base else "Text embedder"


def _about(config: EncoderConfig, *, made_bidirectional: bool) -> str:
    causal = (
        "\nIt was made from an embedder with causal attention, taken as a base model: here every token sees the whole "
        "text, so the vectors are not those of that embedder.\n"
    )
    return (
        f"{_BEGINNING}{FAMILIES[config.family].model_class}` with `is_causal: false`, "
        f"{config.num_hidden_layers} layers, {config.hidden_size}-dimensional vectors, {_pooling(config)}.\n"
        f"{causal if made_bidirectional else ''}"
    )


def _pooling(config: EncoderConfig) -> str:
    words = {"avg": "mean", "cls": "first-token", "last": "last-token", "weighted_avg": "position-weighted mean"}
    return f"{words[config.pooling]} pooling" + (", L2-normalised" if config.normalize else "")


def _usage(settings: SentenceSettings) -> str:
    return f"""## Use

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("PATH_OR_ID")
queries = model.encode_query(["how do plants eat?"])
passages = model.encode_document(["Photosynthesis turns light into sugar."])
print(model.similarity(queries, passages))
```

The prompts, {json.dumps(settings.query_prompt)} and {json.dumps(settings.passage_prompt)}, are part of the input the
model was made for. No remote code is needed.
{"" if has_one_length(settings) else _LENGTHS}"""


_LENGTHS = """
Queries and passages have maximal lengths of their own, `query_length` and `document_length` in
`sentence_bert_config.json`: `encode_query` and `encode_document` keep to them, plain `encode` to `max_seq_length`.
sentence-transformers knows the two keys from version 6 on. Version 5 refuses them; without them it has one length for
all, `max_seq_length`.
"""


def _facts(config: EncoderConfig, settings: SentenceSettings, base: object) -> str:
    rows = {
        "base model": f"`{base if _is_hub_id(base) else Path(base).name}`" if isinstance(base, str) else "unknown",
        "query prompt": f"`{json.dumps(settings.query_prompt)}`",
        "passage prompt": f"`{json.dumps(settings.passage_prompt)}`",
        **{f"prompt `{name}`": f"`{json.dumps(prompt)}`" for name, prompt in settings.prompts.items()},
        **({} if settings.default_prompt_name is None else {"default prompt": f"`{settings.default_prompt_name}`"}),
        "longest query, passage": f"{settings.query_max_length}, {settings.passage_max_length} tokens",
        **({"text": "lower-cased"} if settings.do_lower_case else {}),
        "similarity": {"cosine": "cosine", "dot": "scalar product"}[settings.similarity],
        "temperature": config.temperature,
        "weights": config.dtype,
    }
    return _table("## Facts", ("", ""), [(key, str(value)) for key, value in rows.items()])


def _training(run: Mapping[str, Any]) -> str:
    """Return the recipe and data of a checkpoint that comes from a training run."""
    train, data = _section(run, "train"), _section(run, "data")
    if not train:
        return ""
    rows = [("recipe", str(run["recipe"]))] if run.get("recipe") else []
    rows += [("data", _names(data.get("train")))] if data.get("train") else []
    keys = [("train", "train_iters"), ("train", "global_batch_size"), ("optimizer", "lr"), ("loss", "mode")]
    keys += [("data", "negatives_per_query"), ("train", "seed")]
    rows += [(f"{a}.{b}", str(_section(run, a)[b])) for a, b in keys if _section(run, a).get(b) is not None]
    return _table("## Training", ("", ""), rows)


def _names(data: Any) -> str:
    entries = data if isinstance(data, list) else [data]
    paths = [str(entry.get("path") if isinstance(entry, Mapping) else entry) for entry in entries]
    return ", ".join(f"`{path if path.startswith('hf://') else Path(path).name}`" for path in paths)


def _metrics(iter_dir: Path) -> str:
    """Return the last evaluation up to this checkpoint, from the run's own log."""
    path = iter_dir.parent.parent / "metrics.jsonl"
    number = iter_dir.name.removeprefix("iter_")
    if not path.is_file() or not number.isdecimal():
        return ""
    found: tuple[int, Mapping[str, Any]] | None = None
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # the incomplete last line of a killed run
        if isinstance(entry, dict) and isinstance(entry.get("eval"), dict) and entry.get("step", 0) <= int(number):
            found = entry["step"], entry["eval"]
    if found is None:
        return ""
    step, scores = found
    names = list(dict.fromkeys(name for values in scores.values() for name in values))
    rows = [
        (collection, *(f"{values.get(name, float('nan')):.4f}" for name in names))
        for collection, values in scores.items()
    ]
    return _table(f"## Measured at step {step}", ("collection", *names), rows)


def _section(run: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = run.get(name)
    return section if isinstance(section, Mapping) else {}


def _table(title: str, head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return f"{title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
