"""The tensors of a folder's safetensors files, read one by one or slice by slice; headers and index are checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_embed.bridge.errors import UserError, some
from megatron_embed.bridge.transforms import dequantize_fp8
from megatron_embed.conversion.files.json_files import absence, read_json
from megatron_embed.conversion.files.stored import Stored, Values, addresses
from megatron_embed.conversion.hf.loaded_otherwise import refuse_two_models

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
#: ends of the names of tensors that belong to FP8 weights
FP8_SCALES = (".weight_scale_inv", ".activation_scale")
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class StoredTensors:
    """Tensors of a folder, opened lazily: headers are read at once, tensors only on request.

    Attributes:
        path: the folder.
        files: the files that hold tensors.
        notes: what was ignored at opening, one line each.
        bytes_requested: total bytes of the tensors and slices read so far.

    Raises:
        UserError: the folder holds no safetensors, or damaged files.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: list[str] = []
        self.bytes_requested = 0
        self._open_files: dict[str, Any] = {}
        self._file_of = self._index()
        self.files = [self.path / file for file in sorted(set(self._file_of.values()))]
        self._headers: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        #: (number of the tensor's file, position of the tensor in it)
        self._places: dict[str, tuple[int, int]] = {}
        self._read_headers()

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

    # ---- reading

    def read(self, name: str, index: Sequence[slice] | None = None) -> Tensor:
        """Read a tensor, or the part of it that ``index`` (slices of its leading dimensions) names.

        This reads only that part's bytes. It returns FP8 weights as bfloat16: ``fp8.float() * scale``, rounded once.
        """
        handle = self._handle(self._file_of[name])
        try:
            tensor = handle.get_tensor(name) if index is None else handle.get_slice(name)[tuple(index)]
        except SafetensorError as error:
            raise UserError(f"{self._file_of[name]}: cannot read {name} ({error}); fetch the file again") from None
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

    # ---- files

    def _index(self) -> dict[str, str]:
        """Return tensor name → file name, from the index if there is one; it may not contradict a single file."""
        if any(self.path.glob("consolidated*.safetensors")):
            self.notes.append("consolidated*.safetensors ignored: the same weights in Mistral's own names")
        if (self.path / INDEX).is_file():
            return self._read_index(self.path / INDEX)
        if (self.path / SINGLE).is_file():
            return dict.fromkeys(self._handle(SINGLE).keys(), SINGLE)
        if (self.path / SINGLE).is_symlink():
            raise UserError(f"{self.path / SINGLE}: {absence(self.path / SINGLE)}")
        found = sorted(p.name for p in self.path.iterdir())
        if pickles := [name for name in found if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
            raise UserError(
                f"{self.path}: holds pickled weights only ({some(pickles)}); pickles are not opened. "
                f"Convert them to safetensors: load the model with transformers and save_pretrained it"
            )
        raise UserError(
            f"{self.path}: holds neither {INDEX} nor {SINGLE} (found {some(found)}); wanted the model's weights as "
            f"safetensors: fetch them, or name another folder"
        )

    def _read_index(self, path: Path) -> dict[str, str]:
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, Mapping) or not weight_map:
            raise UserError(f"{path}: has no 'weight_map'; wanted {{tensor name: file name}}: fetch the file again")
        if (self.path / SINGLE).is_file():
            refuse_two_models(self.path, SINGLE, INDEX, [str(file) for file in weight_map.values()])
        for name, file in weight_map.items():
            if not isinstance(file, str) or not _inside(file):
                raise UserError(
                    f"{path}: {name} is said to lie in {file!r}, outside of the folder; refused: wanted the name of a "
                    f"file beside it"
                )
            if not file.endswith(".safetensors"):
                raise UserError(
                    f"{path}: {name} is said to lie in {file!r}; wanted a .safetensors file: convert the weights to it"
                )
        for file in sorted(set(weight_map.values())):
            if not (self.path / file).is_file():
                names = [name for name, where in weight_map.items() if where == file]
                raise UserError(
                    f"{path}: names {file}, which does not exist ({len(names)} tensors, {some(names)}); "
                    f"fetch that file too"
                )
            held = set(self._handle(file).keys())
            listed = {name for name, where in weight_map.items() if where == file}
            if held != listed:
                raise UserError(
                    f"{self.path / file}: holds other tensors than {path.name} says; "
                    f"absent: {some(sorted(listed - held))}; unlisted: {some(sorted(held - listed))}; "
                    f"fetch both files again"
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
                    raise UserError(
                        f"{path}: {name} has dtype {entry['dtype']!r}, which is not supported; wanted one of "
                        f"{', '.join(DTYPES)}"
                    )
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
