"""Rows of the head's weight, as they lie in memory, times hidden vectors.

A tile is BLOCK_R rows. Rows are read where they are, gathered or not, once for all hidden vectors of a block, and
dequantised in registers. Two ways to multiply: `gemv` on the fp32 units, each row split over the lanes of a warp, for a
few vectors; `dot` on the tensor cores for more. Both add in fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

GROUP = tl.constexpr(128)  # columns of an int4 weight that share a scale
HALF = tl.constexpr(64)  # bytes of a group: its first half in low nibbles, its second in high ones


class Weight(NamedTuple):
    """The weight [V, D], or what stands for it. Strides are in elements."""

    data: tl.tensor  # pointer; fp8 as uint8
    stride: tl.tensor
    column_stride: tl.tensor
    scale: tl.tensor  # pointer to [V] fp32, or [V, groups] of int4; or None
    bias: tl.tensor  # pointer to [V], or None
    rows: tl.tensor  # pointer to [R] or [groups, R] int32, or None: all rows in order
    rows_stride: tl.tensor
    token_ids: tl.tensor  # pointer to [V] int32, or None
    height: tl.tensor  # V
    dim: tl.tensor  # D
    count: tl.tensor  # R


class Hidden(NamedTuple):
    """Hidden vectors [B, D], and the block of them that a program looks at."""

    data: tl.tensor  # pointer
    stride: tl.tensor
    column_stride: tl.tensor
    first: tl.tensor  # int64 index of the block's first vector
    size: tl.tensor  # B


class Tile(NamedTuple):
    """Rows start .. start+BLOCK_R-1 of the R rows."""

    start: tl.tensor  # int32
    row: tl.tensor  # [BLOCK_R] int64 row of the weight; 0 where it has none
    known: tl.tensor  # [BLOCK_R] int1, whether it has one
    id: tl.tensor  # [BLOCK_R] int32 token


@triton.jit
def tile_at(weight, start, group, BLOCK_R: tl.constexpr):
    """The tile of the rows that `group` looks at; a negative group has none."""
    at = start + tl.arange(0, BLOCK_R)
    inside = at < tl.where(group >= 0, weight.count, 0)
    row = at
    if weight.rows is not None:
        row = tl.load(weight.rows + group.to(tl.int64) * weight.rows_stride + at, mask=inside, other=-1)
    known = inside & (row >= 0) & (row < weight.height)
    row = tl.where(known, row, 0)
    id = row
    if weight.token_ids is not None:
        id = tl.load(weight.token_ids + row, mask=known, other=0)
    return Tile(start=start, row=row.to(tl.int64), known=known, id=id)


@triton.constexpr_function
def shift_of(format):
    """Power of two by which `decoded` values are too small."""
    return 256.0 if format == "fp8" else 1.0


@triton.jit
def decoded(raw, FORMAT: tl.constexpr):
    """Values of stored elements: exact in every float type, but for a factor of `shift_of`.

    The bits of e4m3 are those of an fp16 of another exponent bias. Converting them by hand needs no type that a GPU
    older than sm_89 lacks and that CDNA3 reads differently.
    """
    if FORMAT == "fp8":
        bits = raw.to(tl.uint16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        return tl.where((bits & 0x7F) == 0x7F, float("nan"), half)
    else:
        return raw


@triton.jit
def low_nibble(packed):
    """Values of the low nibbles of uint8 bytes."""
    return ((packed & 15).to(tl.int32) - 8).to(tl.float32)


@triton.jit
def vector_of(hidden, b, column, dim):
    """fp32 elements `column` of the block's vector b; 0 where there is none."""
    at = (hidden.first + b) * hidden.stride + column.to(tl.int64) * hidden.column_stride
    end = tl.where(hidden.first + b < hidden.size, dim, 0)
    return tl.load(hidden.data + at, mask=column < end, other=0.0).to(tl.float32)


@triton.jit
def block_of(hidden, column, dim, BLOCK_B: tl.constexpr, TYPE: tl.constexpr):
    """[BLOCK_B, columns] elements `column` of all vectors of the block, in the type that is multiplied."""
    b = hidden.first + tl.arange(0, BLOCK_B)
    at = b[:, None] * hidden.stride + column.to(tl.int64)[None, :] * hidden.column_stride
    inside = (b < hidden.size)[:, None] & (column < dim)[None, :]
    return tl.load(hidden.data + at, mask=inside, other=0.0).to(TYPE)


