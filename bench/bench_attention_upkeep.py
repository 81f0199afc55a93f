"""What a step of tree attention needs around it: the accepted path moved through all caches, and where nodes stand.

`compact_kv_` stands beside the best that plain torch does: every slot's index for all heads made once for all layers
(not timed), then for each cache one `index_select` into a buffer that is there already and one `index_copy_`. The share
of the copy bandwidth counts the bytes that have to be read and written. `tree_layout` stands beside pointer doubling in
torch, which is vectorised over all trees. Run with pinned threads:
OMP_PROC_BIND=true OMP_PLACES=cores python -m pytest bench/bench_attention_upkeep.py -s
"""

from __future__ import annotations

import pytest
import torch
from common import compare

import specdec_kernels as sk
from specdec_kernels.trees import tree_layout

HEADS, SIZE, LAYERS, PATH, NODES = 8, 128, 32, 6, 64


def paths(batch: int) -> torch.Tensor:
    """[B, PATH] accepted paths through trees of NODES nodes, the root first."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randperm(NODES - 1, generator=generator)[: PATH - 1].sort().values + 1 for _ in range(batch)]
    return torch.stack([torch.cat([torch.zeros(1, dtype=torch.int64), row]) for row in rows]).to(torch.int32)


def slots_of(nodes: torch.Tensor, prefix_lens: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sources and targets of all requests, heads and steps: rows of a dense cache that is seen as [B * Hkv * L, D]."""
    batch = nodes.shape[0]
    lanes = torch.arange(batch * HEADS).view(batch, HEADS, 1) * length + prefix_lens.long()[:, None, None]
    steps = torch.arange(1, PATH)
    return (lanes + nodes[:, None, 1:].long()).flatten(), (lanes + steps).flatten()


@pytest.mark.parametrize(("batch", "length"), [(1, 16384), (8, 2048), (32, 512)])
@pytest.mark.parametrize("layout", ["dense", "paged"])
def test_compaction(benchmark, batch, length, layout):
    nodes = paths(batch)
    prefix_lens = torch.randint(length // 2, length - NODES, (batch,), dtype=torch.int32)
    caches = [torch.zeros(batch, HEADS, length, SIZE, dtype=torch.bfloat16) for _ in range(2 * LAYERS)]
    rows = [cache.view(-1, SIZE) for cache in caches]
    source, target = slots_of(nodes, prefix_lens, length)
    table, width = None, SIZE
    if layout == "paged":
        block = 16
        table = torch.randperm(batch * length // block).to(torch.int32).view(batch, -1)
        caches = [cache.view(-1, block, HEADS, SIZE) for cache in caches]
        rows, width = [cache.view(-1, HEADS * SIZE) for cache in caches], HEADS * SIZE

        def physical(slots):
            logical = table.gather(1, slots.div(block, rounding_mode="floor")).long()
            return (logical * block + slots % block).flatten()

        start = prefix_lens.long()[:, None]
        source, target = physical(start + nodes[:, 1:]), physical(start + torch.arange(1, PATH))
    moved = 2 * len(caches) * batch * HEADS * (PATH - 1) * SIZE * 2
    buffer = torch.empty(len(source), width, dtype=torch.bfloat16)
    here, there = torch.ones(2**27, dtype=torch.int32), torch.empty(2**27, dtype=torch.int32)

    def baseline():
        for cache in rows:
            torch.index_select(cache, 0, source, out=buffer)
            cache.index_copy_(0, target, buffer)

    compare(
        benchmark,
        lambda: sk.compact_kv_(caches, nodes, prefix_lens, block_table=table),
        {"index_copy": baseline},
        copy=(lambda: there.copy_(here), 2 * here.nbytes),
        bytes_read=moved,
    )


@pytest.mark.parametrize(("batch", "nodes"), [(1, 64), (8, 64), (64, 64), (1, 1024)])
def test_layout(benchmark, batch, nodes):
    generator = torch.Generator().manual_seed(0)
    parents = torch.cat(
        [(torch.rand(nodes, generator=generator) * torch.arange(nodes)).long() - (torch.arange(nodes) == 0).long()]
        * batch
    ).to(torch.int32)
    cu_nodes = torch.arange(batch + 1, dtype=torch.int32) * nodes
    tree = sk.DraftTree(parents, parents, cu_nodes, nodes, nodes)
    prefix_lens = torch.full((batch,), 100, dtype=torch.int32)
    compare(
        benchmark,
        lambda: tree_layout(tree, prefix_lens),
        {"doubling": lambda: tree_layout(tree, prefix_lens, backend="reference")},
        rounds=30,
    )
