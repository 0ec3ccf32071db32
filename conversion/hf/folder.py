"""HFFolder: a strictly checked Hugging Face model folder whose tensors are read one by one or slice by slice."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_embed.bridge import mapping
from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.errors import UserError, listed
from megatron_embed.bridge.families import FAMILIES, Family
from megatron_embed.bridge.transforms import dequantize_fp8
from megatron_embed.conversion.files.stored import Stored, Values, addresses
from megatron_embed.conversion.hf.loaded_otherwise import (
    refuse_adapter,
    refuse_quantization,
    refuse_two_models,
)
from megatron_embed.conversion.hf.sentence_files import read_sentence_settings

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

#: dtype names in safetensors headers → torch
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
#: files to fetch from the hub; Mistral's own ``consolidated`` form is never needed
_FETCH = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model", "*.md"]
_FETCH_NOT = ["consolidated*", "*/consolidated*", "onnx/*", "openvino/*"]


class HFFolder:
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
        files: the files that hold tensors.
        notes: what was ignored at opening, one line each.
        bytes_requested: total bytes of the tensors and slices read so far.

    Raises:
        UserError: no such folder, not a safetensors model, or damaged files.
    """

    def __init__(
        self, path_or_id: str | os.PathLike[str], *, revision: str | None = None, trust_remote_code: bool = False
    ) -> None:
        self.source = str(path_or_id)
        self.revision = revision
        self.path = _locate(self.source, revision)
        refuse_adapter(self.path)
        self.config: dict[str, Any] = read_json(self.path / "config.json")
        if trust_remote_code and "auto_map" in self.config:
            raise UserError(
                f"{self.path / 'config.json'}: --trust-remote-code asks for the model's own code (auto_map), which is "
                f"never run here: models of a known family need none; leave --trust-remote-code out"
            )
        self.notes: list[str] = []
        self.bytes_requested = 0
        self._open_files: dict[str, Any] = {}
        self._file_of = self._index()
        self.files = [self.path / file for file in sorted(set(self._file_of.values()))]
        self._headers: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        #: (number of the tensor's file, position of the tensor in it)
        self._places: dict[str, tuple[int, int]] = {}
        self._read_headers()
        refuse_quantization(self.path / "config.json", self.config, fp8=self.quantized)
        prefix = mapping.hf_prefix(self._file_of)
        if prefix is None:
            raise UserError(
                f"{self.path}: no tensor named '…embed_tokens.weight' (found {_some(self._file_of)}); "
                f"wanted a model of {' or '.join(family.title for family in FAMILIES.values())} "
                f"with one of the prefixes {', '.join(map(repr, mapping.HF_PREFIXES))}"
            )
        self.prefix: str = prefix

    # ---- what there is

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        return sorted(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def nbytes(self, name: str) -> int:
        """Return the stored bytes of a tensor."""
        return math.prod(self.shape(name)) * self.stored_dtype(name).itemsize

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor; this reads only the header."""
        return self._headers[name][1]

    def stored_dtype(self, name: str) -> torch.dtype:
        """Return the stored dtype of a tensor (float8 for a quantised weight)."""
        return self._headers[name][0]

    def tensor_dtype(self, name: str) -> torch.dtype:
        """Return the dtype of the tensor that :meth:`read` returns: it dequantises FP8 weights to bfloat16."""
        return torch.bfloat16 if self.is_fp8(name) else self.stored_dtype(name)

    def is_fp8(self, name: str) -> bool:
        """Return whether a tensor is an FP8 weight with its own scale."""
        return self.stored_dtype(name) in FP8

    @property
    def quantized(self) -> bool:
        """Return whether any weight is FP8."""
        return any(dtype in FP8 for dtype, _ in self._headers.values())

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
            stated = str(self.tensor_dtype(f"{self.prefix}embed_tokens.weight"))
        return stated.removeprefix("torch.")

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

    # ---- reading

    def read(self, name: str, index: Sequence[slice] | None = None) -> Tensor:
        """Read a tensor, or the part of it that ``index`` (slices of its leading dimensions) names.

        This reads only that part's bytes. It returns FP8 weights as bfloat16: ``fp8.float() * scale``, rounded once.
        """
        handle = self._handle(self._file_of[name])
        try:
            tensor = handle.get_tensor(name) if index is None else handle.get_slice(name)[tuple(index)]
        except SafetensorError as error:
            raise UserError(f"{self._file_of[name]}: cannot read {name} ({error})") from None
        self.bytes_requested += tensor.numel() * tensor.element_size()
        return self._dequantize(name, tensor) if self.is_fp8(name) else tensor

    def _dequantize(self, name: str, tensor: Tensor) -> Tensor:
        scale = self._handle(self._file_of[f"{name}_scale_inv"]).get_tensor(f"{name}_scale_inv")
        largest = torch.tensor(torch.finfo(tensor.dtype).max).to(tensor.dtype)
        if not dequantize_fp8(largest, scale).isfinite():
            raise UserError(
                f"{self.path}: {name}_scale_inv: the scale {float(scale):g} takes FP8 values beyond bfloat16; "
                f"wanted a finite one below {torch.finfo(torch.bfloat16).max / float(largest):.3g}"
            )
        return dequantize_fp8(tensor, scale)

    def values(self, name: str, dtype: torch.dtype) -> Values:
        """Return a tensor's place in files if it is stored in this dtype, else the tensor itself."""
        if self.stored_dtype(name) != dtype or not math.prod(self.shape(name)) or not self.shape(name):
            return self.read(name)
        return Stored(self.files, self.addresses(name), self.shape(name), dtype)

    def addresses(self, name: str, index: Sequence[slice] | None = None) -> Tensor:
        """Return the addresses in :attr:`files` of a tensor's rows, or of the rows that ``index`` names."""
        rows = addresses(*self._places[name], self.shape(name), self.stored_dtype(name))
        return rows if index is None else rows[tuple(index)]

    # ---- strictness

    def ignored(self, config: EncoderConfig) -> dict[str, str]:
        """Return the tensors that the encoder leaves out, each with the reason, but no unknown tensors."""
        wanted, family = set(self._wanted(config)), FAMILIES[config.family]
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
            if name not in wanted and self._reason(name, set(wanted), FAMILIES[config.family]) is None:
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

    def _reason(self, name: str, wanted: set[str], family: Family) -> str | None:
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

    # ---- files

    def _index(self) -> dict[str, str]:
        """Return tensor name → file name, from the index if there is one; it may not contradict a single file."""
        if (named := self.config.get("transformers_weights")) not in (None, SINGLE, INDEX):
            raise UserError(
                f"{self.path / 'config.json'}: transformers_weights is {named!r}, which transformers would read; "
                f"wanted {SINGLE} or {INDEX}: rename the file, and take the key out"
            )
        if any(self.path.glob("consolidated*.safetensors")):
            self.notes.append("consolidated*.safetensors ignored: the same weights in Mistral's own names")
        if (self.path / INDEX).is_file():
            return self._read_index(self.path / INDEX)
        if (self.path / SINGLE).is_file():
            return dict.fromkeys(self._handle(SINGLE).keys(), SINGLE)
        if (self.path / SINGLE).is_symlink():
            raise UserError(f"{self.path / SINGLE}: {_absence(self.path / SINGLE)}")
        found = sorted(p.name for p in self.path.iterdir())
        if pickles := [name for name in found if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
            raise UserError(
                f"{self.path}: holds pickled weights only ({_some(pickles)}); pickles are not opened. "
                f"Convert them to safetensors: load the model with transformers and save_pretrained it"
            )
        raise UserError(f"{self.path}: neither {INDEX} nor {SINGLE} (found {_some(found)})")

    def _read_index(self, path: Path) -> dict[str, str]:
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, Mapping) or not weight_map:
            raise UserError(f"{path}: no 'weight_map'; wanted {{tensor name: file name}}")
        if (self.path / SINGLE).is_file():
            refuse_two_models(self.path, SINGLE, INDEX, [str(file) for file in weight_map.values()])
        for name, file in weight_map.items():
            if not isinstance(file, str) or not _inside(file):
                raise UserError(f"{path}: {name} is said to lie in {file!r}, outside of the folder; refused")
            if not file.endswith(".safetensors"):
                raise UserError(f"{path}: {name} is said to lie in {file!r}; wanted a .safetensors file")
        for file in sorted(set(weight_map.values())):
            if not (self.path / file).is_file():
                names = [name for name, where in weight_map.items() if where == file]
                raise UserError(f"{path}: names {file}, which does not exist ({len(names)} tensors, {_some(names)})")
            held = set(self._handle(file).keys())
            listed = {name for name, where in weight_map.items() if where == file}
            if held != listed:
                raise UserError(
                    f"{self.path / file}: holds other tensors than {path.name} says; "
                    f"absent: {_some(sorted(listed - held))}; unlisted: {_some(sorted(held - listed))}"
                )
        return dict(weight_map)

    def _read_headers(self) -> None:
        for number, path in enumerate(self.files):  # safe_open has checked them
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(length))
            for name in header.keys() - {"__metadata__"}:
                entry = header[name]
                if (dtype := DTYPES.get(entry["dtype"])) is None:
                    raise UserError(f"{path}: {name} has dtype {entry['dtype']!r}, which is not supported")
                self._headers[name] = (dtype, tuple(entry["shape"]))
                self._places[name] = (number, 8 + length + entry["data_offsets"][0])

    def _handle(self, file: str) -> Any:
        if file not in self._open_files:
            path = self.path / file
            try:
                self._open_files[file] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: not a sound safetensors file ({error}){_what_it_is(path)}") from None
        return self._open_files[file]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        UserError: the file is absent, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: {_absence(path)}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a JSON {type(value).__name__}, wanted an object")
    return value


