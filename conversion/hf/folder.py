"""HFFolder: a strictly checked Hugging Face model folder."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from typing import Any

import torch

from megatron_embed.bridge import mapping
from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.errors import UserError, listed, some
from megatron_embed.bridge.families import FAMILIES, Family
from megatron_embed.conversion.files.casts import dtype_name
from megatron_embed.conversion.files.json_files import read_json
from megatron_embed.conversion.hf.hub import locate
from megatron_embed.conversion.hf.loaded_otherwise import refuse_adapter, refuse_quantization
from megatron_embed.conversion.hf.sentence_files import read_sentence_settings
from megatron_embed.conversion.hf.stored_tensors import FLOATS, INDEX, SINGLE, StoredTensors


class HFFolder(StoredTensors):
    """A model folder opened lazily: headers are read at once, tensors only on request.

    Args:
        path_or_id: a local folder, or a hub id. ``huggingface_hub`` fetches a hub id and never touches a local folder.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: whether the user lets the model's own code run. This package runs none, so it refuses a
            model that has some.

    Attributes:
        path: the local folder.
        config: contents of ``config.json``.
        prefix: prefix of ``embed_tokens.weight`` in the tensor names.

    Raises:
        UserError: no such folder, not a safetensors model, or damaged files.
    """

    def __init__(
        self, path_or_id: str | os.PathLike[str], *, revision: str | None = None, trust_remote_code: bool = False
    ) -> None:
        self.source = str(path_or_id)
        self.revision = revision
        path = locate(self.source, revision)
        refuse_adapter(path)
        self.config: dict[str, Any] = read_json(path / "config.json")
        if trust_remote_code and "auto_map" in self.config:
            raise UserError(
                f"{path / 'config.json'}: --trust-remote-code asks for the model's own code (auto_map), which is "
                f"never run here: models of a known family need none; leave --trust-remote-code out"
            )
        if (named := self.config.get("transformers_weights")) not in (None, SINGLE, INDEX):
            raise UserError(
                f"{path / 'config.json'}: transformers_weights is {named!r}, which transformers would read; "
                f"wanted {SINGLE} or {INDEX}: rename the file, and take the key out"
            )
        super().__init__(path)
        refuse_quantization(self.path / "config.json", self.config, fp8=self.quantized)
        prefix = mapping.hf_prefix(self._file_of)
        if prefix is None:
            raise UserError(
                f"{self.path}: no tensor named '…embed_tokens.weight' (found {some(self._file_of)}); "
                f"wanted a model of {' or '.join(family.title for family in FAMILIES.values())} "
                f"with one of the prefixes {', '.join(map(repr, mapping.HF_PREFIXES))}"
            )
        self.prefix: str = prefix

    @property
    def architecture(self) -> str:
        """Return the model class that the config names, or the model type where it names none."""
        named = self.config.get("architectures") or [self.config.get("model_type", "unknown")]
        return str(named[0])

    @property
    def dtype(self) -> str:
        """Return torch's name of the source's dtype: the config's, else that of the tensors; FP8 counts as bfloat16."""
        text = self.config.get("text_config") or {}
        stated = next(
            (c[k] for c in (self.config, text) for k in ("dtype", "torch_dtype") if isinstance(c.get(k), str)), None
        )
        if self.quantized or stated is None or not isinstance(getattr(torch, stated, None), torch.dtype):
            return dtype_name(self.tensor_dtype(f"{self.prefix}embed_tokens.weight"))
        return dtype_name(stated)

    def encoder_config(self, **overrides: Any) -> EncoderConfig:
        """Return the folder's encoder config; a ready embedder's files decide its pooling and normalisation."""
        settings = read_sentence_settings(self.path)
        found: dict[str, Any] = {"dtype": self.dtype}
        if settings is not None:
            found |= {"pooling": settings.pooling, "normalize": settings.normalize}
        raw = self.config
        try:
            return EncoderConfig.from_hf(raw, **{**found, **overrides})
        except UserError as error:
            raise UserError(f"{self.path / 'config.json'}: {str(error).removeprefix('config: ')}") from None

    # ---- strictness

    def ignored(self, config: EncoderConfig) -> dict[str, str]:
        """Return the tensors that the encoder leaves out, each with the reason, but no unknown tensors."""
        wanted, family = self._wanted(config), FAMILIES[config.family]
        reasons = {name: self._reason(name, wanted, family) for name in self.names() if name not in wanted}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def check(self, config: EncoderConfig) -> None:
        """Check that every weight of the table has its shape, and that a reason excuses every other tensor.

        Raises:
            UserError: weights or tensors are missing, misshapen or unknown; the message lists them.
        """
        wanted = self._wanted(config)
        problems = []
        for name, shape in wanted.items():
            if name not in self._file_of:
                problems.append(f"{name}: missing; wanted shape {list(shape)}")
            elif self.shape(name) != shape:
                problems.append(f"{name}: found shape {list(self.shape(name))}, wanted {list(shape)} by config.json")
            elif self.is_fp8(name):
                problems += self._fp8_problems(name)
            elif self.stored_dtype(name) not in FLOATS:
                problems.append(f"{name}: found dtype {self.stored_dtype(name)}, wanted a floating-point one")
        for name in self.names():
            if name not in wanted and self._reason(name, wanted, FAMILIES[config.family]) is None:
                problems.append(f"{name}: not a tensor of this model (shape {list(self.shape(name))})")
        if problems:
            raise UserError(
                f"{self.path}: the weights do not fit the config: {listed(problems)}; "
                f"fetch the folder again, or correct its config.json"
            )

    def _wanted(self, config: EncoderConfig) -> dict[str, tuple[int, ...]]:
        return {
            self.prefix + name: shape
            for weight in mapping.weights(config)
            for name, shape in zip(weight.hf, weight.hf_shapes, strict=True)
        }

    def _reason(self, name: str, wanted: Collection[str], family: Family) -> str | None:
        if name.endswith(".weight_scale_inv") and name.removesuffix("_scale_inv") in wanted:
            return "folded into its weight"
        if name.endswith(".activation_scale") and name.removesuffix("activation_scale") + "weight" in wanted:
            return "activations are not quantised here"
        return mapping.ignored_reason(name, family)

    def _fp8_problems(self, name: str) -> list[str]:
        scale = f"{name}_scale_inv"
        if scale not in self._file_of:
            return [f"{scale}: missing; the FP8 weight {name} needs it"]
        if math.prod(self.shape(scale)) != 1:
            return [f"{scale}: found shape {list(self.shape(scale))}, wanted one scale for the whole weight"]
        return []
