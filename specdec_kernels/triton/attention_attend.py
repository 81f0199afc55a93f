"""The kernel of tree attention: every program works through items of the plan."""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_plan import (
    SHARED,
    SOURCE,
    TREE,
    Batch,
    find,
    load_entry,
    plan_of,
    splits_of,
    sum_before,
    tiles_of,
)
from .attention_tile import LOG2_E, Cache, Result, absorb, clear_nodes, load_slots, place_of, write_rows


@triton.jit
def attend_prefix(
    query, acc, peak, total, cache, request, entry, position, sound, first, last, scale, batch, softcap, D, DV,
    PAGE: tl.constexpr, FORMAT: tl.constexpr, PRECISION: tl.constexpr, SLOTS: tl.constexpr, WIDE: tl.constexpr,
    WIDE_V: tl.constexpr,
):  # fmt: skip
    """Blocks first .. last-1 of the committed slots that the entry reads, for all of its rows."""
    source, shared = request, 0
    if batch.shares is not None:
        if request < batch.B:
            source = tl.load(batch.shares + SOURCE * batch.B + request)
            shared = tl.load(batch.shares + SHARED * batch.B + request)
        else:  # a group reads the slots of the request it is named after
            request -= batch.B
            source = request
    lane = tl.arange(0, SLOTS)
    floor = -1
    if position is not None:  # slots that no row of the tile sees are not loaded: a weight of 0 keeps a NaN
        floor = tl.min(tl.where(sound, position, 2147483647), 0) - batch.window
    for block in range(first, last):
        slot = entry.low + block * SLOTS + lane
        whose = request
        if batch.shares is not None:
            slot += tl.where(slot >= entry.hole, entry.hole_end - entry.hole, 0)
            whose = tl.where(slot < shared, source, request)
        exists = (slot < entry.prefix) & (slot > floor)
        outer, inner = place_of(cache, whose, slot, exists, PAGE)
        keys = load_slots(
            cache.key_data, outer * cache.key_outer + inner * cache.key_slot, cache.key_column, exists, D,
            FORMAT, WIDE, query.dtype,
        )  # fmt: skip
        values = load_slots(
            cache.value_data, outer * cache.value_outer + inner * cache.value_slot, cache.value_column, exists, DV,
            FORMAT, WIDE_V, query.dtype,
        )  # fmt: skip
        seen = exists[None, :]
        if position is not None:
            seen = seen & (position[:, None] - slot[None, :] < batch.window)
        acc, peak, total = absorb(query, keys, values, seen, acc, peak, total, scale, softcap, PRECISION)
    return acc, peak, total


@triton.jit
def attend_tree(
    query, acc, peak, total, cache, request, entry, row_node, depth, first, last, scale, batch, softcap, D, DV,
    depths, bits, words,
    PAGE: tl.constexpr, FORMAT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr,
):  # fmt: skip
    """Blocks first .. last-1 of the tree's own slots; the bits of a block are one half of a word."""
    lane = tl.arange(0, TREE)
    bits_at = bits + (entry.start + row_node).to(tl.int64) * words
    for block in range(first, last):
        node = block * TREE + lane
        known = row_node < tl.where(block < words, entry.nodes, 0)
        seen_bits = tl.load(bits_at + block, mask=known, other=0)
        seen = ((seen_bits[:, None] >> lane[None, :]) & 1) != 0
        seen = seen & (node < entry.nodes)[None, :]
        if depth is not None:
            # Positions, not slots: siblings stand at different slots but at one distance.
            below = tl.load(depths + entry.start + node, mask=node < entry.nodes, other=0)
            seen = seen & (depth[:, None] - below[None, :] < batch.window)
        wanted = tl.max(seen.to(tl.int32), 0) != 0
        if tl.max(wanted.to(tl.int32), 0) != 0:
            slot = entry.prefix + node
            outer, inner = place_of(cache, request, slot, wanted, PAGE)
            keys = load_slots(
                cache.key_data, outer * cache.key_outer + inner * cache.key_slot, cache.key_column, wanted, D, FORMAT,
                WIDE, query.dtype,
            )  # fmt: skip
            values = load_slots(
                cache.value_data, outer * cache.value_outer + inner * cache.value_slot, cache.value_column, wanted, DV,
                FORMAT, WIDE_V, query.dtype,
            )  # fmt: skip
            acc, peak, total = absorb(query, keys, values, seen, acc, peak, total, scale, softcap, PRECISION)
    return acc, peak, total


