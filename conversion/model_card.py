"""README.md of an exported embedder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.families import FAMILIES
from megatron_embed.conversion.sentence_files import SentenceSettings


def model_card(
    config: EncoderConfig, settings: SentenceSettings, run: Mapping[str, Any], iter_dir: Path, name: str
) -> str:
    """What the model is, how to use it, what it was trained on, and what was measured.

    Args:
        run: contents of the checkpoint's ``run_config.yaml``; a trained checkpoint's names recipe and data.
        iter_dir: the checkpoint; a run's ``metrics.jsonl`` is looked for two folders up.
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
        _about(config),
        _usage(settings),
        _facts(config, settings, base),
        _training(run),
        _metrics(iter_dir),
    ]
    return "\n".join(part for part in parts if part)


def _is_hub_id(base: object) -> bool:
    """Whether the base model is on the hub; a path of this machine says nothing to others."""
    hub = isinstance(base, str) and base.count("/") == 1 and not base.startswith((".", "/", "~"))
    return hub and not Path(str(base)).exists()


def _title(base: object) -> str:
    return f"Embedder from {Path(base).name}" if isinstance(base, str) and base else "Text embedder"


def _about(config: EncoderConfig) -> str:
    return (
        f"A bidirectional text embedder: a stock `{FAMILIES[config.family].model_class}` with `is_causal: false`, "
        f"{config.num_hidden_layers} layers, {config.hidden_size}-dimensional vectors, {_pooling(config)}.\n"
    )


def _pooling(config: EncoderConfig) -> str:
    words = {"avg": "mean", "cls": "first-token", "last": "last-token", "weighted_avg": "position-weighted mean"}
    return f"{words[config.pooling]} pooling" + (", L2-normalised" if config.normalize else "")


def _usage(settings: SentenceSettings) -> str:
    return f"""## Use

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("PATH_OR_ID")
queries = model.encode(["how do plants eat?"], prompt_name="query")
passages = model.encode(["Photosynthesis turns light into sugar."], prompt_name="document")
print(model.similarity(queries, passages))
```

The prompts, {json.dumps(settings.query_prompt)} and {json.dumps(settings.passage_prompt)}, are part of the input the
model was made for. No remote code is needed.
"""


def _facts(config: EncoderConfig, settings: SentenceSettings, base: object) -> str:
    rows = {
        "base model": f"`{base if _is_hub_id(base) else Path(base).name}`" if isinstance(base, str) else "unknown",
        "query prompt": f"`{json.dumps(settings.query_prompt)}`",
        "passage prompt": f"`{json.dumps(settings.passage_prompt)}`",
        "longest query, passage": f"{settings.query_max_length}, {settings.passage_max_length} tokens",
        "similarity": "cosine" if config.normalize else "scalar product",
        "temperature": config.temperature,
        "weights": config.dtype,
    }
    return _table("## Facts", ("", ""), [(key, str(value)) for key, value in rows.items()])


def _training(run: Mapping[str, Any]) -> str:
    """Recipe and data, where the checkpoint comes from a training run."""
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
    """The last evaluation up to this checkpoint, from the run's own log."""
    path = iter_dir.parent.parent / "metrics.jsonl"
    number = iter_dir.name.removeprefix("iter_")
    if not path.is_file() or not number.isdecimal():
        return ""
    found: tuple[int, Mapping[str, Any]] | None = None
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a run that was killed
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