def _absence(path: Path) -> str:
    """Say that a file is not there; a hub cache's own entries are links to its blobs, which may be gone."""
    return f"a link to {path.readlink()}, which is not there; fetch it again" if path.is_symlink() else "no such file"


def _locate(source: str, revision: str | None) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{source}: is a file; wanted the folder that holds config.json and *.safetensors")
    if not is_hub_id(source):
        raise UserError(f"{source}: no such folder; wanted a Hugging Face model folder or the id of one on the hub")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=_FETCH, ignore_patterns=_FETCH_NOT))
    except Exception as error:  # the hub raises a dozen kinds: offline, no such repository, gated, …
        raise UserError(not_on_the_hub(source, error)) from None


def is_hub_id(name: str) -> bool:
    """Return whether a name can be a hub id, and not only a path."""
    return not name.startswith((".", "/", "~")) and _HUB_ID.fullmatch(name) is not None


def not_on_the_hub(name: str, error: Exception) -> str:
    """Return the message for a name that is no folder and for which the hub raised ``error``."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"{name}: no such folder, and not to be had from the hub ({reason}); give a local folder, or check the "
        f"id, --revision, the network (HF_HUB_OFFLINE={os.environ.get('HF_HUB_OFFLINE', '')!r}) and HF_TOKEN"
    )


def _inside(file: str) -> bool:
    """Return whether a file name stays in its folder. The name decides, because a hub cache's own entries are links."""
    path = PurePosixPath(file)
    return bool(file) and not path.is_absolute() and ".." not in path.parts and "\\" not in file and ":" not in file


def _what_it_is(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            start = stream.read(64)
    except OSError:
        return ""
    if start.startswith((b"PK", b"\x80")):
        return "; it is a pickle, which is not opened"
    if start.startswith(b"version https://git-lfs"):
        return "; it is a Git LFS pointer: run `git lfs pull`"
    return "; fetch it again"


def _some(names: Sequence[str] | Mapping[str, Any]) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f", … ({len(names)})" if len(names) > 4 else "") if names else "nothing"
