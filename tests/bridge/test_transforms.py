"""Packing, splitting and padding: each pair of inverses, for any head counts, sizes and tensor-parallel sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.megatron import merge_tp, split_tp, unpad_vocab
from torch import Tensor

from megatron_embed.bridge import transforms as tf

sizes = st.integers(1, 5)
settings.register_profile("ours", deadline=None, max_examples=60)
settings.load_profile("ours")


def numbered(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def qkv(groups: int, queries: int, head_dim: int, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = numbered((groups * queries + 2 * groups) * head_dim, hidden).split(
        [groups * queries * head_dim, groups * head_dim, groups * head_dim]
    )
    return q, k, v


@given(groups=sizes, queries=sizes, head_dim=sizes, hidden=sizes)
def test_qkv_there_and_back(groups: int, queries: int, head_dim: int, hidden: int) -> None:
    parts = qkv(groups, queries, head_dim, hidden)
    packed = tf.pack_qkv(*parts, groups=groups, head_dim=head_dim)
    for part, back in zip(parts, tf.unpack_qkv(packed, groups=groups, head_dim=head_dim), strict=True):
        assert torch.equal(part, back)


def test_qkv_layout_is_megatrons() -> None:
    """Two groups of two queries, head_dim 1: q0 q1 k0 v0 q2 q3 k1 v1."""
    q, k, v = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([[10.0], [11.0]]), torch.tensor([[20.0], [21.0]])
    packed = tf.pack_qkv(q, k, v, groups=2, head_dim=1)
    assert packed.flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


@given(tp=sizes, groups_each=sizes, queries=sizes, head_dim=sizes)
def test_packing_slices_gives_the_slice_of_the_packed(tp: int, groups_each: int, queries: int, head_dim: int) -> None:
    groups = tp * groups_each
    parts = qkv(groups, queries, head_dim, 3)
    whole = tf.pack_qkv(*parts, groups=groups, head_dim=head_dim)
    slices = zip(*(split_tp(part, dim=0, world=tp) for part in parts), strict=True)
    packed = [tf.pack_qkv(*rank, groups=groups_each, head_dim=head_dim) for rank in slices]
    assert torch.equal(merge_tp(packed, dim=0), whole)


@given(ffn=sizes, hidden=sizes)
def test_gate_up_there_and_back(ffn: int, hidden: int) -> None:
    gate, up = numbered(2 * ffn, hidden).split(ffn)
    back = tf.unpack_gate_up(tf.pack_gate_up(gate, up))
    assert torch.equal(back[0], gate)
    assert torch.equal(back[1], up)


@given(tp=sizes, rows=sizes, columns=sizes, dim=st.sampled_from([0, 1, None]))
def test_split_and_merge(tp: int, rows: int, columns: int, dim: int | None) -> None:
    full = numbered(rows * tp, columns * tp)
    slices = split_tp(full, dim=dim, world=tp)
    assert len(slices) == tp
    assert torch.equal(merge_tp(slices, dim=dim), full)
    if dim is not None:
        ranges = [tf.even_range(full.shape[dim], rank=rank, world=tp) for rank in range(tp)]
        assert all(torch.equal(full[r] if dim == 0 else full[:, r], s) for r, s in zip(ranges, slices, strict=True))


def test_uneven_split_is_refused() -> None:
    with pytest.raises(ValueError, match="7 cannot be split evenly over 2"):
        tf.even_range(7, rank=0, world=2)


@given(vocab=st.integers(1, 60), tp=sizes)
def test_vocabulary_padding(vocab: int, tp: int) -> None:
    rows = tf.padded_vocab_size(vocab, world=tp)
    assert rows % tp == 0
    assert vocab <= rows < vocab + tp
    table = numbered(vocab, 3) + 1
    padded = tf.pad_vocab(table, rows=rows)
    assert padded.shape == (rows, 3)
    assert not padded[vocab:].any()
    assert torch.equal(unpad_vocab(padded, vocab_size=vocab), table)


@given(scale=st.floats(2**-14, 8.0, width=32))
def test_fp8_is_the_product_rounded_once(scale: float) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    every = every[~every.float().isnan()]
    got = tf.dequantize_fp8(every, torch.tensor([scale]))
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, (every.double() * torch.tensor(scale).double()).float().bfloat16())
