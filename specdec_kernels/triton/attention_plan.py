"""How the work of tree attention is divided, by every program for itself: nothing is read back, nothing is planned.

An entry is what one set of query rows reads: a request its own slots, or (prefix sharing) a group of requests the slots
that all of them see. An entry's rows (nodes times query heads of one KV head) are cut into tiles, its slots into
blocks, and a run of blocks is a split. An item is one tile of one KV head over one split: what one program works on.

The host knows shapes only, so it chooses how many items there may be; how long a split is, follows on the device from
the lengths that the requests really have, so that items are equally long in a ragged batch too.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

# Slots of a block of the tree: as many as half a word of bits tells of.
TREE = tl.constexpr(32)

# Rows of the table that sharing_kernel fills, [FIELDS, B] int32.
SOURCE = tl.constexpr(0)  # of a request: the request whose slots it shares
SHARED = tl.constexpr(1)  # how many of them
HOLE = tl.constexpr(2)  # slots HOLE .. HOLE_END-1 are read by its group, not by itself
HOLE_END = tl.constexpr(3)
PLACE = tl.constexpr(4)  # where its nodes start among all nodes in the order of groups
FIRST = tl.constexpr(5)  # of a group: where its nodes start in that order
COUNT = tl.constexpr(6)  # how many nodes it has; 0 where it has nothing to read
LOW = tl.constexpr(7)  # the slots LOW .. HIGH-1 that it reads
HIGH = tl.constexpr(8)
FIELDS = 9


class Batch(NamedTuple):
    """What says how long every entry is."""

    cu_nodes: tl.tensor  # [B+1] int32
    prefix_lens: tl.tensor  # [B] int32
    shares: tl.tensor  # [FIELDS, B] int32; None: nothing is shared
    N: tl.tensor
    B: tl.tensor
    max_nodes: tl.tensor
    room: tl.tensor  # slots that a request can have
    window: tl.tensor  # None: off
    heads: tl.tensor  # KV heads
    programs: tl.tensor  # how many items would fill the GPU; None: splits are not worth their merge
    least: tl.tensor  # blocks of the shortest split


class Entry(NamedTuple):
    """One entry, or a vector of them."""

    start: tl.tensor  # first node, for a group in the order of groups
    size: tl.tensor  # nodes
    nodes: tl.tensor  # of which this many are sound; the others get 0
    low: tl.tensor  # the slots low .. prefix-1 are read, less the hole
    prefix: tl.tensor
    hole: tl.tensor
    hole_end: tl.tensor
    prefix_blocks: tl.tensor
    tree_blocks: tl.tensor


class Plan(NamedTuple):
    """Inclusive sums over entries: entry e has the items ends[e-1] .. ends[e]-1."""

    ends: tl.tensor
    partial_ends: tl.tensor  # only items of entries that are split
    unit_ends: tl.tensor  # tiles of all heads, which is what is merged
    chunk: tl.tensor  # blocks of the longest split


@triton.jit
def bounded(value, low, high):
    """`value` between low and high; high where they cross."""
    return tl.minimum(tl.maximum(value, low), high)


@triton.jit
def request_size(cu_nodes, prefix_lens, N, max_nodes, room, b, exists):
    """(first node, nodes, sound nodes, committed slots) of request b, whatever the tensors hold."""
    start = bounded(tl.load(cu_nodes + b, mask=exists, other=0), 0, N)
    end = bounded(tl.load(cu_nodes + b + 1, mask=exists, other=0), 0, N)
    size = tl.maximum(end - start, 0)
    nodes = tl.minimum(size, tl.minimum(max_nodes, room))
    prefix = bounded(tl.load(prefix_lens + b, mask=exists, other=0), 0, room - nodes)
    return start, size, nodes, prefix


@triton.jit
def load_entry(batch, e, SLOTS: tl.constexpr):
    """Entry e, a number or a vector: request e, or group e - B. Behind the last one: empty."""
    own = e < batch.B
    start, size, nodes, prefix = request_size(
        batch.cu_nodes, batch.prefix_lens, batch.N, batch.max_nodes, batch.room, tl.where(own, e, 0), own
    )
    if batch.shares is None:
        low, hole, hole_end = nodes * 0, nodes * 0, nodes * 0
    else:
        grouped = (e >= batch.B) & (e < 2 * batch.B)
        group = batch.shares + tl.where(grouped, e - batch.B, 0)
        start = tl.where(own, start, tl.load(group + FIRST * batch.B, mask=grouped, other=0))
        count = tl.load(group + COUNT * batch.B, mask=grouped, other=0)
        size, nodes = tl.where(own, size, count), tl.where(own, nodes, count)
        prefix = tl.where(own, prefix, tl.load(group + HIGH * batch.B, mask=grouped, other=0))
        low = tl.load(group + LOW * batch.B, mask=grouped, other=0)
        request = batch.shares + tl.where(own, e, 0)
        hole = tl.load(request + HOLE * batch.B, mask=own, other=0)
        hole_end = tl.load(request + HOLE_END * batch.B, mask=own, other=0)
    if batch.window is not None:
        # Positions: the root, which has the lowest one, sees the most distant slot.
        seen = tl.maximum(prefix - batch.window + 1, 0)
        low = seen if batch.shares is None else tl.where(own, seen, low)
    slots = tl.maximum(prefix - low - (hole_end - hole), 0)
    tree = nodes if batch.shares is None else tl.where(own, nodes, 0)
    return Entry(
        start=start, size=size, nodes=nodes, low=low, prefix=prefix, hole=hole, hole_end=hole_end,
        prefix_blocks=tl.where(nodes > 0, tl.cdiv(slots, SLOTS), 0), tree_blocks=tl.cdiv(tree, TREE),
    )  # fmt: skip


@triton.jit
def tiles_of(entry, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """How many tiles the rows of an entry make."""
    return tl.cdiv(entry.size * GROUP, ROWS)


@triton.jit
def splits_of(entry, chunk):
    """How many splits the blocks of an entry make."""
    return tl.maximum(tl.cdiv(entry.prefix_blocks + entry.tree_blocks, chunk), 1)


@triton.jit
def plan_of(batch, GROUP: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr):
    """The plan; WIDTH is a power of two >= the number of entries.

    At most max(programs, 2 * ceil(programs / 2)) items belong to entries that are split: with U units in all and W
    blocks to read, a chunk of W / (programs - U) makes at most (programs - U) + U items; a chunk of W / (programs / 2)
    is exceeded by entries only whose items are at most twice as many as the chunks they hold.
    """
    entry = load_entry(batch, tl.arange(0, WIDTH), SLOTS)
    tiles = tiles_of(entry, GROUP, ROWS)
    units = tiles * batch.heads
    chunk = tl.full((), 2147483647, tl.int32)
    if batch.programs is not None:
        work = tl.sum(units.to(tl.int64) * (entry.prefix_blocks + entry.tree_blocks), 0)
        wanted = tl.maximum(batch.programs - tl.sum(units, 0), (batch.programs + 1) // 2)
        chunk = tl.maximum(tl.cdiv(work, wanted), batch.least).to(tl.int32)
    splits = splits_of(entry, chunk)
    items = units * splits
    ends = tl.cumsum(items, 0)
    partial_ends = ends if batch.shares is not None else tl.cumsum(tl.where(splits > 1, items, 0), 0)
    return Plan(ends=ends, partial_ends=partial_ends, unit_ends=tl.cumsum(units, 0), chunk=chunk)


@triton.jit
def find(ends, item):
    """(entry that holds `item`, its place in it)."""
    before = ends <= item
    return tl.sum(before.to(tl.int32), 0), item - tl.max(tl.where(before, ends, 0), 0)


@triton.jit
def sum_before(ends, e):
    """What an inclusive sum is in front of entry e."""
    return tl.sum(tl.where(tl.arange(0, ends.shape[0]) == e - 1, ends, 0), 0)
