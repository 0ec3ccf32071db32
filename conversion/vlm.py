"""Export of the whole VLM: the source's tensors and files, with a checkpoint's weights in the language tower."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from megatron_embed.bridge import mapping
from megatron_embed.bridge.errors import UserError
from megatron_embed.bridge.families import is_vlm
from megatron_embed.conversion.files.casts import Casts, dtype_name
from megatron_embed.conversion.files.json_files import read_json, write_json
from megatron_embed.conversion.files.stored import Stored, Values
from megatron_embed.conversion.hf.folder import HFFolder
from megatron_embed.conversion.hf.safetensors_writer import TensorSpec, tower_specs, write_sharded
from megatron_embed.conversion.hf.sidecars import publish_files, sidecars, without_local_paths
from megatron_embed.conversion.hf.stored_tensors import FLOATS, FP8_SCALES
from megatron_embed.conversion.importing import torch_dtype_of
from megatron_embed.conversion.mcore import folder as checkpoint_folder
from megatron_embed.conversion.mcore import statements
from megatron_embed.conversion.mcore.weights import KEPT, CheckpointWeights

_PREFIX = "language_model.model."


@dataclass(frozen=True)
class VLMSource:
    """The source of the tensors beside the language tower, and of the files beside the weights."""

    #: folder of config.json and the other files
    files: Path
    #: prefix of the language tower's names
    prefix: str
    #: tensors beside the language tower (with lm_head, where there is one)
    others: tuple[TensorSpec, ...]
    values: Callable[[str, torch.dtype], Values]


def find_vlm_source(iter_dir: Path, weights: CheckpointWeights, given: HFFolder | None) -> VLMSource:
    """Return the given folder, else the checkpoint's own contents (``--with-vision``), else the source that it names.

    Raises:
        UserError: there is none of them, or it is not a VLM.
    """
    if given is not None:
        return _from_folder(given, weights)
    model = statements.read_section(iter_dir, "model")
    kept = weights.kept()
    if kept:
        reader = weights.reader
        specs = tuple(TensorSpec(n, reader.shape(KEPT + n), reader.dtype(KEPT + n)) for n in kept)
        prefix = str(model.get("hf_prefix") or _PREFIX)
        return VLMSource(
            iter_dir / checkpoint_folder.SIDECARS, prefix, specs, lambda n, dtype: reader.values(KEPT + n, dtype)
        )
    recorded = model.get("hf_model")
    if isinstance(recorded, str) and recorded:
        try:
            return _from_folder(HFFolder(recorded, revision=model.get("revision")), weights)
        except UserError as error:
            raise UserError(
                f"{iter_dir}: its source is needed for the vision tower: {error}; give --hf-model"
            ) from None
    raise UserError(
        f"{iter_dir}: holds no vision tower and does not remember its source; "
        f"give --hf-model, or import with --with-vision"
    )


def _from_folder(folder: HFFolder, weights: CheckpointWeights) -> VLMSource:
    if not is_vlm(folder.config):
        raise UserError(
            f"{folder.path}: is {folder.architecture} ({folder.config.get('model_type')}), which has no vision tower; "
            f"wanted the VLM (mistral3) as --hf-model, or --target embedder"
        )
    folder.check(folder.encoder_config())
    tower = {folder.prefix + name for weight in mapping.weights(weights.config) for name in weight.hf}
    names = [name for name in folder.names() if name not in tower and not name.endswith(FP8_SCALES)]
    specs = tuple(TensorSpec(name, folder.shape(name), folder.tensor_dtype(name)) for name in names)
    return VLMSource(folder.path, folder.prefix, specs, folder.values)


def write_vlm(
    out: Path,
    source: VLMSource,
    weights: CheckpointWeights,
    casts: Casts,
    *,
    torch_dtype: str | None,
    max_shard_size: str,
    progress: bool,
) -> None:
    """Write the weights, the adapted config, and byte for byte the model's other files.

    Keys of JSON files whose value is a path of this machine are left out: they would reveal where the model was made.

    Args:
        casts: casts the tensors.
        torch_dtype: None keeps the dtype of every tensor beside the language tower; else all floats get this dtype.
    """
    files = [path for path in sidecars(source.files) if str(path) != "config.json"]
    publish_files(files, source.files, out)
    raw = without_local_paths(read_json(source.files / "config.json"))
    for key in ("quantization_config", "auto_map"):  # the export is a stock model and carries no code
        raw.pop(key, None)
    raw["text_config"] = {**raw["text_config"], "is_causal": False}
    raw["text_config"].pop("quantization_config", None)
    if torch_dtype is not None:
        raw["dtype"] = torch_dtype
        raw.pop("torch_dtype", None)
        raw["text_config"].pop("dtype", None)

    def dtype_of(spec: TensorSpec) -> torch.dtype:
        return torch_dtype_of(torch_dtype) if torch_dtype is not None and spec.dtype in FLOATS else spec.dtype

    tower = torch_dtype_of(weights.config.dtype)
    others = [TensorSpec(spec.name, spec.shape, dtype_of(spec)) for spec in source.others]
    specs = [*tower_specs(weights.config, tower, prefix=source.prefix), *others]
    _restate_dtype(raw, tower, specs)
    write_json(out / "config.json", raw)
    values = _values(source, weights, casts, tower, others)
    write_sharded(specs, values, out, max_shard_size=max_shard_size, progress=progress)


def _restate_dtype(raw: dict[str, Any], tower: torch.dtype, specs: list[TensorSpec]) -> None:
    """Let a config state the widest dtype of the tensors where it does not state the language tower's.

    transformers casts to the stated dtype at loading; to the widest it loses no value.
    """
    widest = reduce(torch.promote_types, (spec.dtype for spec in specs if spec.dtype in FLOATS))
    for values in (raw, raw["text_config"]):
        for key in ("dtype", "torch_dtype"):
            if values.get(key) not in (None, "auto", dtype_name(tower)):
                values[key] = dtype_name(widest)


def _values(
    source: VLMSource, weights: CheckpointWeights, casts: Casts, tower: torch.dtype, others: list[TensorSpec]
) -> Iterator[tuple[str, Values]]:
    yield from weights.hf_values(tower, casts, source.prefix)
    embedding = next(mapping.weights(weights.config))
    for spec in others:
        if spec.name.endswith("lm_head.weight") and weights.config.tie_word_embeddings:
            values: Values = weights.read(embedding)  # a tied head that is stored nonetheless
        else:
            values = source.values(spec.name, spec.dtype)
        yield spec.name, values if isinstance(values, Stored) else casts(spec.name, values, spec.dtype)
