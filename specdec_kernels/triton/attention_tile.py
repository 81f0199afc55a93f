"""Softmax attention of one tile of query rows, block after block, and what becomes of its result."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Cache(NamedTuple):
    """One KV head of both caches; offsets are in elements, of a request (dense) or a block (paged), then of a slot."""

    key_data: tl.tensor
    key_outer: tl.tensor
    key_slot: tl.tensor
    key_column: tl.tensor
    value_data: tl.tensor
    value_outer: tl.tensor
    value_slot: tl.tensor
    value_column: tl.tensor
    table: tl.tensor  # [B, M] int32, or None: dense
    table_row: tl.tensor
    table_column: tl.tensor
    blocks: tl.tensor


class Result(NamedTuple):
    """Where rows go; dense."""

    out: tl.tensor  # [N, Hq, Dv]
    lse: tl.tensor  # [N, Hq] fp32, or None
    sinks: tl.tensor  # [Hq], or None
    v_scale: tl.tensor  # [Hkv], or None
    heads: tl.tensor  # Hq
    columns: tl.tensor  # Dv


@triton.jit
def place_of(cache, request, slot, exists, PAGE: tl.constexpr):
    """(request or block, slot in it) of logical slots; both int64, both inside the cache."""
    if cache.table is None:
        return request.to(tl.int64), slot.to(tl.int64)
    else:
        entry = request.to(tl.int64) * cache.table_row + (slot // PAGE).to(tl.int64) * cache.table_column
        block = tl.load(cache.table + entry, mask=exists, other=0)
        block = tl.minimum(tl.maximum(block, 0), cache.blocks - 1)
        return block.to(tl.int64), (slot % PAGE).to(tl.int64)


@triton.jit
def widened(x, FORMAT: tl.constexpr, dtype: tl.constexpr):
    """Cached numbers in the dtype that is multiplied; fp8 comes in bytes, which not every GPU can convert."""
    if FORMAT == "native e4m3":
        return x.to(tl.float8e4nv, bitcast=True).to(dtype)
    elif FORMAT == "native e5m2":
        return x.to(tl.float8e5, bitcast=True).to(dtype)
    elif FORMAT == "e5m2":
        return (x.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(dtype)
    elif FORMAT == "e4m3":
        bits = x.to(tl.uint16)
        # fp16 has the same layout with one exponent bit more, whose bias is larger by 8: NaN is the one exception.
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        half = tl.where((bits & 0x7F) == 0x7F, 0x7E00, half).to(tl.uint16)
        return (half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0).to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def load_slots(
    base, offset, column_stride, exists, columns, FORMAT: tl.constexpr, WIDTH: tl.constexpr, dtype: tl.constexpr
):
    """[slots, WIDTH] of a cache: 0 behind its columns and in slots that are not to be read, whatever these hold."""
    column = tl.arange(0, WIDTH)
    pointers = base + offset[:, None] + column[None, :].to(tl.int64) * column_stride
    return widened(tl.load(pointers, mask=exists[:, None] & (column < columns)[None, :], other=0), FORMAT, dtype)


@triton.jit
def absorb(query, keys, values, seen, acc, peak, total, scale, softcap, PRECISION: tl.constexpr):
    """One block of online softmax; scores, and with them `peak`, are logarithms to base 2.

    Args:
        query: [rows, D].
        keys, values: [slots, D], [slots, Dv].
        seen: [rows, slots] or [1, slots] bool.
        acc, peak, total: [rows, Dv], [rows], [rows] fp32, the state.
        scale: on q.k, log2(e) included where there is no softcap.
        softcap: None: off.
    """
    scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale
    if softcap is not None:
        # tanh by an exponential that cannot overflow.
        decay = tl.exp(-2.0 * tl.abs(scores) / softcap)
        capped = (1.0 - decay) / (1.0 + decay) * (softcap * LOG2_E)
        scores = tl.where(scores < 0, -capped, capped)
    scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, 1))
    shift = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(peak - shift)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * decay[:, None], input_precision=PRECISION)
    return acc, higher, total


@triton.jit
def write_rows(result, acc, peak, total, row, entry, head, GROUP: tl.constexpr):
    """Divide by the softmax's sum, in which the sink has a share, and store the rows of one KV head.

    Args:
        row: [rows] of the entry: node times GROUP plus the query head of the KV head.
    """
    node = row // GROUP
    exists = node < entry.size
    query_head = head * GROUP + row % GROUP
    shift = tl.where(peak == float("-inf"), 0.0, peak)
    if result.sinks is not None:
        sink = tl.load(result.sinks + query_head, mask=exists, other=0).to(tl.float32) * LOG2_E
        higher = tl.maximum(peak, sink)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        decay = tl.exp2(peak - shift)
        total = total * decay + tl.exp2(sink - shift)
        acc = acc * decay[:, None]
    sound = node < entry.nodes
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    acc = acc / total[:, None]  # a row that sees nothing is 0
    if result.v_scale is not None:
        acc *= tl.load(result.v_scale + head).to(tl.float32)
    # What stands in rows of no sound node is not their own: it may be NaN.
    acc = tl.where(sound[:, None], acc, 0.0)
    at = (entry.start + node).to(tl.int64) * result.heads + query_head
    column = tl.arange(0, acc.shape[1])
    inside = exists[:, None] & (column < result.columns)[None, :]
    tl.store(
        result.out + at[:, None] * result.columns + column[None, :], acc.to(result.out.dtype.element_ty), mask=inside
    )
    if result.lse is not None:
        lse = tl.where(sound & (nothing == 0), (shift + tl.log2(total)) * LN_2, float("-inf"))
        tl.store(result.lse + at, lse, mask=exists)


@triton.jit
def clear_nodes(out, lse, first, end, heads, columns, BLOCK: tl.constexpr):
    """Zeros, and lse -inf, for the nodes first .. end-1, which no request has; all programs take turns."""
    lane = tl.arange(0, BLOCK)
    node = (first + tl.program_id(0)).to(tl.int64)
    while node < end:
        at = node * heads
        for begin in range(0, heads * columns, BLOCK):
            inside = begin + lane < heads * columns
            tl.store(out + at * columns + begin + lane, tl.zeros((BLOCK,), out.dtype.element_ty), mask=inside)
        if lse is not None:
            for begin in range(0, heads, BLOCK):
                tl.store(lse + at + begin + lane, float("-inf"), mask=begin + lane < heads)
        node += tl.num_programs(0)
