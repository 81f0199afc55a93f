"""Tree attention against the best of PyTorch's own: SDPA with a mask, in whatever form is the fastest.

Hq 32, Hkv 8, D 128, one request. The mask is there before the clock starts, as bool or as the floats that are added;
the query's groups are given as such (enable_gqa), folded into rows, or met with repeated caches, which are repeated
before the clock starts. Run with pinned threads:
OMP_PROC_BIND=true OMP_PLACES=cores python -m pytest bench/bench_attention.py -s
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from common import compare, timed

import specdec_kernels as sk

Q_HEADS, KV_HEADS, SIZE = 32, 8, 128
GROUP = Q_HEADS // KV_HEADS
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Problem:
    """A binary tree of `nodes` nodes behind `prefix` slots."""

    def __init__(self, dtype: torch.dtype, nodes: int, prefix: int):
        generator = torch.Generator().manual_seed(0)
        self.query = torch.randn(nodes, Q_HEADS, SIZE, generator=generator).to(dtype)
        # Keys and values in one tensor, so that its bytes are what has to be read.
        self.cache = torch.randn(2, 1, KV_HEADS, prefix + nodes, SIZE, generator=generator).to(dtype)
        self.keys, self.values = self.cache
        parents = torch.tensor([(node - 1) // 2 if node else -1 for node in range(nodes)], dtype=torch.int32)
        cu_nodes = torch.tensor([0, nodes], dtype=torch.int32)
        self.tree = sk.DraftTree(parents, parents, cu_nodes, nodes, nodes)
        self.prefix_lens = torch.tensor([prefix], dtype=torch.int32)
        self.layout = sk.trees.tree_layout(self.tree)  # one for all layers of a model
        index = torch.arange(nodes)
        self.mask = torch.ones(nodes, prefix + nodes, dtype=torch.bool)
        self.mask[:, prefix:] = (self.layout.ancestor_bits[:, index >> 6] >> (index & 63) & 1).bool()

    def ours(self):
        return sk.tree_attention(self.query, self.keys, self.values, self.tree, self.prefix_lens, layout=self.layout)

    def sdpa(self) -> dict:
        nodes, sdpa = len(self.query), F.scaled_dot_product_attention
        keys, values = self.keys, self.values
        by_head = self.query.transpose(0, 1)[None].contiguous()
        folded = self.query.view(nodes, KV_HEADS, GROUP, SIZE).permute(1, 2, 0, 3).reshape(1, KV_HEADS, -1, SIZE)
        repeated = [cache.repeat_interleave(GROUP, 1) for cache in self.cache]
        added = torch.zeros(self.mask.shape, dtype=self.query.dtype).masked_fill(~self.mask, float("-inf"))
        forms = {}
        for name, mask in (("bool", self.mask), ("float", added)):
            rows = mask.repeat(GROUP, 1)
            forms[f"folded_{name}"] = lambda rows=rows: sdpa(folded, keys, values, rows)
            forms[f"grouped_{name}"] = lambda mask=mask: sdpa(by_head, keys, values, mask, enable_gqa=True)
            forms[f"repeated_{name}"] = lambda mask=mask: sdpa(by_head, *repeated, mask)
        if nodes == 1:
            forms["folded_unmasked"] = lambda: sdpa(folded, keys, values)
        return forms


def best_of(problem: Problem) -> dict:
    """The fastest form alone, so that the others do not take its place in the caches."""
    forms = problem.sdpa()
    for form in forms.values():
        form()
    seconds = {name: min(timed(form) for _ in range(3)) for name, form in forms.items()}
    best = min(seconds, key=seconds.get)
    return {f"sdpa_{best}": forms[best]}


@pytest.mark.parametrize("nodes", [4, 16, 32, 64])
@pytest.mark.parametrize("prefix", [1024, 4096, 16384])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_trees(benchmark, dtype, prefix, nodes):
    problem = Problem(dtype, nodes, prefix)
    flops = 4 * Q_HEADS * nodes * problem.cache.shape[-2] * SIZE
    compare(benchmark, problem.ours, best_of(problem), rounds=max(10, min(300, 2**35 // flops)))
    if benchmark.stats is not None:
        benchmark.extra_info["gflop_per_s"] = flops / benchmark.stats.stats.min / 1e9


@pytest.mark.parametrize("prefix", [1024, 4096, 16384])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_plain_decoding(benchmark, dtype, prefix):
    """One token through the caches of as many layers as no cache of the machine holds."""
    problem = Problem(dtype, 1, prefix)
    layers = torch.empty(-(-(2**28) // problem.cache.nbytes), *problem.cache.shape, dtype=dtype)
    layers[:] = problem.cache
    caches = [tuple(layer) for layer in layers]

    def ours():
        for keys, values in caches:
            sk.tree_attention(
                problem.query, keys, values, problem.tree, problem.prefix_lens, layout=problem.layout
            )  # fmt: skip

    def sdpa():
        query = problem.query.view(1, KV_HEADS, GROUP, SIZE)
        for keys, values in caches:
            F.scaled_dot_product_attention(query, keys, values)

    compare(benchmark, ours, {"sdpa_folded": sdpa}, memory=layers, bytes_read=layers.nbytes, rounds=40)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_one_prefix_for_eight_requests(benchmark, dtype):
    """Trees of 8 nodes behind one prefix of 8192 slots, against the same requests with a copy each."""
    batch, nodes, prefix = 8, 8, 8192
    problem = Problem(dtype, nodes, prefix)
    query = problem.query.repeat(batch, 1, 1)
    cache = problem.cache.expand(-1, batch, -1, -1, -1).contiguous()
    parents = problem.tree.parents.repeat(batch)
    cu_nodes = torch.arange(batch + 1, dtype=torch.int32) * nodes
    tree = sk.DraftTree(parents, parents, cu_nodes, nodes, nodes)
    lens = torch.full((batch,), prefix, dtype=torch.int32)
    shared = sk.SharedPrefix(torch.zeros(batch, dtype=torch.int32), lens)
    layout = sk.trees.tree_layout(tree)

    def ours(shared=shared):
        return sk.tree_attention(query, *cache, tree, lens, layout=layout, shared=shared)

    compare(benchmark, ours, {"a_copy_each": lambda: ours(None)})