@triton.jit(do_not_specialize=["N", "B", "max_nodes", "room", "window", "programs", "least", "capacity", "blocks"])
def attend_kernel(
    query,  # [N, Hq, D]
    key_cache,  # [B, Hkv, L, D] or [blocks, PAGE, Hkv, D]
    value_cache,  # the same with Dv
    depths,  # [N] int32, or None: no window
    bits,  # [N, words] int32, the halves of the words that say who sees whom in a tree
    cu_nodes,  # [B+1] int32
    prefix_lens,  # [B] int32
    block_table,  # [B, M] int32, or None: dense caches
    shares,  # [FIELDS, B] int32 of sharing_kernel, or None
    order,  # [N] int32 of sharing_kernel, or None
    reach,  # [N] int32 of sharing_kernel, or None
    sinks,  # [Hq], or None
    k_scale,  # [Hkv], or None
    v_scale,  # [Hkv], or None
    out,  # [N, Hq, Dv]
    lse,  # [N, Hq] fp32, or None
    partial,  # [capacity, ROWS, Dv] fp32, sums of splits; None where nothing is split
    partial_sums,  # [capacity, 2, ROWS] fp32, peaks and sums of their softmax; None likewise
    scale,
    softcap,  # fp32; None: off
    N,
    B,
    heads,  # Hkv
    D,
    DV,
    max_nodes,
    room,
    window,  # None: off
    words,
    programs,
    least,
    capacity,
    blocks,
    query_row,  # strides
    query_head,
    query_column,
    key_outer,
    key_head,
    key_slot,
    key_column,
    value_outer,
    value_head,
    value_slot,
    value_column,
    table_row,
    table_column,
    GROUP: tl.constexpr,  # Hq / Hkv
    PAGE: tl.constexpr,  # slots of a block; 0: dense
    FORMAT: tl.constexpr,  # of the cache: "plain", or fp8 in bytes
    COMPUTE: tl.constexpr,  # dtype that is multiplied
    PRECISION: tl.constexpr,  # of products in fp32
    WIDTH: tl.constexpr,  # power of two >= the number of entries
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDE: tl.constexpr,  # power of two >= D
    WIDE_V: tl.constexpr,  # and Dv
):
    """Works through items program_id, program_id + num_programs, ... of the plan."""
    batch = Batch(
        cu_nodes=cu_nodes, prefix_lens=prefix_lens, shares=shares, N=N, B=B, max_nodes=max_nodes, room=room,
        window=window, heads=heads, programs=programs, least=least,
    )  # fmt: skip
    clear_nodes(out, lse, 0, tl.minimum(tl.load(cu_nodes), N), heads * GROUP, DV, 1024)
    clear_nodes(out, lse, tl.maximum(tl.load(cu_nodes + B), 0), N, heads * GROUP, DV, 1024)
    plan = plan_of(batch, GROUP, ROWS, SLOTS, WIDTH)
    items = tl.max(plan.ends, 0)
    column, column_v = tl.arange(0, WIDE), tl.arange(0, WIDE_V)
    lane = tl.arange(0, ROWS)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        e, within = find(plan.ends, item)
        entry = load_entry(batch, e, SLOTS)
        tiles, splits = tiles_of(entry, GROUP, ROWS), splits_of(entry, plan.chunk)
        # Tiles that read the same slots stand side by side, so that only the first one reads them from memory.
        tile, rest = within % tiles, within // tiles
        split, head = rest % splits, rest // splits
        row = tile * ROWS + lane
        node = row // GROUP
        sound = node < entry.nodes
        at = entry.start + node
        if order is not None:
            grouped = node < tl.where(e < B, 0, entry.nodes)
            at = tl.where(grouped, tl.load(order + at, mask=grouped, other=0), at)
        at = at.to(tl.int64) * query_row + (head * GROUP + row % GROUP).to(tl.int64) * query_head
        pointers = query + at[:, None] + column[None, :].to(tl.int64) * query_column
        rows = tl.load(pointers, mask=sound[:, None] & (column < D)[None, :], other=0).to(COMPUTE)
        depth, position = None, None
        if window is not None:
            own = node < tl.where(e < B, entry.nodes, 0)
            depth = tl.load(depths + entry.start + node, mask=own, other=0)
            position = entry.prefix + depth
            if order is not None:
                position = tl.where(own, position, tl.load(reach + entry.start + node, mask=grouped, other=0))
        kv = head.to(tl.int64)
        cache = Cache(
            key_data=key_cache + kv * key_head, key_outer=key_outer, key_slot=key_slot, key_column=key_column,
            value_data=value_cache + kv * value_head, value_outer=value_outer, value_slot=value_slot,
            value_column=value_column, table=block_table, table_row=table_row, table_column=table_column, blocks=blocks,
        )  # fmt: skip
        factor = scale
        if k_scale is not None:
            factor *= tl.load(k_scale + head).to(tl.float32)
        if softcap is None:
            factor *= LOG2_E
        acc = tl.zeros((ROWS, WIDE_V), tl.float32)
        peak = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        length = tl.cdiv(entry.prefix_blocks + entry.tree_blocks, splits)
        first, last = split * length, (split + 1) * length
        acc, peak, total = attend_prefix(
            rows, acc, peak, total, cache, e, entry, position, sound, first, tl.minimum(last, entry.prefix_blocks),
            factor, batch, softcap, D, DV, PAGE, FORMAT, PRECISION, SLOTS, WIDE, WIDE_V,
        )  # fmt: skip
        acc, peak, total = attend_tree(
            rows, acc, peak, total, cache, e, entry, node, depth, tl.maximum(first - entry.prefix_blocks, 0),
            tl.minimum(last - entry.prefix_blocks, entry.tree_blocks), factor, batch, softcap, D, DV,
            depths, bits, words, PAGE, FORMAT, PRECISION, WIDE, WIDE_V,
        )  # fmt: skip
        split_up = splits > 1
        if shares is not None:
            split_up = split_up | True
        if split_up == 0:
            result = Result(out=out, lse=lse, sinks=sinks, v_scale=v_scale, heads=heads * GROUP, columns=DV)
            write_rows(result, acc, peak, total, row, entry, head, GROUP)
        if partial is not None:
            place = sum_before(plan.partial_ends, e) + within
            if split_up & (place < capacity):
                kept = node < entry.size
                held = partial + place.to(tl.int64) * ROWS * DV + lane[:, None] * DV + column_v[None, :]
                tl.store(held, acc, mask=kept[:, None] & (column_v < DV)[None, :])
                sums = partial_sums + place.to(tl.int64) * 2 * ROWS + lane
                tl.store(sums, peak, mask=kept)
                tl.store(sums + ROWS, total, mask=kept)
