"""Tree attention in plain PyTorch, one request after the other, in the order of the maths."""

from __future__ import annotations

import torch
from torch import Tensor

from .trees import bounded


def tree_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    depths: Tensor,
    bits: Tensor,
    cu_nodes: Tensor,
    max_nodes: int,
    prefix_lens: Tensor,
    block_table: Tensor | None,
    shared_groups: Tensor | None,
    shared_lens: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """See specdec_kernels.attention.tree_attention. Only the slots that some node may see are touched.

    Values that do not fit never lead outside a tensor: nodes behind max_nodes or without room in the cache get 0, and
    prefix_lens and block_table are clamped to what is there.
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    nodes, q_heads, _ = query.shape
    kv_heads = key_cache.shape[1 if block_table is None else 2]
    groups = q_heads // kv_heads
    out = query.new_zeros(nodes, q_heads, value_cache.shape[-1])
    lse = query.new_full((nodes, q_heads if return_lse else 0), float("-inf"), dtype=exact)
    room = _room(key_cache, block_table)
    starts = bounded(cu_nodes, nodes).tolist()
    for b, prefix in enumerate(prefix_lens.tolist()):
        n = min(starts[b + 1] - starts[b], max_nodes, room)
        if n == 0:
            continue
        rows = slice(starts[b], starts[b] + n)
        prefix = min(max(prefix, 0), room - n)
        # No node sees a slot that is more distant than what the highest one sees.
        highest = int(depths[rows].min()) if window else 0
        first = min(max(0, prefix + highest - window + 1), prefix) if window else 0
        where = _shared(shared_groups, shared_lens, b, first, prefix)
        keys = _slots(key_cache, block_table, b, first, prefix + n, *where).to(exact)
        values = _slots(value_cache, block_table, b, first, prefix + n, *where).to(exact)
        # Query heads of one KV head share its keys, so they stand side by side as rows: [Hkv, G*n, D].
        q = query[rows].to(exact).view(n, kv_heads, groups, -1).permute(1, 2, 0, 3).reshape(kv_heads, groups * n, -1)
        q = q * scale if k_scale is None else q * (scale * k_scale.to(exact)[:, None, None])

        scores = torch.bmm(q, keys.transpose(1, 2)).view(kv_heads, groups, n, -1)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        # Without a window all of the prefix is visible: only the tree's columns need a mask then.
        visible = _in_tree(bits[rows])
        if window:
            visible = torch.cat([visible.new_ones(n, prefix - first), visible], 1)
            # Positions, not slots: siblings stand at different slots but at one distance.
            here = prefix + depths[rows]
            position = torch.cat([torch.arange(first, prefix, device=here.device), here])
            visible &= here[:, None] - position < window
        scores[..., -visible.shape[1] :].masked_fill_(~visible, float("-inf"))
        if sinks is not None:
            column = sinks.to(exact).view(kv_heads, groups, 1, 1).expand(-1, -1, n, 1)
            scores = torch.cat([scores, column], -1)
        weights = scores.softmax(-1)[..., : keys.shape[1]]
        # A row that sees nothing has no softmax, and a weight of 0 does not silence a NaN in a slot nobody sees.
        if visible.shape[1] == keys.shape[1]:
            weights = weights.masked_fill(~visible.any(1)[:, None], 0.0)
        seen = visible.any(0)
        values = values.masked_fill(~torch.cat([seen.new_ones(keys.shape[1] - len(seen)), seen])[:, None], 0.0)
        mixed = torch.bmm(weights.reshape(kv_heads, groups * n, -1), values)
        if v_scale is not None:
            mixed = mixed * v_scale.to(exact)[:, None, None]
        out[rows] = mixed.view(kv_heads, groups, n, -1).permute(2, 0, 1, 3).reshape(n, q_heads, -1).to(query.dtype)
        if return_lse:
            lse[rows] = scores.logsumexp(-1).permute(2, 0, 1).reshape(n, q_heads)
    return out, lse


def _room(cache: Tensor, block_table: Tensor | None) -> int:
    """Slots that one request can have."""
    if block_table is None:
        return cache.shape[2]
    return block_table.shape[1] * cache.shape[1] if len(cache) else 0


def _shared(groups: Tensor | None, lens: Tensor | None, b: int, first: int, prefix: int) -> tuple[int, int]:
    """(owner, end): slots first .. end-1 of request b are read where the owner has them."""
    if groups is None:
        return b, first
    owner = int(groups[b])
    return owner if 0 <= owner < len(groups) else b, min(max(int(lens[b]), first), prefix)


def _slots(
    cache: Tensor, block_table: Tensor | None, b: int, first: int, last: int, owner: int, end: int
) -> Tensor:  # fmt: skip
    """[Hkv, last - first, D]: slots first .. end-1 of the owner, then those of request b; a view of a dense cache."""
    if owner != b and end > first:
        parts = ((owner, first, end), (b, end, last))
        return torch.cat([_slots(cache, block_table, *part, part[0], part[1]) for part in parts], 1)
    if block_table is None:
        return cache[b, :, first:last]
    size = cache.shape[1]
    start = first // size
    blocks = cache[block_table[b, start : (last + size - 1) // size].long().clamp(0, len(cache) - 1)]
    return blocks.flatten(0, 1)[first - start * size : last - start * size].transpose(0, 1)


def _in_tree(bits: Tensor) -> Tensor:
    """[n, n] bool: bit j of row i's words."""
    index = torch.arange(bits.shape[0], device=bits.device)
    return (bits[:, index >> 6] >> (index & 63) & 1).bool()
