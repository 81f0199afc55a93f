"""Which requests read which slots together."""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_plan import (
    COUNT,
    FIRST,
    HIGH,
    HOLE,
    HOLE_END,
    LOW,
    PLACE,
    SHARED,
    SOURCE,
    bounded,
    request_size,
)


@triton.jit
def common_slots(same, low, length):
    """(first, end) of the slots that all rows of all requests `same` see; empty for fewer than two requests."""
    first = tl.max(tl.where(same, low, 0), 0)
    end = tl.min(tl.where(same, length, 2147483647), 0)
    together = (tl.sum(same.to(tl.int32), 0) > 1) & (end > first)
    return tl.where(together, first, 0), tl.where(together, end, 0)


@triton.jit(do_not_specialize=["N", "B", "max_nodes", "room", "window"])
def sharing_kernel(
    cu_nodes,  # [B+1] int32
    prefix_lens,  # [B] int32
    shared_groups,  # [B] int32
    shared_lens,  # [B] int32
    shares,  # out: [FIELDS, B] int32, see attention_plan
    order,  # out: [N] int32, nodes of requests that share, those of one group side by side
    depths,  # [N] int32, or None: no window
    reach,  # out: [N] int32, their positions, or None
    N,
    B,
    max_nodes,
    room,
    window,  # None: off
    WIDTH: tl.constexpr,  # power of two >= B
    BLOCK: tl.constexpr,
):
    """Program b describes request b, and group b: the requests whose shared slots are those of request b.

    A group reads the slots that every row of it sees, so that its tiles need no mask: [its furthest window's start,
    its shortest shared prefix). What only some of its requests share, these read themselves.
    """
    b = tl.program_id(0)
    lane = tl.arange(0, WIDTH)
    exists = lane < B
    start, _, nodes, prefix = request_size(cu_nodes, prefix_lens, N, max_nodes, room, lane, exists)
    source = tl.load(shared_groups + lane, mask=exists, other=-1)
    source = tl.where((source >= 0) & (source < B), source, lane)
    length = bounded(tl.load(shared_lens + lane, mask=exists, other=0), 0, prefix)
    member = exists & (length > 0) & (nodes > 0)
    low = prefix * 0
    if window is not None:
        low = tl.maximum(prefix + nodes - window, 0)  # no node of a tree of n is deeper than n - 1

    me = lane == b
    my_source = tl.sum(tl.where(me, source, 0), 0)
    my_nodes = tl.sum(tl.where(me & member, nodes, 0), 0)
    my_start = tl.sum(tl.where(me, start, 0), 0)
    my_prefix = tl.sum(tl.where(me, prefix, 0), 0)
    hole, hole_end = common_slots(member & (source == my_source), low, length)
    hole_end = tl.where(my_nodes > 0, hole_end, hole)
    earlier = (source < my_source) | ((source == my_source) & (lane < b))
    place = tl.sum(tl.where(member & earlier, nodes, 0), 0)

    mine = member & (source == b)
    group_low, group_high = common_slots(mine, low, length)
    count = tl.where(group_high > group_low, tl.sum(tl.where(mine, nodes, 0), 0), 0)
    tl.store(shares + SOURCE * B + b, my_source)
    tl.store(shares + SHARED * B + b, tl.sum(tl.where(me, length, 0), 0))
    tl.store(shares + HOLE * B + b, hole)
    tl.store(shares + HOLE_END * B + b, hole_end)
    tl.store(shares + PLACE * B + b, place)
    tl.store(shares + FIRST * B + b, tl.sum(tl.where(member & (source < b), nodes, 0), 0))
    tl.store(shares + COUNT * B + b, count)
    tl.store(shares + LOW * B + b, group_low)
    tl.store(shares + HIGH * B + b, group_high)
    lanes = tl.arange(0, BLOCK)
    for node in range(0, my_nodes, BLOCK):
        inside = (node + lanes < my_nodes) & (place + node + lanes < N)
        tl.store(order + place + node + lanes, my_start + node + lanes, mask=inside)
        if reach is not None:
            depth = tl.load(depths + my_start + node + lanes, mask=inside, other=0)
            tl.store(reach + place + node + lanes, my_prefix + depth, mask=inside)
