"""Compaction of KV caches: the accepted path of every request, through the caches of all layers, in one launch.

The kernel is told where the caches lie by numbers among its arguments: a table in memory would have to be copied to
the GPU, and a CUDA graph would not keep it. Caches of one shape share their description.
"""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Arguments of one launch: 8 bytes a cache, of the 4 KB that every driver allows.
MAX_CACHES = 384
# How many steps of a path are read before they are written, and how many units of a row at once.
STEPS = 8
MAX_WIDTH = 128


class Geometry(NamedTuple):
    """How the slots of one cache lie in memory; in bytes."""

    outer: int  # between requests (dense) or blocks (paged)
    slot: int  # between slots
    head: int  # between KV heads
    column: int  # between the units of one head's row
    outers: int  # requests or blocks
    slots: int  # slots of a request or of a block
    heads: int
    row: int  # bytes of one head's row


@triton.jit
def chosen(i, numbers):
    """numbers[i] of a tuple that is no array; int64."""
    found = tl.full((), 0, tl.int64)
    for at in tl.static_range(len(numbers)):
        found = tl.where(i == at, numbers[at], found)
    return found


@triton.jit
def place_of(table, table_row, table_column, columns, b, slot, exists, outer, step, outers, slots):
    """(byte offsets of the logical `slot` of request b, whether there is one); int64."""
    if table is None:
        there = exists & (slot >= 0) & (slot < slots)
        return b * outer + slot * step, there
    else:
        logical = tl.where(slot < 0, 0, slot // slots)
        there = exists & (slot >= 0) & (logical < columns)
        block = tl.load(table + b * table_row + logical * table_column, mask=there, other=-1).to(tl.int64)
        return block * outer + (slot - logical * slots) * step, there & (block >= 0) & (block < outers)


@triton.jit
def units_at(address, UNIT: tl.constexpr):
    """Pointers to integers of UNIT bytes at int64 addresses."""
    if UNIT == 8:
        return address.to(tl.pointer_type(tl.int64))
    elif UNIT == 4:
        return address.to(tl.pointer_type(tl.int32))
    elif UNIT == 2:
        return address.to(tl.pointer_type(tl.int16))
    else:
        return address.to(tl.pointer_type(tl.int8))


@triton.jit(do_not_specialize=["steps", "columns"])
def compact_kernel(
    caches,  # addresses of the caches, a tuple; those of one geometry stand side by side
    ends,  # for each geometry but the last: the first cache behind those that have it
    outer,  # the fields of Geometry, each a tuple
    slot,
    head,
    column,
    outers,
    slots,
    heads,
    row,
    nodes,  # [B, steps] int32, -1 behind the end
    prefix_lens,  # [B] int32
    block_table,  # [B, columns] int32, or None: dense
    steps,
    columns,
    nodes_row,  # strides
    nodes_column,
    prefix_stride,
    table_row,
    table_column,
    UNIT: tl.constexpr,  # bytes that move at once: 1, 2, 4 or 8
    WHOLE: tl.constexpr,  # units of a row touch, in every cache
    WIDTH: tl.constexpr,  # units; a power of two
    STEPS: tl.constexpr,
):
    """Moves the rows of request program_id(0) in cache program_id(1); the heads are spread over axis 2.

    Nodes ascend along a path, so nodes[j] >= j: a step writes slot j when all later steps read slots above nodes[j].
    Sources and targets may therefore overlap, as long as no step is written before it and the ones before it have been
    read. A barrier stands between reading and writing, because one thread may read what another one overwrites.
    """
    b = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1)
    kind = tl.full((), 0, tl.int32)
    for i in tl.static_range(len(ends)):
        kind += (c >= ends[i]).to(tl.int32)
    base, step, far = chosen(c, caches), chosen(kind, slot), chosen(kind, outer)
    count, blocks, units = chosen(kind, slots), chosen(kind, outers), chosen(kind, row) // UNIT
    between_heads, between_units, most = chosen(kind, head), chosen(kind, column) // UNIT, chosen(kind, heads)
    prefix = tl.load(prefix_lens + b * prefix_stride).to(tl.int64)
    lane, unit = tl.arange(0, STEPS), tl.arange(0, WIDTH)
    first = 0
    while first < steps:
        at = first + lane
        node = tl.load(nodes + b * nodes_row + at.to(tl.int64) * nodes_column, mask=at < steps, other=-1)
        end = tl.min(tl.where(node < 0, at, steps), 0)  # what follows a -1 is no path
        # The root stays, and so does what is where it belongs.
        moves = (at < end) & (at > 0) & (node != at)
        source, found = place_of(
            block_table, table_row, table_column, columns, b, prefix + node, moves, far, step, blocks, count
        )
        target, room = place_of(
            block_table, table_row, table_column, columns, b, prefix + at, found, far, step, blocks, count
        )
        if tl.max(room.to(tl.int32), 0) != 0:
            h = tl.program_id(2).to(tl.int64)
            while h < most:
                begin = 0
                while begin < units:
                    place = begin + unit
                    inside = room[:, None] & (place < units)[None, :]
                    offset = place[None, :] if WHOLE else place[None, :].to(tl.int64) * between_units
                    along = base + h * between_heads
                    taken = tl.load(units_at(source + along, UNIT)[:, None] + offset, mask=inside, other=0)
                    tl.debug_barrier()
                    tl.store(units_at(target + along, UNIT)[:, None] + offset, taken, mask=inside)
                    begin += WIDTH
                h += tl.num_programs(2)
        first = tl.where(end < tl.minimum(first + STEPS, steps), steps, first + STEPS)


