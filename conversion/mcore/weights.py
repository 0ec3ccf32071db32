"""The weights of the table in a Megatron checkpoint: from HF parts to chunks, and from tensors back to HF parts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from megatron_embed.bridge import mapping, transforms
from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.errors import UserError, listed
from megatron_embed.bridge.mapping import Weight
from megatron_embed.conversion.files.casts import Casts
from megatron_embed.conversion.files.stored import Stored, Values
from megatron_embed.conversion.hf.folder import HFFolder
from megatron_embed.conversion.mcore.tensors import CheckpointReader, Chunk

#: prefix to the names of HF tensors that are kept unchanged (``--with-vision``)
KEPT = "hf."

#: prefixes of the encoder's names: ours, Megatron-Bridge's VLM
PREFIXES = ("", "language_model.")

#: checkpoint tensors that are no weights of the encoder, with the reason
IGNORED: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(optimizer|chained_\d+|loss|rng_state|rerun_state).*"), "training state"),
    (re.compile("log_temperature"), "read as the config's temperature"),
    (re.compile(r".*_extra_state(/.*)?"), "quantisation state of Transformer Engine"),
    (re.compile(re.escape(KEPT) + ".+"), "kept for an export of the whole VLM"),
    (re.compile(r"(vision_|multi_modal_|mlp1).+"), "takes no part in text embedding"),
    (re.compile(r"(language_model\.)?output_layer\.weight"), "an embedder has no language-model head"),
)


def is_ignored(name: str) -> bool:
    """Return whether a checkpoint tensor is no weight of the encoder."""
    return any(pattern.fullmatch(name) for pattern, _ in IGNORED)


# ---- one weight, packed


def pack(weight: Weight, parts: list[Tensor], config: EncoderConfig, *, tp_size: int = 1) -> Tensor:
    """Pack HF parts, or one rank's even slices of them, into Megatron's weight or slice, with vocabulary unpadded."""
    if weight.kind == "qkv":
        groups = config.num_key_value_heads // tp_size
        return transforms.pack_qkv(*parts, groups=groups, head_dim=config.head_dim)
    if weight.kind == "gate_up":
        return transforms.pack_gate_up(*parts)
    return parts[0]


def unpack(weight: Weight, packed: Tensor, config: EncoderConfig) -> tuple[Tensor, ...]:
    """Invert :func:`pack` on whole weights."""
    if weight.kind == "qkv":
        return transforms.unpack_qkv(packed, groups=config.num_key_value_heads, head_dim=config.head_dim)
    if weight.kind == "gate_up":
        return transforms.unpack_gate_up(packed)
    return (packed,)


def read_slices(
    folder: HFFolder,
    weight: Weight,
    config: EncoderConfig,
    *,
    tp_rank: int = 0,
    tp_size: int = 1,
    read: Callable[..., Tensor] | None = None,
) -> list[Tensor]:
    """Read one tensor-parallel rank's slices of the HF parts of a weight; the vocabulary is unpadded.

    Args:
        read: function that reads a tensor or a slice of it, such as ``folder.addresses`` for its rows' addresses.
    """
    read = read or folder.read
    if weight.tp_dim is None or tp_size == 1:
        return [read(folder.prefix + name) for name in weight.hf]
    size = weight.hf_shapes[0][weight.tp_dim]
    if weight.kind == "vocab":
        padded = transforms.padded_vocab_size(config.vocab_size, world=tp_size)
        rows = transforms.even_range(padded, rank=tp_rank, world=tp_size)
        return [read(folder.prefix + weight.hf[0], [slice(min(rows.start, size), min(rows.stop, size))])]
    before = [slice(None)] * weight.tp_dim
    return [
        read(folder.prefix + name, [*before, transforms.even_range(shape[weight.tp_dim], rank=tp_rank, world=tp_size)])
        for name, shape in zip(weight.hf, weight.hf_shapes, strict=True)
    ]


def read_cast(
    folder: HFFolder,
    casts: Casts,
    dtype: torch.dtype,
    name: str,
    index: Sequence[slice] | None = None,
    *,
    count: bool = True,
) -> Tensor:
    """Read a folder's tensor, or a slice of it, in ``dtype``; serves as ``read`` of :func:`read_slices`."""
    return casts(name, folder.read(name, index), dtype, count=count)


# ---- HF folder → chunks


def chunks(
    folder: HFFolder, config: EncoderConfig, *, dtype: torch.dtype, tp: int = 1, pp: int = 1, casts: Casts | None = None
) -> Iterator[Chunk]:
    """Yield all weights of a folder as chunks of a checkpoint, one for each layer and tensor-parallel slice.

    The layout only determines the chunks and files: a checkpoint loads under any other. By default no value may be
    rounded.
    """
    casts = casts or Casts(folder.path)
    for weight in mapping.weights(config):
        stage = 0 if weight.layer is None else weight.layer * pp // config.num_hidden_layers
        if weight.megatron == "decoder.final_layernorm.weight":
            stage = pp - 1
        slices = 1 if weight.tp_dim is None else tp
        for tp_rank in range(slices):
            yield from _weight_chunks(folder, weight, config, dtype, casts, tp_rank, slices, rank=stage * tp + tp_rank)


