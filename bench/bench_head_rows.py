"""Heads that read a part of their bytes: lists of rows for each request or tree, picked by a router, and low rank.

D = 4096, V = 128256, k = 8, bf16. Run with pinned threads:
OMP_PROC_BIND=true OMP_PLACES=cores python -m pytest bench/bench_head_rows.py -s
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from bench_head import DIM, VOCABULARY, K, hidden, torch_topk, weight
from common import compare

import specdec_kernels as sk

DTYPE = torch.bfloat16
RANK = 512


def lists(count: int, size: int) -> torch.Tensor:
    """[count, size] int32: rows of lists that have little in common."""
    generator = torch.Generator().manual_seed(4)
    return torch.stack([torch.randperm(VOCABULARY, generator=generator)[:size] for _ in range(count)]).to(torch.int32)


def best_of(logits):
    logits = logits.float()
    return torch.topk(logits, K), torch.logsumexp(logits, -1)


@pytest.mark.parametrize(("batch", "size"), [(1, 8192), (10, 2048)], ids=["B1-8192", "B10-2048"])
def test_lists_of_each_request(benchmark, batch, size):
    x, w, rows = hidden(batch, DTYPE), weight(DTYPE), lists(batch, size)
    flat, copy = rows.flatten(), torch.empty(batch * size, DIM, dtype=DTYPE)

    def gather_and_multiply():
        torch.index_select(w, 0, flat, out=copy)
        if batch == 1:  # where torch's batched product is several times slower
            return best_of(F.linear(x, copy))
        return best_of(torch.einsum("bd,brd->br", x, copy.view(batch, size, DIM)))

    compare(
        benchmark,
        lambda: sk.head_topk(x, w, K, rows=rows),
        {"gather_copy_einsum": gather_and_multiply},
        memory=copy,
        bytes_read=copy.nbytes,
        rounds=15,
    )


@pytest.mark.parametrize(("trees", "nodes"), [(1, 10), (4, 4)], ids=["1-tree-of-10", "4-trees-of-4"])
def test_lists_of_trees(benchmark, trees, nodes):
    size = 8192
    x, w, rows = hidden(trees * nodes, DTYPE), weight(DTYPE), lists(trees, size)
    groups = torch.arange(trees, dtype=torch.int32).repeat_interleave(nodes)
    own = rows[groups].contiguous()
    copy = torch.empty(trees * size, DIM, dtype=DTYPE)
    flat = rows.flatten()

    def gather_and_multiply():
        torch.index_select(w, 0, flat, out=copy)
        logits = torch.bmm(x.view(trees, nodes, DIM), copy.view(trees, size, DIM).transpose(1, 2))
        return best_of(logits.flatten(0, 1))

    compare(
        benchmark,
        lambda: sk.head_topk(x, w, K, rows=rows, row_groups=groups),
        {"a_list_for_each_node": lambda: sk.head_topk(x, w, K, rows=own), "gather_copy_bmm": gather_and_multiply},
        memory=copy,
        bytes_read=copy.nbytes,
        rounds=15,
    )


@functools.lru_cache(maxsize=1)
def clusters() -> sk.RowClusters:
    """501 clusters of 256 rows. What is timed is how they are picked and read, not how they were found."""
    generator = torch.Generator().manual_seed(5)
    w = weight(DTYPE)
    rows = torch.randperm(VOCABULARY, generator=generator).view(501, 256).sort(1).values.to(torch.int32)
    centroids = torch.stack([w[line].float().mean(0) for line in rows]).to(DTYPE)
    spreads = torch.full((501,), 9 / DIM)
    return sk.RowClusters(rows, centroids, spreads, torch.empty(0, dtype=torch.int32))


@pytest.mark.parametrize("nodes", [1, 8])
def test_router_and_head(benchmark, nodes):
    """One tree whose nodes pick 16 clusters each, at most 32 together."""
    x, w, table = hidden(nodes, DTYPE), weight(DTYPE), clusters()
    groups = torch.zeros(nodes, dtype=torch.int32)
    fixed = sk.route(x, table, 16, row_groups=groups, groups=1, budget=32).rows
    listed = fixed[fixed >= 0]

    def routed():
        found = sk.route(x, table, 16, row_groups=groups, groups=1, budget=32)
        return sk.head_topk(x, w, K, rows=found.rows, row_groups=groups)

    compare(
        benchmark,
        routed,
        {
            "the_whole_head": lambda: sk.head_topk(x, w, K),
            "the_same_rows_fixed": lambda: sk.head_topk(x, w, K, rows=listed),
        },
        memory=w[: len(listed)],
        bytes_read=len(listed) * DIM * w.element_size() + table.centroids.nbytes,
        rounds=10,
    )


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_low_rank(benchmark, batch):
    generator = torch.Generator().manual_seed(6)
    x = hidden(batch, DTYPE)
    down = (torch.randn(RANK, DIM, generator=generator) / DIM**0.5).to(DTYPE)
    up = (torch.randn(VOCABULARY, RANK, generator=generator) * (3 / RANK**0.5)).to(DTYPE)
    w = weight(DTYPE)
    compare(
        benchmark,
        lambda: sk.low_rank_head(x, down, up, K),
        {
            "two_linears_topk_lse": lambda: torch_topk(F.linear(x, down), up),
            "the_whole_head": lambda: sk.head_topk(x, w, K),
        },
        memory=up,
        bytes_read=up.nbytes + down.nbytes,
        rounds=12,
    )
