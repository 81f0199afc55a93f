"""Depths, ancestor bits and positions of all nodes of all trees, in one launch."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["N", "B", "words"])
def layout_kernel(
    parents,  # [N] int32
    cu_nodes,  # [B+1] int32
    prefix_lens,  # [B] int32, or None: positions are depths
    depths,  # out: [N] int32
    bits,  # out: [N, words] int64
    positions,  # out: [N] int32
    N,
    B,
    words,
    NODES: tl.constexpr,
    WORDS: tl.constexpr,  # power of two >= words
):
    """NODES nodes of request program_id(0) after the other, each on its own walk to the root; then nodes of no request.

    A walk reads what lies in the first cache, so its length costs less than the barriers of pointer doubling would.
    """
    b = tl.program_id(0)
    lane, word = tl.arange(0, NODES), tl.arange(0, WORDS)
    first, step = tl.program_id(1) * NODES, tl.num_programs(1) * NODES
    if b < B:
        start = tl.minimum(tl.maximum(tl.load(cu_nodes + b), 0), N)
        size = tl.minimum(tl.maximum(tl.load(cu_nodes + b + 1), start), N) - start
        prefix = 0
        if prefix_lens is not None:
            prefix = tl.load(prefix_lens + b)
        for begin in range(first, size, step):
            node = begin + lane
            exists = node < size
            at = tl.where(exists, node, -1)
            depth = tl.full((NODES,), -1, tl.int32)
            found = tl.zeros((NODES, WORDS), tl.int64)
            while tl.max(at, 0) >= 0:
                here = at >= 0
                depth += here.to(tl.int32)
                own = here[:, None] & ((at >> 6)[:, None] == word[None, :])
                found |= tl.where(own, tl.full((NODES, 1), 1, tl.int64) << (at & 63).to(tl.int64)[:, None], 0)
                # Whatever stands in `parents`, they come before their children, so every walk ends.
                at = tl.minimum(tl.load(parents + start + at, mask=here, other=-1), at - 1)
            row = (start + node).to(tl.int64)
            tl.store(depths + row, depth, mask=exists)
            tl.store(positions + row, prefix + depth, mask=exists)
            inside = exists[:, None] & (word < words)[None, :]
            tl.store(bits + row[:, None] * words + word[None, :], found, mask=inside)
    else:
        # Nodes before the first request and behind the last one: zeros.
        before = tl.minimum(tl.maximum(tl.load(cu_nodes), 0), N)
        behind = tl.minimum(tl.maximum(tl.load(cu_nodes + B), 0), N)
        for begin in range(first, before + N - behind, step):
            node = begin + lane
            node = tl.where(node < before, node, node - before + behind)
            exists = node < N
            row = node.to(tl.int64)
            nothing = tl.zeros((NODES,), tl.int32)
            tl.store(depths + row, nothing, mask=exists)
            tl.store(positions + row, nothing, mask=exists)
            inside = exists[:, None] & (word < words)[None, :]
            tl.store(bits + row[:, None] * words + word[None, :], tl.zeros((NODES, WORDS), tl.int64), mask=inside)


def layout_arguments(
    parents: Tensor, cu_nodes: Tensor, max_nodes: int, prefix_lens: Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor], dict, dict, tuple[int, int]]:
    """(the op's outputs, the kernel's arguments by name, its options, its grid)."""
    N, B = parents.shape[0], cu_nodes.shape[0] - 1
    words = (max_nodes + 63) // 64
    depths = parents.new_empty((N,))
    outputs = (depths, parents.new_empty((N, words), dtype=torch.int64), torch.empty_like(depths))
    arguments = {
        "parents": parents.contiguous(),
        "cu_nodes": cu_nodes.contiguous(),
        "prefix_lens": None if prefix_lens is None else prefix_lens.contiguous(),
        "depths": outputs[0],
        "bits": outputs[1],
        "positions": outputs[2],
        "N": N,
        "B": B,
        "words": words,
        "NODES": 64,
        "WORDS": triton.next_power_of_2(words),
    }
    grid = (B + 1, max(triton.cdiv(min(max_nodes, N), 64), 1))
    return outputs, arguments, {"num_warps": 2}, grid


def tree_layout(
    parents: Tensor, cu_nodes: Tensor, max_nodes: int, prefix_lens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Triton kernel of the op `tree_layout`."""
    outputs, arguments, options, grid = layout_arguments(parents, cu_nodes, max_nodes, prefix_lens)
    if parents.shape[0]:
        with torch.cuda.device(parents.device) if parents.is_cuda else contextlib.nullcontext():
            layout_kernel[grid](**arguments, **options)
    return outputs