@triton.jit
def in_lane(products, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK_R, BLOCK_D / 8] sums of eight neighbours, which one lane holds: no lane talks to another."""
    return tl.sum(tl.reshape(products, [BLOCK_R, BLOCK_D // 8, 8]), 2)


@triton.jit
def gemv(hidden, weight, tile, FORMAT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr,
         BLOCK_D: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """[BLOCK_B, BLOCK_R] products on the fp32 units; BLOCK_D stored columns of each row at a time.

    A lane keeps a sum for each row and vector over the whole row; lanes meet once, at its end.
    """
    base = weight.data + tile.row[:, None] * weight.stride
    sums = ()
    for _ in tl.static_range(BLOCK_B):
        sums += (tl.zeros([BLOCK_R, BLOCK_D // 8], tl.float32),)
    stored = weight.dim
    if FORMAT == "int4":
        stored = tl.cdiv(weight.dim, GROUP) * HALF
    for start in tl.range(0, stored, BLOCK_D, num_stages=STAGES):
        column = tl.arange(0, BLOCK_D) + start
        inside = column < stored
        at = column.to(tl.int64)[None, :] * weight.column_stride
        raw = tl.load(base + at, mask=tile.known[:, None] & inside[None, :], other=0)
        new = ()
        if FORMAT == "int4":
            low, high = low_nibble(raw), low_nibble(raw >> 4)
            early = column // HALF * GROUP + column % HALF
            late = early + HALF
            group = tl.arange(0, BLOCK_D // 8) // 8 + start // HALF
            groups = tl.cdiv(weight.dim, GROUP)
            scale = tl.load(
                weight.scale + tile.row[:, None] * groups + group[None, :],
                mask=tile.known[:, None] & (group < groups)[None, :], other=0.0,
            )  # fmt: skip
            for b in tl.static_range(BLOCK_B):
                x = vector_of(hidden, b, early, weight.dim)
                y = vector_of(hidden, b, late, weight.dim)
                part = in_lane(low * x[None, :] + high * y[None, :], BLOCK_R, BLOCK_D)
                new += (sums[b] + part * scale,)
        else:
            values = decoded(raw, FORMAT).to(tl.float32)
            for b in tl.static_range(BLOCK_B):
                x = vector_of(hidden, b, column, weight.dim)
                new += (sums[b] + in_lane(values * x[None, :], BLOCK_R, BLOCK_D),)
        sums = new
    products = tl.zeros([BLOCK_B, BLOCK_R], tl.float32)
    for b in tl.static_range(BLOCK_B):
        products = tl.where((tl.arange(0, BLOCK_B) == b)[:, None], tl.sum(sums[b], 1)[None, :], products)
    return products


@triton.jit
def dot(hidden, weight, tile, FORMAT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr,
        BLOCK_D: tl.constexpr, STAGES: tl.constexpr, TYPE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """[BLOCK_B, BLOCK_R] products on the tensor cores, operands of TYPE.

    The vectors are the rows of the product: what follows reduces over the tile, and in the accumulators of an MMA the
    neighbours along a row lie in one thread and in the three beside it.
    """
    base = weight.data + tile.row[None, :] * weight.stride
    products = tl.zeros([BLOCK_B, BLOCK_R], tl.float32)
    if FORMAT == "int4":
        groups = tl.cdiv(weight.dim, GROUP)
        byte = tl.arange(0, HALF)
        for group in tl.range(0, groups, num_stages=STAGES):
            at = (byte + group * HALF).to(tl.int64)[:, None] * weight.column_stride
            raw = tl.load(base + at, mask=tile.known[None, :], other=0)
            scale = tl.load(weight.scale + tile.row * groups + group, mask=tile.known, other=0.0)
            x = block_of(hidden, byte + group * GROUP, weight.dim, BLOCK_B, TYPE)
            y = block_of(hidden, byte + group * GROUP + HALF, weight.dim, BLOCK_B, TYPE)
            part = tl.dot(x, low_nibble(raw).to(TYPE), input_precision=PRECISION)
            part = tl.dot(y, low_nibble(raw >> 4).to(TYPE), part, input_precision=PRECISION)
            products += part * scale[None, :]
    else:
        for start in tl.range(0, weight.dim, BLOCK_D, num_stages=STAGES):
            column = tl.arange(0, BLOCK_D) + start
            at = column.to(tl.int64)[:, None] * weight.column_stride
            raw = tl.load(base + at, mask=tile.known[None, :] & (column < weight.dim)[:, None], other=0)
            x = block_of(hidden, column, weight.dim, BLOCK_B, TYPE)
            products = tl.dot(x, decoded(raw, FORMAT).to(TYPE), products, input_precision=PRECISION)
    return products


@triton.jit
def finished(products, weight, tile, member, FORMAT: tl.constexpr):
    """fp32 logits of [BLOCK_B, BLOCK_R] products; -inf for rows that are unknown and vectors that are no member."""
    logits = products
    if FORMAT == "int4":
        pass  # its scales are inside
    elif weight.scale is not None:
        scale = tl.load(weight.scale + tile.row, mask=tile.known, other=0.0) * shift_of(FORMAT)
        logits = logits * scale[None, :]
    if weight.bias is not None:
        logits += tl.load(weight.bias + tile.row, mask=tile.known, other=0.0).to(tl.float32)[None, :]
    return tl.where(tile.known[None, :] & member[:, None], logits, -float("inf"))
