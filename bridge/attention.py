"""Core attention: every token sees every token of its own sequence, and nothing else.

Rope and the Llama-4 query scale are applied here rather than by megatron-core's attention module, because both depend
on the position *within the sequence*, padded or packed: megatron-core's packed rope maps by offset in the buffer, and
it has no query scale. The tables are made once per micro-batch and shared by all layers; under selective recompute
they are not kept per layer either.

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
from megatron_embed.bridge.sequences import Run, TokenBatch

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # older than torch 2.10
    varlen_attn = None  # type: ignore[assignment]
_VARLEN_TAKES_GROUPS = varlen_attn is not None and "enable_gqa" in inspect.signature(varlen_attn).parameters


@dataclass
class SequenceInfo(PackedSeqParams):
    """What attention must know of a micro-batch. Travels to every layer in megatron-core's ``packed_seq_params``.

    ``qkv_format`` stays ``"sbhd"`` for packed rows too, so that megatron-core passes tensors through unchanged.

    Attributes:
        cos, sin: ``[S, B or 1, 1, D]`` in the activations' dtype.
        scale: ``[S, B or 1, 1, 1]``, or None where it is 1 everywhere.
        key_mask: ``[B, 1, 1, S]``, True on real tokens, or None.
        runs: for a packed row, runs of equally long neighbours; else None.
        keys: for a packed row under context parallelism, the part of the row that this rank's queries look at.
    """

    cos: Tensor | None = None
    sin: Tensor | None = None
    scale: Tensor | None = None
    key_mask: Tensor | None = None
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
            columns: this context-parallel rank's part of the rows; its tables cover these, its masks the whole.
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
            runs=runs,
            keys=keys,
        )

    @cached_property
    def thd(self) -> PackedSeqParams:
        """The same packed row as kernels for ragged sequences want it; made once, for all layers."""
        assert self.runs is not None
        assert self.cos is not None

        def ends(lengths: list[int]) -> Tensor:
            return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=self.cos.device)  # type: ignore[union-attr]

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
    """The runs whose queries lie in ``columns``, and where in the row their keys lie."""
    low, high, _ = columns.indices(batch.input_ids.shape[1])
    # The tail that fills the row up attends to itself: a softmax over nothing would be NaN.
    lengths = batch.lengths + ((batch.padding,) if batch.padding else ())
    ends = list(accumulate(lengths))
    inside = [(max(low, end - n), min(high, end), end - n, end) for n, end in zip(lengths, ends, strict=True)]
    inside = [item for item in inside if item[0] < item[1]]
    shapes = [(stop - start, key_stop - key_start) for start, stop, key_start, key_stop in inside]
    runs = tuple(Run(len(list(group)), queries, keys) for (queries, keys), group in groupby(shapes))
    return runs, slice(inside[0][2], inside[-1][3])


def _positions(batch: TokenBatch) -> Tensor:
    """``[1, S]`` where all rows count from their first column, so that one table serves them all; else ``[B, S]``."""
    if batch.packed or (batch.mask is not None and not bool(batch.mask[:, 0].all())):
        return batch.positions
    return torch.arange(batch.positions.shape[1], device=batch.positions.device)[None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return ``x cos + rotate_half(x) sin`` (Su et al. 2021, HF's half layout) of ``x [..., D]``; never in place.

    Recomputation needs the input as it was.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def gather_keys_and_values(key: Tensor, value: Tensor, info: SequenceInfo) -> tuple[Tensor, Tensor]:
    """Whole rows of keys and values from the context-parallel ranks' slices ``[S / CP, B, G, D]``.

    Without a causal mask every rank has the same work whatever it holds, so contiguous slices and one all-gather (its
    backward a reduce-scatter) are exact and need no zigzag.
    """
    group = parallel_state.get_context_parallel_group()
    if group.size() == 1:
        return key, value
    both = torch.cat((key, value), dim=-1)
    both = gather_from_sequence_parallel_region(both, tensor_parallel_output_grad=True, group=group)
    key, value = both[info.keys].chunk(2, dim=-1)
    return key, value


class CoreAttention(MegatronModule):
    """Place queries and keys, gather keys and values over context-parallel ranks, and attend.

    This much is the same for every kind of layers; each kind has its own :meth:`attend`.
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

    #: how one tensor of queries or keys is rotated
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
        """``[S, B, H, D]``, ``[S, B, G, D]`` twice → ``[S, B, H * D]``."""
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
        """Attend with placed queries and whole rows of keys and values; shapes as in :meth:`forward`."""
        raise NotImplementedError


class SdpaAttention(CoreAttention):
    """Attention by torch's scaled dot product attention."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, info: SequenceInfo) -> Tensor:
        """See :meth:`CoreAttention.attend`."""
        if info.runs is None:
            return self._padded(query, key, value, info.key_mask)
        return self.attend_packed(query, key, value, info)

    def attend_packed(self, query: Tensor, key: Tensor, value: Tensor, info: SequenceInfo) -> Tensor:
        """Call the kernel once for each run of equally long neighbours; `split` is cheap backward, slicing is not."""
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
        """``[B, H, S, D]``, ``[B, G, S, D]`` twice → ``[B, H, S, D]``."""
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
    """Attention on CUDA without Transformer Engine: packed rows in 16 bits go through one call of FlashAttention."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        # torch's kernel for ragged sequences takes 16 bits only
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