def _weight_chunks(
    folder: HFFolder,
    weight: Weight,
    config: EncoderConfig,
    dtype: torch.dtype,
    casts: Casts,
    tp_rank: int,
    tp: int,
    *,
    rank: int,
) -> Iterator[Chunk]:
    key, lead = _stacked(weight, config)
    whole = weight.megatron_shape
    whole_rows = weight.packs_rows and (weight.tp_dim != 1 or tp == 1)
    as_stored = whole_rows and all(folder.stored_dtype(folder.prefix + name) == dtype for name in weight.hf)
    read_part = folder.addresses if as_stored else partial(read_cast, folder, casts, dtype)

    def read(shape: tuple[int, ...], part: int | None) -> Values:
        if part is not None:
            rows = transforms.even_range(weight.hf_shapes[part][0], rank=tp_rank, world=tp)
            packed = read_part(folder.prefix + weight.hf[part], [rows])
        else:
            parts = read_slices(folder, weight, config, tp_rank=tp_rank, tp_size=tp, read=read_part)
            packed = pack(weight, parts, config, tp_size=tp)
        return Stored(folder.files, packed, shape, dtype) if as_stored else packed.reshape(shape)

    def chunk(start: int, length: int, part: int | None) -> Chunk:
        offsets, shape = [0] * len(whole), list(whole)
        if weight.tp_dim is not None:
            offsets[weight.tp_dim], shape[weight.tp_dim] = start, length
        layer = [] if weight.layer is None else [weight.layer]
        shape = [*[1] * len(lead), *shape]
        return Chunk(
            key=key,
            global_shape=(*lead, *whole),
            offsets=(*layer, *offsets),
            shape=tuple(shape),
            dtype=dtype,
            rank=rank,
            read=partial(read, tuple(shape), part),
        )

    if weight.kind == "gate_up":  # as in megatron-core's gated MLP, gate and up are separate runs of rows
        ffn = config.intermediate_size // tp
        for part in range(2):
            yield chunk(part * config.intermediate_size + tp_rank * ffn, ffn, part)
    elif weight.kind == "vocab":
        rows = transforms.padded_vocab_size(config.vocab_size, world=tp) // tp
        if tp_rank * rows < config.vocab_size:
            yield chunk(tp_rank * rows, min(rows, config.vocab_size - tp_rank * rows), None)
    else:
        length = whole[weight.tp_dim or 0] // tp
        yield chunk(tp_rank * length, length, None)


def kept_chunks(folder: HFFolder, names: list[str]) -> Iterator[Chunk]:
    """Yield HF tensors, stored unchanged, under :data:`KEPT`."""
    for name in names:
        shape = folder.shape(name)
        dtype = folder.tensor_dtype(name)
        yield Chunk(KEPT + name, shape, (0,) * len(shape), shape, dtype, 0, partial(folder.values, name, dtype))


def _stacked(weight: Weight, config: EncoderConfig) -> tuple[str, tuple[int, ...]]:
    """Return (key, leading axes) of a weight in the form that stacks layers of one kind into one tensor."""
    if weight.layer is None:
        return weight.megatron, ()
    return weight.megatron.replace(f"decoder.layers.{weight.layer}.", "decoder.layers."), (config.num_hidden_layers,)


# ---- checkpoint → HF parts


