"""Merges what splits, and the groups that share a prefix, have made of one row: weighted by their softmax sums."""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_plan import (
    FIRST,
    HOLE,
    HOLE_END,
    PLACE,
    SOURCE,
    Batch,
    find,
    load_entry,
    plan_of,
    splits_of,
    sum_before,
    tiles_of,
)
from .attention_tile import Result, write_rows


@triton.jit
def add_splits(
    acc, peak, total, partial, partial_sums, place, step, splits, row, kept, capacity, DV, ROWS: tl.constexpr
):  # fmt: skip
    """Add the splits whose partial results stand at place, place + step, ...; `row` of each.

    Args:
        place, row: [rows] int32.
        kept: [rows] bool, rows that have such results.
    """
    column = tl.arange(0, acc.shape[1])
    for split in range(0, splits):
        at = place + split * step
        there = kept & (at < capacity)
        sums = partial_sums + at.to(tl.int64) * 2 * ROWS + row
        other_peak = tl.load(sums, mask=there, other=float("-inf"))
        other_total = tl.load(sums + ROWS, mask=there, other=0.0)
        held = partial + (at.to(tl.int64) * ROWS + row)[:, None] * DV + column[None, :]
        other = tl.load(held, mask=there[:, None] & (column < DV)[None, :], other=0.0)
        higher = tl.maximum(peak, other_peak)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        decay, other_decay = tl.exp2(peak - shift), tl.exp2(other_peak - shift)
        acc = acc * decay[:, None] + other * other_decay[:, None]
        total = total * decay + other_total * other_decay
        peak = higher
    return acc, peak, total


@triton.jit(do_not_specialize=["N", "B", "max_nodes", "room", "window", "programs", "least", "capacity"])
def merge_kernel(
    cu_nodes,  # all as in attend_kernel
    prefix_lens,
    shares,
    sinks,
    v_scale,
    out,
    lse,
    partial,
    partial_sums,
    N,
    B,
    heads,
    DV,
    max_nodes,
    room,
    window,
    programs,
    least,
    capacity,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDE_V: tl.constexpr,
    MERGED: tl.constexpr,  # rows that are merged at once, a divisor of ROWS
):
    """Merges MERGED rows of one tile after the other; tiles that were not split have been written already."""
    PARTS: tl.constexpr = ROWS // MERGED
    batch = Batch(
        cu_nodes=cu_nodes, prefix_lens=prefix_lens, shares=shares, N=N, B=B, max_nodes=max_nodes, room=room,
        window=window, heads=heads, programs=programs, least=least,
    )  # fmt: skip
    plan = plan_of(batch, GROUP, ROWS, SLOTS, WIDTH)
    units = tl.sum(tl.where(tl.arange(0, WIDTH) == B - 1, plan.unit_ends, 0), 0)
    for part in range(tl.program_id(0), units * PARTS, tl.num_programs(0)):
        e, within = find(plan.unit_ends, part // PARTS)
        entry = load_entry(batch, e, SLOTS)
        tiles, splits = tiles_of(entry, GROUP, ROWS), splits_of(entry, plan.chunk)
        tile, head = within % tiles, within // tiles
        inside = part % PARTS * MERGED + tl.arange(0, MERGED)
        row = tile * ROWS + inside
        split_up = splits > 1
        if shares is not None:
            split_up = split_up | True
        if split_up & (tile * ROWS + part % PARTS * MERGED < entry.size * GROUP):
            acc = tl.zeros((MERGED, WIDE_V), tl.float32)
            peak = tl.full((MERGED,), float("-inf"), tl.float32)
            total = tl.zeros((MERGED,), tl.float32)
            node = row // GROUP
            kept = node < entry.nodes
            place = sum_before(plan.partial_ends, e) + head * splits * tiles + tile
            acc, peak, total = add_splits(
                acc, peak, total, partial, partial_sums, place + inside * 0, tiles, splits, inside, kept, capacity, DV,
                ROWS,
            )  # fmt: skip
            if shares is not None:  # noqa: SIM102 - what is known when compiling is asked on its own
                if tl.load(shares + HOLE * B + e) < tl.load(shares + HOLE_END * B + e):
                    source = tl.load(shares + SOURCE * B + e)
                    group = load_entry(batch, B + source, SLOTS)
                    tiles, splits = tiles_of(group, GROUP, ROWS), splits_of(group, plan.chunk)
                    # Where the rows of this request stand among those of its group.
                    before = tl.load(shares + PLACE * B + e) - tl.load(shares + FIRST * B + source)
                    row_there = before * GROUP + row
                    place = sum_before(plan.partial_ends, B + source) + head * splits * tiles
                    acc, peak, total = add_splits(
                        acc, peak, total, partial, partial_sums, place + row_there // ROWS, tiles, splits,
                        row_there % ROWS, kept, capacity, DV, ROWS,
                    )  # fmt: skip
            result = Result(out=out, lse=lse, sinks=sinks, v_scale=v_scale, heads=heads * GROUP, columns=DV)
            write_rows(result, acc, peak, total, row, entry, head, GROUP)
