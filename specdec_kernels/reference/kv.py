"""Compaction of KV caches in plain PyTorch: gather every slot that moves, then write it where it belongs."""

from __future__ import annotations

import torch
from torch import Tensor

# Indexing is not implemented for every dtype (fp8), moving bytes is.
_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def compact_kv_(caches: list[Tensor], nodes: Tensor, prefix_lens: Tensor, block_table: Tensor | None) -> None:
    """See specdec_kernels.kv.compact_kv_. All that moves is read before anything is written, so overlap is harmless."""
    steps = torch.arange(nodes.shape[1], device=nodes.device)
    on_path = (nodes < 0).cumsum(1) == 0
    request, step = (on_path & (steps > 0) & (nodes != steps)).nonzero().unbind(1)
    if not len(request):  # a chain is already where it belongs
        return
    prefix = prefix_lens[request].long()
    source, target = prefix + nodes[request, step], prefix + step
    plans = {}  # layers of one shape share their indices
    for cache in caches:
        cache = cache.view(_SAME_SIZE.get(cache.element_size(), cache.dtype))
        if block_table is None:
            capacity = cache.shape[2]
            if capacity not in plans:
                inside = _inside(source, capacity) & _inside(target, capacity)
                plans[capacity] = request[inside], source[inside], target[inside]
            who, where_from, where_to = plans[capacity]
            cache[who, :, where_to] = cache[who, :, where_from]
        else:
            shape = cache.shape[:2]
            if shape not in plans:
                found = [_locate(block_table, request, slot, *shape) for slot in (source, target)]
                inside = found[0][2] & found[1][2]
                plans[shape] = [(block[inside], slot[inside]) for block, slot, _ in found]
            where_from, where_to = plans[shape]
            cache[where_to] = cache[where_from]


def _inside(index: Tensor, size: int) -> Tensor:
    return (index >= 0) & (index < size)


def _locate(block_table: Tensor, request: Tensor, slot: Tensor, blocks: int, block_size: int):
    """(physical block, slot in it, whether both exist) of each request's logical slots."""
    logical = slot.div(block_size, rounding_mode="floor") if block_size else torch.full_like(slot, -1)
    known = _inside(logical, block_table.shape[1])
    if block_table.shape[1]:
        block = block_table[request, logical.clamp(0, block_table.shape[1] - 1)].long()
    else:
        block = torch.full_like(slot, -1)
    return block, slot - logical * block_size, known & _inside(block, blocks)