class CheckpointWeights:
    """The encoder's weights in a checkpoint, under any of the known naming forms.

    Layers may be stacked into one tensor (megatron-core's default) or have their own numbers, names may be bare or
    follow ``language_model.`` (Megatron-Bridge's VLM), gated MLPs may be one tensor or two, vocabularies padded or not.

    Raises:
        UserError: a weight is missing or misshapen, or some tensors belong to no encoder.
    """

    def __init__(self, reader: CheckpointReader, config: EncoderConfig) -> None:
        self.reader, self.config = reader, config
        embedding = "embedding.word_embeddings.weight"
        self._prefix = next((prefix for prefix in PREFIXES if prefix + embedding in reader), None)
        if self._prefix is None:
            raise UserError(
                f"{reader.path}: no tensor {embedding} (found {', '.join(reader.names()[:4]) or 'none'}, …); "
                f"wanted a checkpoint of this encoder"
            )
        self._check()

    def read(self, weight: Weight) -> Tensor:
        """Read the whole packed weight, ``weight.megatron_shape``."""
        tensor = self._read(weight, self.reader.read)
        assert tensor is not None
        return tensor

    def stored_dtype(self, weight: Weight) -> torch.dtype:
        """Return the stored dtype of a weight."""
        return self.reader.dtype(self._keys(weight)[0][0])

    def read_rows(self, weight: Weight, rows: Sequence[int]) -> Tensor:
        """Read only some rows of a weight outside the layers: ``[len(rows), …]``."""
        (key,), _ = self._keys(weight)
        return torch.cat([self.reader.read(key, [slice(row, row + 1)]) for row in rows])

    def _read(self, weight: Weight, read: Callable[..., Tensor | None]) -> Tensor | None:
        keys, layer = self._keys(weight)
        index = [] if layer is None else [slice(layer, layer + 1)]
        if weight.kind == "vocab":
            index.append(slice(0, self.config.vocab_size))
        parts = [part for key in keys if (part := read(key, index)) is not None]
        if len(parts) < len(keys):
            return None
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts, dim=parts[0].dim() - 2)
        return tensor if layer is None else tensor[0]

    def hf_parts(self, weight: Weight) -> tuple[Tensor, ...]:
        """Return the weight as HF's tensors, in the order of ``weight.hf``."""
        return unpack(weight, self.read(weight), self.config)

    @property
    def dtype(self) -> torch.dtype:
        """Return the stored dtype of the embedding."""
        return self.stored_dtype(next(mapping.weights(self.config)))

    def hf_values(self, dtype: torch.dtype, casts: Casts, prefix: str = "") -> Iterator[tuple[str, Values]]:
        """Yield all weights under their HF names, in the table's order, with one weight in memory at a time.

        Weights stored in ``dtype`` come as their places in files, the others as tensors cast to ``dtype``.
        """
        for weight in mapping.weights(self.config):
            read = partial(self.reader.addresses, dtype=dtype)
            rows = self._read(weight, read) if weight.packs_rows else None
            parts: tuple[Values, ...]
            if rows is None:
                parts = tuple(
                    casts(prefix + name, part, dtype)
                    for name, part in zip(weight.hf, self.hf_parts(weight), strict=True)
                )
            else:
                shaped = zip(unpack(weight, rows, self.config), weight.hf_shapes, strict=True)
                parts = tuple(Stored(self.reader.files, part, shape, dtype) for part, shape in shaped)
            for name, values in zip(weight.hf, parts, strict=True):
                yield prefix + name, values

    def temperature(self) -> float | None:
        """Return the temperature that training learned, or None where it was fixed."""
        name = f"{self._prefix}log_temperature"
        return float(self.reader.read(name).float().exp()) if name in self.reader else None

    def kept(self) -> list[str]:
        """Return the HF names of the tensors that are stored unchanged."""
        return [name.removeprefix(KEPT) for name in self.reader.names() if name.startswith(KEPT)]

    def _keys(self, weight: Weight) -> tuple[list[str], int | None]:
        """Return the checkpoint tensors that make up the weight, and its index in a stacked tensor."""
        stacked, lead = _stacked(weight, self.config)
        for name, layer in ((stacked, weight.layer if lead else None), (weight.megatron, None)):
            key = f"{self._prefix}{name}"
            if key in self.reader:
                return [key], layer
            if weight.kind == "gate_up" and f"{key}_w" in self.reader and f"{key}_v" in self.reader:
                return [f"{key}_w", f"{key}_v"], layer
        return [], None

    def _check(self) -> None:
        problems, used = [], set()
        for weight in mapping.weights(self.config):
            keys, layer = self._keys(weight)
            used.update(keys)
            if not keys:
                problems.append(f"{self._prefix}{weight.megatron}: missing; wanted shape {list(weight.megatron_shape)}")
                continue
            shapes = [self.reader.shape(key) for key in keys]
            axis = 0 if layer is None else 1
            found = (sum(shape[axis] for shape in shapes), *shapes[0][axis + 1 :])
            wanted = weight.megatron_shape
            if layer is not None and shapes[0][0] != self.config.num_hidden_layers:
                problems.append(f"{keys[0]}: found {shapes[0][0]} layers, wanted {self.config.num_hidden_layers}")
            elif found[1:] != wanted[1:] or (found[0] < wanted[0] if weight.kind == "vocab" else found[0] != wanted[0]):
                # padding rows may follow a vocabulary
                problems.append(f"{keys[0]}: found shape {list(found)}, wanted {list(weight.megatron_shape)}")
        problems += [
            f"{name}: not a tensor of this encoder (shape {list(self.reader.shape(name))})"
            for name in self.reader.names()
            if name not in used and not is_ignored(name)
        ]
        if problems:
            raise UserError(
                f"{self.reader.path}: the checkpoint does not fit its config: {listed(list(dict.fromkeys(problems)))}; "
                f"import the model again, or put the checkpoint's own run_config.yaml back"
            )
