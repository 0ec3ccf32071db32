"""Core attention: each token attends to every token of its own sequence and to no other token.

This module applies rope and the Llama-4 query scale in place of megatron-core's attention module, because both depend
on the position *within the sequence*, padded or packed: megatron-core's packed rope maps by offset in the buffer, and
it has no query scale. All layers share the tables, which are made once per micro-batch; selective recompute does not
keep them per layer either.

Legend: ``S`` tokens of a column, ``B`` rows, ``H`` heads (``G`` KV heads) on this tensor-parallel rank, ``D`` head_dim.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_embed.bridge.config import EncoderConfig
from megatron_embed.bridge.rope import query_scale, rope_tables
from megatron_embed.bridge.sequences import Run, TokenBatch, to_device

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # older than torch 2.10
    varlen_attn = None  # type: ignore[assignment]
_VARLEN_TAKES_GROUPS = varlen_attn is not None and "enable_gqa" in inspect.signature(varlen_attn).parameters


@dataclass
class SequenceInfo(PackedSeqParams):
    """Facts about a micro-batch that attention needs; every layer gets them as megatron-core's ``packed_seq_params``.

    ``qkv_format`` stays ``"sbhd"`` for packed rows too, so that megatron-core passes tensors through unchanged.

    Attributes:
        cos, sin: ``[S, B or 1, 1, D]`` in the activations' dtype.
        scale: ``[S, B or 1, 1, 1]``, or None where it is 1 everywhere.
        key_mask: ``[B, 1, 1, S]``, True on real tokens, or None. Whole rows, also under context parallelism.
        query_mask: this rank's columns of ``key_mask``, or None.
        runs: runs of equally long neighbours of a packed row; None for padded rows.
        keys: the part of the row that this rank's queries attend to. It is less than the whole row only for a packed
            row under context parallelism.
    """

    cos: Tensor | None = None
    sin: Tensor | None = None
    scale: Tensor | None = None
    key_mask: Tensor | None = None
    query_mask: Tensor | None = None
    runs: tuple[Run, ...] | None = None
    keys: slice = field(default_factory=lambda: slice(None))

    @classmethod
    def of(
        cls,
        batch: TokenBatch,
        config: EncoderConfig,
        frequencies: Tensor,
        factor: float,
        dtype: torch.dtype,
        columns: slice = slice(None),
    ) -> SequenceInfo:
        """Make the tables of a micro-batch.

        Args:
            columns: this context-parallel rank's part of the rows. The tables cover this part, the masks whole rows.
        """
        positions_SB = _positions(batch)[:, columns].transpose(0, 1)
        cos, sin = rope_tables(positions_SB, frequencies, factor, dtype=dtype)
        scale = None
        if batch.max_length > config.rope_parameters.get("original_max_position_embeddings", float("inf")):
            scale = query_scale(positions_SB, config, dtype=dtype)
        runs, keys = _runs(batch, columns) if batch.packed else (None, slice(None))
        return cls(
            qkv_format="sbhd",
            cos=cos.unsqueeze(2),
            sin=sin.unsqueeze(2),
            scale=None if scale is None else scale[..., None, None],
            key_mask=None if batch.mask is None else batch.mask[:, None, None, :],
            query_mask=None if batch.mask is None else batch.mask[:, None, None, columns],
            runs=runs,
            keys=keys,
        )

    @cached_property
    def thd(self) -> PackedSeqParams:
        """Return the packed row in the form that kernels for ragged sequences take; made once, for all layers."""
        assert self.runs is not None
        assert self.cos is not None

        def ends(lengths: list[int]) -> Tensor:
            assert self.cos is not None
            return to_device([0, *accumulate(lengths)], self.cos.device, dtype=torch.int32)

        queries = [run.queries for run in self.runs for _ in range(run.sequences)]
        keys = [run.keys for run in self.runs for _ in range(run.sequences)]
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=ends(queries),
            cu_seqlens_kv=ends(keys),
            max_seqlen_q=max(queries),
            max_seqlen_kv=max(keys),
        )


def _runs(batch: TokenBatch, columns: slice) -> tuple[tuple[Run, ...], slice]:
    """Return the runs whose queries lie in ``columns``, and the slice of the row that holds their keys."""
    low, high, _ = columns.indices(batch.input_ids.shape[1])
    # The tail that fills up the row attends to itself: a softmax over nothing would be NaN.
    lengths = batch.lengths + ((batch.padding,) if batch.padding else ())
    ends = list(accumulate(lengths))
    inside = [(max(low, end - n), min(high, end), end - n, end) for n, end in zip(lengths, ends, strict=True)]
    inside = [item for item in inside if item[0] < item[1]]
    shapes = [(stop - start, key_stop - key_start) for start, stop, key_start, key_stop in inside]
    runs = tuple(Run(len(list(group)), queries, keys) for (queries, keys), group in groupby(shapes))
    return runs, slice(inside[0][2], inside[-1][3])


def _positions(batch: TokenBatch) -> Tensor:
    """Return ``[1, S]`` where all rows count from their first column (one table serves them all), else ``[B, S]``."""
    if batch.packed or batch.left_padded:
        return batch.positions
    return torch.arange(batch.positions.shape[1], device=batch.positions.device)[None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return ``x cos + rotate_half(x) sin`` of ``x [..., D]`` (Su et al. 2021, HF's half layout), never in place.

    Recomputation needs the unchanged input.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def gather_keys_and_values(key: Tensor, value: Tensor, info: SequenceInfo) -> tuple[Tensor, Tensor]:
    """Gather whole rows of keys and values from the context-parallel ranks' slices ``[S / CP, B, G, D]``.

    Without a causal mask all ranks have equal work, whichever slice they hold. Contiguous slices and one all-gather
    (its backward is a reduce-scatter) are therefore exact and need no zigzag.
    """
    group = parallel_state.get_context_parallel_group()
    if group.size() == 1:
        return key, value
    both = torch.cat((key, value), dim=-1)
    both = gather_from_sequence_parallel_region(both, tensor_parallel_output_grad=True, group=group)
    key, value = both[info.keys].chunk(2, dim=-1)
    return key, value


class CoreAttention(MegatronModule):
    """The part of core attention that all kinds of layers share.

    It rotates queries and keys, scales the queries, gathers keys and values over context-parallel ranks, and calls
    :meth:`attend`, which each kind of layers defines.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_unused: Any,
    ):
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.padding, "the encoder is bidirectional"
        assert attention_type == "self"
        assert config.attention_dropout == 0
        self.softmax_scale = softmax_scale

    #: function that rotates one tensor of queries or keys
    rotate = staticmethod(rotate)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend with queries ``[S, B, H, D]`` and keys and values ``[S, B, G, D]``; return ``[S, B, H * D]``."""
        info = packed_seq_params
        assert isinstance(info, SequenceInfo), "the encoder passes a SequenceInfo to every layer"
        assert info.cos is not None
        assert info.sin is not None
        query, key = self.rotate(query, info.cos, info.sin), self.rotate(key, info.cos, info.sin)
        if info.scale is not None:
            query = query * info.scale
        key, value = gather_keys_and_values(key, value, info)
        return self.attend(query, key, value, info)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, info: SequenceInfo) -> Tensor:
        """Attend with rotated, scaled queries and whole rows of keys and values; shapes as in :meth:`forward`."""
        raise NotImplementedError


class SdpaAttention(CoreAttention):
    """Attention by torch's scaled dot product attention (SDPA)."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, info: SequenceInfo) -> Tensor:
        """See :meth:`CoreAttention.attend`."""
        if info.runs is None:
            return self._padded(query, key, value, info.key_mask)
        return self.attend_packed(query, key, value, info)

    def attend_packed(self, query: Tensor, key: Tensor, value: Tensor, info: SequenceInfo) -> Tensor:
        """Call the kernel once per run of equally long neighbours. `split` has a cheap backward, slicing has not."""
        runs = info.runs
        assert runs is not None
        queries = query.squeeze(1).split([run.sequences * run.queries for run in runs])
        keys, values = (x.squeeze(1).split([run.sequences * run.keys for run in runs]) for x in (key, value))
        outputs = []
        for q, k, v, run in zip(queries, keys, values, runs, strict=True):
            q = q.view(run.sequences, run.queries, *q.shape[1:]).transpose(1, 2)
            k, v = (x.view(run.sequences, run.keys, *x.shape[1:]).transpose(1, 2) for x in (k, v))
            outputs.append(self._scaled_dot_product(q, k, v).transpose(1, 2).reshape(run.sequences * run.queries, -1))
        return torch.cat(outputs).unsqueeze(1)

    def _padded(self, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        output_BHSD = self._scaled_dot_product(query, key, value, key_mask)
        return output_BHSD.permute(2, 0, 1, 3).flatten(2)

    def _scaled_dot_product(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend with queries ``[B, H, S, D]`` and keys and values ``[B, G, S, D]``; return ``[B, H, S, D]``."""
        grouped = query.shape[1] != key.shape[1]
        if grouped and mask is not None:
            # CUDA kernels take grouped heads or a mask, not both.
            repeats = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
            grouped = False
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=self.softmax_scale, enable_gqa=grouped
        )


class CudaAttention(SdpaAttention):
    """Attention on CUDA without Transformer Engine: one call of FlashAttention computes a packed row in 16 bits."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        # torch's kernel for ragged sequences takes only 16-bit tensors
        self.ragged = _VARLEN_TAKES_GROUPS and config.params_dtype in (torch.bfloat16, torch.float16)

    def attend_packed(self, query: Tensor, key: Tensor, value: Tensor, info: SequenceInfo) -> Tensor:
        """See :meth:`CoreAttention.attend`."""
        if not self.ragged:
            return super().attend_packed(query, key, value, info)
        thd = info.thd
        output_THD = varlen_attn(
            *(x.squeeze(1) for x in (query, key, value)),
            thd.cu_seqlens_q,
            thd.cu_seqlens_kv,
            thd.max_seqlen_q,
            thd.max_seqlen_kv,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return output_THD.flatten(1).unsqueeze(1)
