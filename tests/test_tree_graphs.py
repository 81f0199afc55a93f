"""Graphs for tree attention: who sees whom and where, against dense masks that loops write down."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loop_support import llama, one_thread  # noqa: F401 (a fixture)
from specdec_kernels import DraftTree, tree_attention, trees
from specdec_loop import attend


def ints(values, shape=(-1,)):
    return torch.tensor(values, dtype=torch.int32).view(shape)


def unpacked(bits: torch.Tensor, columns: int) -> torch.Tensor:
    """[N, columns] bool, word by word and bit by bit; bits behind the columns have to be 0."""
    rows = [[int(word) % 2**64 >> j & 1 for word in row for j in range(64)] for row in bits]
    dense = torch.tensor(rows, dtype=torch.bool).view(bits.shape[0], -1)
    assert not dense[:, columns:].any()
    return dense[:, :columns]


def attended(graph: trees.TreeGraph, mask, positions, prefixes, window=None) -> None:
    """tree_attention over the graph equals one dense float64 softmax for each node; `positions` without the prefix."""
    generator = torch.Generator().manual_seed(0)
    sizes = graph.tree.cu_nodes.diff().tolist()
    length = max(p + n for p, n in zip(prefixes, sizes, strict=True)) + 2
    query = torch.randn(sum(sizes), 2, 8, generator=generator)
    keys, values = torch.randn(2, len(sizes), 1, length, 8, generator=generator).unbind()
    out = tree_attention(query, keys, values, graph.tree, ints(prefixes), layout=graph.layout, window=window)
    row = 0
    for b, (prefix, size) in enumerate(zip(prefixes, sizes, strict=True)):
        for _ in range(size):
            here = prefix + positions[row]
            slots = [s for s in range(prefix) if window is None or here - s < window]
            for j in range(size):
                there = prefix + positions[sum(sizes[:b]) + j]
                if mask[row][j] and (window is None or here - there < window):
                    slots.append(prefix + j)
            weights = torch.softmax(query[row].double() @ keys[b, 0, slots].double().T / math.sqrt(8), 1)
            torch.testing.assert_close(out[row].double(), weights @ values[b, 0, slots].double(), atol=1e-5, rtol=1e-5)
            row += 1


def test_masks_are_packed_bit_by_bit():
    generator = torch.Generator().manual_seed(0)
    for columns in (1, 63, 64, 65, 200):
        mask = torch.rand(7, columns, generator=generator) < 0.5
        bits = trees.pack_mask(mask)
        assert bits.dtype == torch.int64 and bits.shape == (7, math.ceil(columns / 64))
        assert unpacked(bits, columns).equal(mask)
    assert trees.pack_mask(torch.ones(0, 3, dtype=torch.bool)).shape == (0, 1)
    with pytest.raises(TypeError, match="mask: expected dtype bool, got int32"):
        trees.pack_mask(ints([[1]], (1, 1)))


@st.composite
def graphs(draw):
    """For each request the parents of each node but the first: any subset of the nodes in front, seldom none."""
    sizes = draw(st.lists(st.integers(1, 80), min_size=1, max_size=3))
    near = draw(st.booleans())
    return [
        [set()] + [draw(st.sets(st.integers(max(0, i - 4) if near else 0, i - 1), max_size=3)) for i in range(1, n)]
        for n in sizes
    ]


@settings(max_examples=40, deadline=None)
@given(graphs(), st.integers(0, 60), st.randoms(use_true_random=False))
def test_nodes_of_a_graph_see_all_that_leads_to_them(requests, slack, random):
    starts = [0, *itertools.accumulate(map(len, requests))]
    edges = [(s + i, s + p) for s, r in zip(starts, requests, strict=False) for i, ps in enumerate(r) for p in ps]
    edges += [(-1, -1)] * random.randint(0, 3)
    random.shuffle(edges)
    most = max(map(len, requests)) + slack
    prefixes = ints([10 * b for b in range(len(requests))])
    mask = torch.zeros(starts[-1], most, dtype=torch.bool)
    depths, row = [], 0
    for request in requests:
        mine = []
        for i, parents in enumerate(request):
            seen = {i}.union(*(mine[p][0] for p in parents))
            mine.append((seen, 1 + max((mine[p][1] for p in parents), default=-1)))
            mask[row, list(seen)] = True
            row += 1
        depths += [depth for _, depth in mine]
    graph = trees.graph_layout(ints(edges, (-1, 2)), ints(starts), starts[-1], most, max(depths), prefixes)
    assert unpacked(graph.layout.ancestor_bits, most).equal(mask)
    assert graph.layout.depths.tolist() == depths
    owner = [b for b, request in enumerate(requests) for _ in request]
    assert graph.layout.positions.tolist() == [10 * b + d for b, d in zip(owner, depths, strict=True)]
    assert all(x.dtype == torch.int32 for x in (graph.layout.depths, graph.layout.positions, graph.tree.parents))
    assert graph.tree.max_nodes == most and graph.tree.cu_nodes.tolist() == starts
    # A tree is a graph whose nodes have one parent, and the parents of a graph make a tree.
    highest = [max(ps, default=0) if i else -1 for request in requests for i, ps in enumerate(request)]
    assert graph.tree.parents.tolist() == highest
    single = [(s + i, s + max(ps, default=0)) for s, r in zip(starts, requests, strict=False) for i, ps in enumerate(r)]
    single = [(child, parent) for child, parent in single if child not in starts]
    as_graph = trees.graph_layout(ints(single, (-1, 2)), ints(starts), starts[-1], most, most, prefixes)
    for got, want in zip(as_graph.layout, trees.tree_layout(graph.tree, prefixes), strict=True):
        assert got.equal(want)


@pytest.mark.parametrize("window", [None, 4])
def test_a_lattice_is_attended(window):
    """Drafts `a b d` and `a c d` that merge in their last token, beside a request with a plain chain."""
    edges = [(1, 0), (2, 1), (3, 1), (4, 2), (4, 3), (6, 5)]
    graph = trees.graph_layout(ints(edges, (-1, 2)), ints([0, 5, 7]), 7, 5, 3, ints([6, 0]))
    seen = [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 2, 3, 4], [0], [0, 1]]
    mask = [[j in row for j in range(5)] for row in seen]
    attended(graph, mask, [0, 1, 2, 2, 3, 0, 1], [6, 0], window)


def test_edges_that_do_not_fit_are_passed_over(monkeypatch):
    good = [(1, 0), (2, 1), (4, 3)]
    want = trees.graph_layout(ints(good, (-1, 2)), ints([0, 3, 5]), 5, 3, 2)
    for bad in ((0, 1), (2, 2), (3, 2), (9, 1), (1, -5), (2**31 - 1, -(2**31))):
        edges = ints([*good, bad], (-1, 2))
        got = trees.graph_layout(edges, ints([0, 3, 5]), 5, 3, 2)
        assert all(a.equal(b) for a, b in zip(got.layout, want.layout, strict=True))
        monkeypatch.setattr("specdec_kernels.tree_graphs.DEBUG", True)
        with pytest.raises(
            ValueError, match=f"edges: expected parents before children of the same request, got {bad[1]}"
        ):
            trees.graph_layout(edges, ints([0, 3, 5]), 5, 3, 2)
        monkeypatch.undo()
    for cu_nodes in ([3, 1], [-4, 9], [9, 9], [0, 0]):
        got = trees.graph_layout(ints(good, (-1, 2)), ints(cu_nodes), 5, 3, 2)
        assert got.layout.ancestor_bits.shape == (5, 1)
        chains = trees.mask_chains(DraftTree(ints([0] * 5), ints([0] * 5), ints(cu_nodes), 3, 2), 2, 7)
        assert chains.tree.tokens.shape == (15,)
    empty = trees.graph_layout(ints(good, (-1, 2)), ints([0]), 0, 1, 2)
    assert empty.layout.ancestor_bits.shape == (0, 1)
    with pytest.raises(ValueError, match=r"edges: expected shape \[E, 2\], got \[3\]"):
        trees.graph_layout(ints([1, 2, 3]), ints([0, 3]), 3, 3, 2)
    with pytest.raises(ValueError, match=r"prefix_lens: expected shape \[B=1\], got \[2\]"):
        trees.graph_layout(ints(good, (-1, 2)), ints([0, 3]), 3, 3, 2, ints([1, 2]))


def blocks_by_hand(replaces: list[int], real: int, size: int, causal: bool):
    """(mask, positions) of one request."""
    count = (real + len(replaces)) * size
    mask = [[False] * count for _ in range(count)]
    positions = []
    for i in range(count):
        block, offset = divmod(i, size)
        stands = block if block < real else replaces[block - real]
        positions.append(max(stands, 0) * size + offset)
        for j in range(count):
            other = j // size
            if other == block:
                mask[i][j] = True
            elif other < real and stands >= 0 and other != stands:
                mask[i][j] = other < stands or not causal
    return mask, positions


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("real", "size"), [(1, 4), (3, 5), (2, 40)])
def test_draft_blocks(real, size, causal):
    replaces = [[0, real - 1, 0], [real - 1, -1, -1]]
    prefixes = ints([7, 0])
    graph = trees.draft_blocks(ints(replaces, (2, 3)), real, size, prefixes, causal=causal)
    made = [blocks_by_hand(row, real, size, causal) for row in replaces]
    mask = [row for rows, _ in made for row in rows]
    positions = [p for _, row in made for p in row]
    assert unpacked(graph.layout.ancestor_bits, graph.tree.max_nodes).tolist() == mask
    assert graph.layout.depths.tolist() == positions
    count = (real + 3) * size
    assert graph.layout.positions.tolist() == [p + 7 * (i < count) for i, p in enumerate(positions)]
    assert graph.tree.cu_nodes.tolist() == [0, count, 2 * count] and graph.tree.max_nodes == count
    if size < 40:
        attended(graph, mask, positions, [7, 0])
        attended(graph, mask, positions, [7, 0], window=6)


def test_draft_blocks_name_bad_arguments(monkeypatch):
    got = trees.draft_blocks(ints([[5, -9]], (1, 2)), 2, 3)
    want = trees.draft_blocks(ints([[-1, -1]], (1, 2)), 2, 3)
    assert all(a.equal(b) for a, b in zip(got.layout, want.layout, strict=True))
    monkeypatch.setattr("specdec_kernels.tree_graphs.DEBUG", True)
    with pytest.raises(ValueError, match=r"replaces: expected -1 or blocks 0..1, got 5 at index 0"):
        trees.draft_blocks(ints([[5, -1]], (1, 2)), 2, 3)
    with pytest.raises(ValueError, match="block_size: expected >= 1, got 0"):
        trees.draft_blocks(ints([[0]], (1, 1)), 2, 0)
    with pytest.raises(TypeError, match="replaces: expected dtype int32, got int64"):
        trees.draft_blocks(torch.zeros(1, 1, dtype=torch.int64), 2, 3)


@pytest.mark.parametrize("k", [0, 1, 3, 30])
def test_mask_chains(k):
    tree = DraftTree.from_paths([[[5, 6], [5, 7], [8]], [], [[1, 2, 3]]], [4, 9, 2])
    prefixes = ints([11, 3, 0])
    chains = trees.mask_chains(tree, k, 60, prefixes)
    starts, grown = tree.cu_nodes.tolist(), chains.tree
    assert grown.cu_nodes.tolist() == [start * (1 + k) for start in starts]
    assert (grown.max_nodes, grown.max_depth) == (tree.max_nodes * (1 + k), tree.max_depth + k)
    assert sorted([*chains.candidates.tolist(), *chains.masks.flatten().tolist()]) == list(range(len(grown.tokens)))
    assert grown.tokens[chains.candidates].equal(tree.tokens) and (grown.tokens[chains.masks] == 60).all()
    dense = unpacked(chains.layout.ancestor_bits, grown.max_nodes)
    before, depths = unpacked(tree.ancestor_bits(), tree.max_nodes), tree.depths().tolist()
    for b in range(3):
        first, size, start = starts[b], starts[b + 1] - starts[b], starts[b] * (1 + k)
        for i in range(size):
            # Candidates keep their places, and see what they saw.
            assert chains.candidates[first + i] == start + i
            path = before[first + i].nonzero()[:, 0].tolist()
            assert dense[start + i].nonzero()[:, 0].tolist() == path
            assert chains.layout.positions[start + i] == prefixes[b] + depths[first + i]
            own = []
            for row in chains.masks[first + i].tolist():
                own.append(row - start)
                assert dense[row].nonzero()[:, 0].tolist() == sorted(path + own)
                assert chains.layout.positions[row] == prefixes[b] + depths[first + i] + len(own)
    with pytest.raises(ValueError, match="k: expected >= 0, got -1"):
        trees.mask_chains(tree, -1, 60)


@torch.no_grad()
def test_a_model_runs_on_blocks_and_chains():
    """Logits of a Llama over a graph are those of its own eager attention under the dense mask."""
    model = llama(3, vocab=61)
    model.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, 61, (9,), generator=generator)
    prefix = ints([8])
    tree = DraftTree.from_paths([[[5, 6], [5, 7], [8]]], [int(prompt[-1])])
    for graph in (trees.draft_blocks(ints([[0, 1, 1]], (1, 3)), 2, 4, prefix), trees.mask_chains(tree, 3, 60, prefix)):
        count = graph.tree.max_nodes
        tokens = torch.randint(0, 61, (count,), generator=generator)
        seen = torch.ones(8 + count, 8 + count, dtype=torch.bool).tril()
        seen[8:, 8:] = unpacked(graph.layout.ancestor_bits, count)
        mask = torch.zeros(1, 1, 8 + count, 8 + count).masked_fill_(~seen, torch.finfo(torch.float32).min)
        positions = torch.cat([torch.arange(8), graph.layout.positions.long()])
        ids = torch.cat([prompt[:8], tokens])
        expected = model(ids[None], attention_mask=mask, position_ids=positions[None], use_cache=False).logits[0, 8:]
        cache = attend.SlotCache(8 + count, torch.full((1,), 100))
        with attend.attending(model):
            attend.prefill(model, cache, [prompt])
            positions, step = attend.tree_step(graph.tree, prefix, layout=graph.layout)
            logits = attend.forward(model, cache, tokens, positions, step).logits[0]
        tolerance = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(logits, expected, atol=tolerance, rtol=0)
