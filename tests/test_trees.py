"""Trees: where nodes stand, tries of paths, and shapes that are fixed before drafting."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec_kernels import DraftTree, trees


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


def make_tree(requests: list[list[int]], device="cpu", slack: int = 0) -> DraftTree:
    """A DraftTree of parent lists; its bounds are `slack` larger than they need to be."""
    parents = [parent for request in requests for parent in request]
    cu_nodes = [0, *itertools.accumulate(len(request) for request in requests)]
    depths = [len(ancestors(request, node)) - 1 for request in requests for node in range(len(request))]
    return DraftTree(
        torch.arange(len(parents), dtype=torch.int32, device=device),
        ints(parents).to(device),
        ints(cu_nodes).to(device),
        max(map(len, requests), default=1) + slack,
        max(depths, default=0) + slack,
    )


def ancestors(parents: list[int], node: int) -> set[int]:
    found = {node}
    while parents[node] >= 0:
        node = parents[node]
        found.add(node)
    return found


@st.composite
def parent_lists(draw, max_nodes: int = 140):
    nodes = draw(st.integers(1, max_nodes))
    deep = draw(st.booleans())  # long chains as well as bushes
    return [-1] + [draw(st.integers(max(0, node - 3) if deep else 0, node - 1)) for node in range(1, nodes)]


@settings(max_examples=60, deadline=None)
@given(st.lists(parent_lists(), max_size=4), st.integers(0, 70))
def test_layout_is_the_naive_walk(requests, slack):
    tree = make_tree(requests, slack=slack)
    depths, bits = tree.depths(), tree.ancestor_bits()
    assert depths.dtype == torch.int32 and bits.dtype == torch.int64
    assert bits.shape == (len(tree.tokens), math.ceil(tree.max_nodes / 64))
    row = 0
    for request in requests:
        for node in range(len(request)):
            seen = ancestors(request, node)
            assert depths[row] == len(seen) - 1
            words = [int(word) % 2**64 for word in bits[row]]
            assert {j for j in range(tree.max_nodes) if words[j // 64] >> (j % 64) & 1} == seen
            row += 1


@pytest.mark.parametrize("requests", [[], [[-1]], [[-1, *range(199)]], [[-1], [-1, 0], [-1, 0, 0]]])
def test_layout_edge_shapes(requests, device):
    depths, bits, _ = trees.tree_layout(make_tree(requests, device))
    assert depths.tolist() == [len(ancestors(r, n)) - 1 for r in requests for n in range(len(r))]
    assert bits.device.type == device


def test_layout_ignores_padding_rows_and_survives_bad_parents():
    tree = make_tree([[-1, 0, 1], [-1, 0]])
    padded = tree._replace(parents=torch.cat([tree.parents, ints([5, -9, 40])]))
    depths, bits, _ = trees.tree_layout(padded)
    assert depths[:5].equal(tree.depths()) and bits[:5].equal(tree.ancestor_bits())


@pytest.mark.parametrize("cu_nodes", [[3, 2], [0, 9], [-100, 2], [0, 5, 2], [7, -7, 4], [2, 2, 2]])
@pytest.mark.parametrize("parents", [[-1, 2, 0, 4, 1], [9, 9, -9, 9, 9], [-1, 0, 1, 2, 3]])
@pytest.mark.parametrize("max_nodes", [1, 3, 70])
def test_layout_stays_in_bounds_whatever_it_is_given(cu_nodes, parents, max_nodes):
    depths, bits, _ = trees.tree_layout(DraftTree(ints(parents), ints(parents), ints(cu_nodes), max_nodes, 4))
    assert bits.shape == (5, (max_nodes + 63) // 64)
    assert (depths >= 0).all() and (depths <= torch.arange(5)).all()


def test_layout_makes_a_parent_that_comes_late_the_node_before():
    good, bad = make_tree([[-1, 0, 1, 0]]), make_tree([[-1, 0, 1, 0]])._replace(parents=ints([-1, 3, 2, 0]))
    for got, want in zip(trees.tree_layout(bad), trees.tree_layout(good), strict=True):
        assert got.equal(want)


def test_layout_op_contract():
    tree = make_tree([[-1, 0, 0, 1], [-1, 0]])
    torch.library.opcheck(torch.ops.specdec_kernels.tree_layout.default, (tree.parents, tree.cu_nodes, 70, None))
    compiled = torch.compile(lambda t: trees.tree_layout(t), fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(tree), trees.tree_layout(tree), strict=True):
        assert got.equal(want)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"parents": torch.zeros(3)}, TypeError, "tree.parents: expected dtype int32, got float32"),
        ({"parents": ints([[-1]])}, ValueError, r"tree.parents: expected shape \[N\], got \[1, 1\]"),
        ({"cu_nodes": ints([])}, ValueError, r"tree.cu_nodes: expected shape \[B\+1\] with B >= 0, got \[0\]"),
        ({"max_nodes": 0}, ValueError, "tree.max_nodes: expected >= 1, got 0"),
        ({"max_depth": -1}, ValueError, "tree.max_depth: expected >= 0, got -1"),
        ({"max_depth": 2.0}, TypeError, "tree.max_depth: expected an int, got float"),
    ],
)
def test_layout_names_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        trees.tree_layout(make_tree([[-1, 0, 1]])._replace(**change))
    with pytest.raises(TypeError, match="tree: expected a DraftTree, got list"):
        trees.tree_layout([-1, 0])


def paths_of(tree: DraftTree, request: int) -> list[tuple[int, ...]]:
    """Token paths from below the root to each node, in node order."""
    first, last = tree.cu_nodes[request : request + 2].tolist()
    tokens, parents = tree.tokens[first:last].tolist(), tree.parents[first:last].tolist()
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, last - first):
        assert 0 <= parents[node] < node
        paths.append((*paths[parents[node]], tokens[node]))
    return paths


def test_chains_are_trees():
    tokens = torch.tensor([[7, 1, 2], [8, 3, 4]])
    tree = DraftTree.chain(tokens)
    assert tree.tokens.dtype == torch.int32 and tree.tokens.tolist() == [7, 1, 2, 8, 3, 4]
    assert tree.parents.tolist() == [-1, 0, 1, -1, 0, 1] and tree.cu_nodes.tolist() == [0, 3, 6]
    ragged = DraftTree.chain(tokens, [1, 3])
    assert ragged.tokens.tolist() == [7, 8, 3, 4] and ragged.depths().tolist() == [0, 0, 1, 2]
    assert (ragged.cu_nodes.tolist(), ragged.max_nodes, ragged.max_depth) == ([0, 1, 4], 3, 2)
    assert DraftTree.chain(tokens[:0]).cu_nodes.tolist() == [0]
    assert all(a.equal(b) for a, b in zip(ragged[:3], DraftTree.chain(tokens, ints([1, 3]))[:3], strict=True))
    assert ragged.parents.dtype == ragged.cu_nodes.dtype == torch.int32
    none = DraftTree.chain(tokens[:0], [])
    assert (none.tokens.tolist(), none.cu_nodes.tolist(), none.max_nodes, none.max_depth) == ([], [0], 1, 0)
    with pytest.raises(TypeError, match="tokens: expected a tensor, got list"):
        DraftTree.chain([[1, 2]])
    with pytest.raises(ValueError, match=r"lengths: expected values in 1..3, got \[0, 3\]"):
        DraftTree.chain(tokens, [0, 3])
    with pytest.raises(ValueError, match=r"lengths: expected shape \[2\], got \[1\]"):
        DraftTree.chain(tokens, [3])
    with pytest.raises(ValueError, match=r"tokens: expected shape \[B, K\+1\] with K >= 0, got \[3\]"):
        DraftTree.chain(tokens[0])
    with pytest.raises(ValueError, match="roots: expected one for each of the 1 requests, got 2"):
        DraftTree.from_paths([[]], [1, 2])


def test_chain_reads_nothing_back_for_lengths_on_the_host():
    tokens = torch.zeros(3, 4, dtype=torch.int32, device="meta")  # holds no values: to read one is an error
    for lengths in ([1, 4, 2], ints([1, 4, 2])):
        tree = DraftTree.chain(tokens, lengths)
        assert tree.tokens.shape == tree.parents.shape == (7,) and tree.cu_nodes.shape == (4,)
        assert {value.device.type for value in tree[:3]} == {"meta"} and (tree.max_nodes, tree.max_depth) == (4, 3)


token_paths = st.lists(st.lists(st.integers(0, 2), max_size=4).map(tuple), max_size=6)


@settings(max_examples=50, deadline=None)
@given(st.lists(token_paths, max_size=3))
def test_from_paths_is_the_trie_in_order_of_first_appearance(requests):
    tree = DraftTree.from_paths(requests, list(range(len(requests))))
    for b, request in enumerate(requests):
        prefixes = [path[:end] for path in request for end in range(1, len(path) + 1)]
        assert paths_of(tree, b) == [(), *dict.fromkeys(prefixes)]
    assert tree.max_depth == max((len(path) for request in requests for path in request), default=0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(token_paths, token_paths), min_size=1, max_size=3))
def test_merge_is_the_union_and_knows_where_nodes_came_from(requests):
    roots = list(range(len(requests)))
    a = DraftTree.from_paths([r[0] for r in requests], roots)
    b = DraftTree.from_paths([r[1] for r in requests], roots)
    merged, origin = trees.merge_trees([a, b])
    assert merged.counts is None
    sources = [*a.tokens.tolist(), *b.tokens.tolist()]
    assert [sources[row] for row in origin.tolist()] == merged.tokens.tolist()
    for request in range(len(requests)):
        union = dict.fromkeys([*paths_of(a, request), *paths_of(b, request)])
        assert paths_of(merged, request) == list(union)
    assert int(merged.depths().max()) == merged.max_depth
    again, _ = trees.merge_trees([merged, a])
    assert again.tokens.equal(merged.tokens) and again.parents.equal(merged.parents)


def test_merge_adds_up_draws_and_prefers_rows_that_were_filled():
    # Root, three draws 5, 5, 6; the first 5 is a leaf, the second has draws 8, 8, the 6 drew nothing.
    tree = DraftTree(ints([1, 5, 5, 6, 8, 8, -1, 9]), ints([-1, 0, 0, 0, 2, 2, 3, 6]), ints([0, 8]), 8, 3)
    merged, origin = trees.merge_trees([tree], draws=True)
    assert merged.tokens.tolist() == [1, 5, 6, 8]
    assert merged.parents.tolist() == [-1, 0, 0, 1]
    assert merged.counts.tolist() == [1, 2, 1, 2]
    assert origin.tolist() == [0, 2, 3, 4]
    doubled, _ = trees.merge_trees([merged, merged], draws=True)
    assert doubled.counts.tolist() == [1, 4, 2, 4]


def test_merge_names_bad_arguments():
    tree = make_tree([[-1, 0]])
    with pytest.raises(ValueError, match="trees: expected at least one DraftTree, got none"):
        trees.merge_trees([])
    with pytest.raises(ValueError, match=r"trees: expected the same number of requests in each, got \[1, 2\]"):
        trees.merge_trees([tree, make_tree([[-1], [-1]])])
    with pytest.raises(ValueError, match="trees: expected equal roots, got 0 and 3 for request 0"):
        trees.merge_trees([tree, tree._replace(tokens=ints([3, 1]))])
    for change, message in (
        ({"tokens": ints([0])}, r"tree.tokens: expected shape \[N=2\], got \[1\]"),
        ({"counts": ints([1])}, r"tree.counts: expected shape \[N=2\], got \[1\]"),
        ({"parents": ints([-1, 1])}, "tree.parents: expected parents before children, got 1 at index 1"),
        ({"parents": ints([-1, -1])}, "tree.parents: expected -1 at each root and nowhere else, got -1 at index 1"),
        ({"cu_nodes": ints([0, 1])}, "tree.cu_nodes: expected N=2 last, got 1"),
        ({"max_nodes": 1}, "tree.cu_nodes: expected 1..1 nodes a request, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            trees.merge_trees([tree._replace(**change)])


def test_static_tree_orders_choices_level_after_level():
    shape = trees.static_tree([(1,), (0, 1), (0,), (0, 0), (0, 1, 0)])
    assert shape.parents == (-1, 0, 0, 1, 1, 4)
    assert shape.ranks == (-1, 0, 1, 0, 1, 0)
    assert (shape.nodes, shape.max_depth, shape.depths) == (6, 3, (0, 1, 1, 2, 2, 3))
    assert shape.up_to(1) == trees.static_tree([(0,), (1,)])
    ranked = torch.arange(2 * 3 * 2, dtype=torch.int32).view(2, 3, 2)
    tree = shape.from_ranked(ints([70, 71]), ranked)
    assert tree.tokens.tolist() == [70, 0, 1, 2, 3, 4, 71, 6, 7, 8, 9, 10]
    assert tree.parents.tolist() == [*shape.parents, *shape.parents] and tree.cu_nodes.tolist() == [0, 6, 12]
    level = shape.levels()[1]
    assert (level.expand.tolist(), level.nodes.tolist(), level.slots.tolist()) == ([1], [3, 4], [0, 0])
    assert (level.ranks.tolist(), level.draws) == ([0, 1], 2)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([(0,), ()], r"choices: expected paths of ranks >= 0, got \(\)"),
        ([(0,), (-1,)], r"choices: expected paths of ranks >= 0, got \(-1,\)"),
        ([(0,), (0,)], r"choices: expected different paths, got \(0,\) twice"),
        ([(0,), (1, 0)], r"choices: expected every prefix to be listed, got \(1, 0\) without \(1,\)"),
    ],
)
def test_static_tree_names_bad_choices(choices, message):
    with pytest.raises(ValueError, match=message):
        trees.static_tree(choices)


def test_shapes_name_bad_arguments():
    shape = trees.branching_tree([2, 1])
    with pytest.raises(ValueError, match=r"tokens: expected shape \[B=1, nodes=5\], got \[1, 4\]"):
        shape.tree(torch.zeros(1, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"ranked: expected shape \[B, >= 2, >= 2\], got \[1, 1, 2\]"):
        shape.from_ranked(ints([0]), torch.zeros(1, 1, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"branching\[1\]: expected >= 1, got 0"):
        trees.branching_tree([2, 0])
    with pytest.raises(ValueError, match="parents: expected parents before children, got 2 at node 1"):
        trees.TreeShape((-1, 2, 0), (-1, 0, 0))
    with pytest.raises(ValueError, match="parents: expected one root and nodes in order of depth"):
        trees.TreeShape((-1, 0, 1, 0), (-1, 0, 0, 1))
    with pytest.raises(ValueError, match=r"acceptance: expected probabilities in \[0, 1\], got \[1.5\]"):
        trees.sequoia_tree([1.5], 4, 2)
    with pytest.raises(ValueError, match="target_times: expected together with draft_time, got one of them"):
        trees.sequoia_tree([0.5], 4, 2, draft_time=1.0)
    with pytest.raises(ValueError, match="target_times: expected at least 4 values, got 2"):
        trees.sequoia_tree([0.5], 4, 2, draft_time=1.0, target_times=[1.0, 1.0])


def test_branching_tree_has_every_branch():
    shape = trees.branching_tree([3, 2])
    assert shape.nodes == 10 and shape.parents == (-1, 0, 0, 0, 1, 1, 2, 2, 3, 3)
    assert shape.ranks == (-1, 0, 1, 2, 0, 1, 0, 1, 0, 1)
    assert trees.branching_tree([]).nodes == 1


def every_shape(nodes: int):
    """All ordered trees of `nodes` nodes, as lists of subtrees."""
    if nodes == 1:
        yield []
        return
    for first in range(1, nodes):
        for child in every_shape(first):
            for rest in every_shape(nodes - first):
                yield [child, *rest]


def expected_and_depth(shape, acceptance) -> tuple[float, int]:
    total, depth = 1.0, 0
    for rank, child in enumerate(shape):
        value, below = expected_and_depth(child, acceptance)
        total += (acceptance[rank] if rank < len(acceptance) else 0.0) * value
        depth = max(depth, below + 1)
    return total, depth


@pytest.mark.parametrize("acceptance", [[0.7, 0.2, 0.1], [0.4, 0.35, 0.2, 0.05], [0.9], [0.3, 0.0], [0.1, 0.6]])
def test_sequoia_beats_every_other_shape(acceptance):
    best: dict[tuple[int, int], float] = {}
    for size in range(1, 8):
        for shape in every_shape(size):
            value, depth = expected_and_depth(shape, acceptance)
            best[size, depth] = max(best.get((size, depth), -math.inf), value)
    for nodes, max_depth in itertools.product(range(1, 8), range(5)):
        shape, value = trees.sequoia_tree(acceptance, nodes, max_depth)
        assert shape.nodes <= nodes and shape.max_depth <= max_depth
        assert shape.expected_tokens(acceptance) == pytest.approx(value, abs=1e-12)
        assert value == pytest.approx(max(v for (n, d), v in best.items() if n <= nodes and d <= max_depth), abs=1e-12)
    times = [5.0, 5.1, 5.2, 6.0, 7.0, 9.0, 12.0]
    shape, value = trees.sequoia_tree(acceptance, 7, 4, draft_time=0.8, target_times=times)
    ratio = (shape.max_depth * 0.8 + times[shape.nodes - 1]) / value
    assert ratio == pytest.approx(min((d * 0.8 + times[n - 1]) / v for (n, d), v in best.items() if v > 0 and d <= 4))
