"""Draft trees: where each node stands, and how trees are drawn and grown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from . import backends, library
from .checks import INT32, check_tensor
from .reference import trees as reference
from .tree_checks import check_tree, check_tree_values
from .tree_graphs import MaskChains, TreeGraph, draft_blocks, graph_layout, mask_chains, pack_mask
from .tree_growth import (
    Beam,
    Candidates,
    beam_expand,
    eagle2_expand,
    eagle2_select,
    gumbel_top_k,
    iid_children,
)
from .tree_shapes import Level, TreeShape, branching_tree, sequoia_tree, static_tree
from .types import DraftTree, TreeLayout

__all__ = [
    "Beam",
    "Candidates",
    "Level",
    "MaskChains",
    "TreeGraph",
    "TreeShape",
    "beam_expand",
    "branching_tree",
    "draft_blocks",
    "eagle2_expand",
    "eagle2_select",
    "graph_layout",
    "gumbel_top_k",
    "iid_children",
    "mask_chains",
    "merge_trees",
    "pack_mask",
    "sequoia_tree",
    "static_tree",
    "tree_layout",
]

_LAYOUT = (
    "(Tensor parents, Tensor cu_nodes, int max_nodes, Tensor? prefix_lens) "
    "-> (Tensor depths, Tensor ancestor_bits, Tensor positions)"
)


def _layout_fake(parents: Tensor, cu_nodes: Tensor, max_nodes: int, prefix_lens: Tensor | None):
    nodes = parents.shape[0]
    return (
        parents.new_empty((nodes,), dtype=torch.int32),
        parents.new_empty((nodes, (max_nodes + 63) // 64), dtype=torch.int64),
        parents.new_empty((nodes,), dtype=torch.int32),
    )


def _layout_triton(*args):
    """The kernel imports triton, so it is looked up when it is first called."""
    from .triton.trees import tree_layout

    return tree_layout(*args)


library.declare("tree_layout", _LAYOUT, reference=reference.tree_layout, fake=_layout_fake, triton=_layout_triton)
for _backend in ("cpu", "triton", "cuda"):
    backends.serves("tree_layout", _backend)


def tree_layout(
    tree: DraftTree, prefix_lens: Tensor | None = None, *, backend: str | None = None
) -> TreeLayout:  # fmt: skip
    """Where each node stands: in its tree, and in its request.

    Args:
        tree: parents [N] int32, cu_nodes [B+1] int32, max_nodes.
        prefix_lens: [B] int32, committed tokens in front of each root. Default: none, and positions are depths.
        backend: force `reference`, `cpu`, `triton` or `cuda`.

    Returns:
        TreeLayout: depths [N] int32, edges between each node and its root; ancestor_bits [N, ceil(max_nodes/64)]
        int64, bit j of row i's words is set iff node j of the same tree is node i or one of its ancestors; positions
        [N] int32, prefix_lens + depths, what a model takes as position_ids.

    Raises:
        TypeError, ValueError: an argument that does not fit. Values are checked under SPECDEC_DEBUG=1; without it a
            parent that does not come before its child makes that node hang on the node before it, and rows that
            cu_nodes gives to no tree hold harmless numbers.
    """
    sizes: dict[str, int] = {}
    check_tree(tree, sizes)
    if prefix_lens is not None:
        check_tensor("prefix_lens", prefix_lens, sizes, "B", INT32, tree.parents.device)
    op = library.overload("tree_layout", backends.select("tree_layout", tree.parents.device.type, backend))
    return TreeLayout(*op(tree.parents, tree.cu_nodes, tree.max_nodes, prefix_lens))


def merge_trees(trees: Sequence[DraftTree], *, draws: bool = False) -> tuple[DraftTree, Tensor]:
    """The union of several trees of each request as a trie (RASD, arXiv 2503.03434; TAPS, 2603.27027).

    Equal paths become one node; siblings keep the order in which they first appear; nodes without a token (-1) go,
    with what hangs on them. Reads the trees on the host, so their values are always checked.

    Args:
        trees: one or more batches of trees; request b has the same root in each.
        draws: also add up how many i.i.d. draws hit each node (`counts`, 1 where a tree has none), for `multi_round`
            and `k_seq`. The children of merged nodes stay i.i.d. draws, so the law is kept.

    Returns:
        The merged trees, and origin [N] int64: for each node the row, in the concatenation of all trees' nodes, of a
        node it came from, one with children where there is any: it gathers `draft_logits` and hidden states.

    Raises:
        TypeError, ValueError: no trees, not DraftTrees, batches that differ in size, parents or cu_nodes
            that make no tree within its bounds, or roots that differ.
    """
    if not trees:
        raise ValueError("trees: expected at least one DraftTree, got none")
    for tree in trees:
        sizes: dict[str, int] = {}
        check_tree(tree, sizes)
        check_tensor("tree.tokens", tree.tokens, sizes, "N", INT32)
        if tree.counts is not None:
            check_tensor("tree.counts", tree.counts, sizes, "N", INT32)
    batches = sorted({len(tree.cu_nodes) - 1 for tree in trees})
    if len(batches) > 1:
        raise ValueError(f"trees: expected the same number of requests in each, got {batches}")
    host, rows = [], 0
    for tree in (_fetched(tree) for tree in trees):
        check_tree_values(tree)
        host.append(_on_host(tree, rows))
        rows += len(tree.tokens)
    merged: list[_Node] = []
    cu_nodes = [0]
    for request, parts in enumerate(zip(*host, strict=True)):
        merged += _merged(parts, request)
        cu_nodes.append(len(merged))
    device = trees[0].tokens.device

    def ints(values, dtype=torch.int32):
        return torch.tensor(list(values), dtype=dtype, device=device)

    result = DraftTree(
        ints(node.token for node in merged),
        ints(node.parent for node in merged),
        ints(cu_nodes),
        max((b - a for a, b in pairwise(cu_nodes)), default=1),
        max((node.depth for node in merged), default=0),
        ints(node.count for node in merged) if draws else None,
    )
    return result, ints((node.origin for node in merged), torch.int64)


@dataclass
class _Node:
    token: int
    parent: int
    depth: int
    count: int = 0
    origin: int = -1
    inner: bool = False  # `origin` has children


def _fetched(trees: DraftTree) -> DraftTree:
    """The same trees in host memory."""
    return DraftTree(*(value.cpu() if isinstance(value, Tensor) else value for value in trees))


def _on_host(trees: DraftTree, first: int) -> list[list[tuple[int, int, int, int]]]:
    """For each request the (token, parent, count, row) of its nodes; rows count from `first`."""
    counts = torch.ones_like(trees.tokens) if trees.counts is None else trees.counts
    columns = (trees.tokens.tolist(), trees.parents.tolist(), counts.tolist())
    nodes = list(zip(*columns, range(first, first + len(counts)), strict=True))
    return [nodes[a:b] for a, b in pairwise(trees.cu_nodes.tolist())]


def _merged(parts: Sequence[list[tuple[int, int, int, int]]], request: int) -> list[_Node]:
    """The trie of one request's trees."""
    nodes: list[_Node] = []
    index: dict[tuple[int, int], int] = {}
    for part in parts:
        inner = {parent for _, parent, _, _ in part}
        places: list[int] = []  # where each node of this tree went; -1: dropped
        for local, (token, parent, count, row) in enumerate(part):
            above = places[parent] if local else -1
            if local and (token < 0 or above < 0):
                places.append(-1)
                continue
            place = index.setdefault((above, token), len(nodes))
            places.append(place)
            if place == len(nodes):
                nodes.append(_Node(token, above, nodes[above].depth + 1 if local else 0))
            if not local and place:
                raise ValueError(f"trees: expected equal roots, got {nodes[0].token} and {token} for request {request}")
            node = nodes[place]
            node.count = node.count + count if local else 1
            # A leaf's row of draft_logits was never filled, so one with children is preferred.
            if node.origin < 0 or (local in inner and not node.inner):
                node.origin, node.inner = row, local in inner
    return nodes