def geometry_of(cache: Tensor, paged: bool) -> Geometry:
    """The geometry of [B, Hkv, L, D] or, `paged`, [blocks, block_size, Hkv, D]."""
    slot, head = (1, 2) if paged else (2, 1)
    size, stride = cache.shape, cache.stride()
    width = cache.element_size()
    return Geometry(
        outer=stride[0] * width, slot=stride[slot] * width, head=stride[head] * width,
        column=width if size[3] <= 1 else stride[3] * width, outers=size[0], slots=size[slot], heads=size[head],
        row=size[3] * width,
    )  # fmt: skip


def compact_launches(
    caches: list[Tensor], nodes: Tensor, prefix_lens: Tensor, block_table: Tensor | None
) -> list[tuple[dict, dict, tuple[int, int, int]]]:
    """(the kernel's arguments by name, its options, its grid) of each launch.

    One launch for up to MAX_CACHES caches. Rows whose elements do not touch, which move element by element, need one of
    their own for each size of element.
    """
    paged = block_table is not None
    batch, steps = nodes.shape
    if not batch or steps < 2 or (paged and not block_table.shape[1]):
        return []  # a path of one node is a root, which does not move
    # element size, or 0 for rows that touch -> geometry -> addresses
    kinds: dict[int, dict[Geometry, list[int]]] = {}
    for cache in caches:
        if cache.numel():
            geometry, size = geometry_of(cache, paged), cache.element_size()
            touching = geometry.column == size
            kinds.setdefault(0 if touching else size, {}).setdefault(geometry, []).append(cache.data_ptr())
    launches = []
    for size, members in kinds.items():
        entries = [(geometry, address) for geometry, addresses in members.items() for address in addresses]
        for first in range(0, len(entries), MAX_CACHES):
            launches.append(_launch(entries[first : first + MAX_CACHES], size, nodes, prefix_lens, block_table))
    return launches


def _launch(
    entries: list[tuple[Geometry, int]], size: int, nodes: Tensor, prefix_lens: Tensor, block_table: Tensor | None
) -> tuple[dict, dict, tuple[int, int, int]]:
    geometries = list(dict.fromkeys(geometry for geometry, _ in entries))
    last = {geometry: i + 1 for i, (geometry, _) in enumerate(entries)}
    addresses = tuple(address for _, address in entries)
    # Rows move in units that every address is a multiple of: one warp reads 256 bytes, of a row or of its neighbour.
    unit = size or math.gcd(8, *addresses, *(x for g in geometries for x in (g.outer, g.slot, g.head, g.row)))
    width = triton.next_power_of_2(max(geometry.row // unit for geometry in geometries))
    arguments = {
        "caches": addresses,
        "ends": tuple(last[geometry] for geometry in geometries[:-1]),
        **{name: tuple(getattr(geometry, name) for geometry in geometries) for name in Geometry._fields},
        "nodes": nodes,
        "prefix_lens": prefix_lens,
        "block_table": block_table,
        "steps": nodes.shape[1],
        "columns": 0 if block_table is None else block_table.shape[1],
        "nodes_row": nodes.stride(0),
        "nodes_column": nodes.stride(1),
        "prefix_stride": prefix_lens.stride(0),
        "table_row": 0 if block_table is None else block_table.stride(0),
        "table_column": 0 if block_table is None else block_table.stride(1),
        "UNIT": unit,
        "WHOLE": size == 0,
        "WIDTH": min(width, MAX_WIDTH),
        "STEPS": STEPS,
    }
    heads = max(geometry.heads for geometry in geometries)
    return arguments, {"num_warps": 1}, (nodes.shape[0], len(entries), min(heads, 65535))


def compact_kv_(caches: list[Tensor], nodes: Tensor, prefix_lens: Tensor, block_table: Tensor | None) -> None:
    """Triton kernel of the op `compact_kv_`."""
    with torch.cuda.device(nodes.device) if nodes.is_cuda else contextlib.nullcontext():
        for arguments, options, grid in compact_launches(caches, nodes, prefix_lens, block_table):
            compact_kernel[grid](**arguments, **options)
