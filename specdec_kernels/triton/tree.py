"""The drafted tree of one request, as a walk sees it: everything about it fits in registers."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Tree(NamedTuple):
    """Local nodes 0 .. size-1; node 0 is the root. Tokens that are no id are no drafts."""

    tokens: tl.tensor  # pointer to the root's int32 token
    size: tl.tensor  # int32
    depth: tl.tensor  # int32, deepest level that counts
    vocabulary: tl.tensor
    parent: tl.tensor  # [NODES] int32, -1 where there is no draft; None: a chain
    token: tl.tensor  # [NODES] int32; None: a chain
    draws: tl.tensor  # [NODES] int32, draws that were merged in a node; None: one each


@triton.jit
def load_tree(tokens, parents, counts, first, size, depth, V, NODES: tl.constexpr):
    """The tree of the packed nodes first .. first+size-1; whatever stands in `parents`, they come before children."""
    root = tokens + first
    if parents is None:
        return Tree(tokens=root, size=size, depth=depth, vocabulary=V, parent=None, token=None, draws=None)
    else:
        node = tl.arange(0, NODES)
        exists = (node > 0) & (node < size)
        token = tl.load(root + node, mask=exists, other=-1)
        parent = tl.minimum(tl.load(parents + first + node, mask=exists, other=-1), node - 1)
        parent = tl.where((token >= 0) & (token < V), parent, -1)
        draws = None
        if counts is not None:
            draws = tl.maximum(tl.load(counts + first + node, mask=exists, other=1), 1)
        return Tree(tokens=root, size=size, depth=depth, vocabulary=V, parent=parent, token=token, draws=draws)


@triton.jit
def next_child(tree, node, after):
    """The first child of `node` past node `after`, at least `node`; -1 where there is none."""
    if tree.parent is None:
        token = tl.load(tree.tokens + node + 1, mask=(node + 1 < tree.size) & (after == node), other=-1)
        return tl.where((token >= 0) & (token < tree.vocabulary), node + 1, -1)
    else:
        lane = tl.arange(0, tree.parent.shape[0])
        found = tl.min(tl.where((tree.parent == node) & (lane > after), lane, 2147483647), 0)
        return tl.where(found < 2147483647, found, -1)


@triton.jit
def last_child(tree, node):
    """The last child of `node`, -1 where there is none."""
    if tree.parent is None:
        return next_child(tree, node, node)
    else:
        return tl.max(tl.where(tree.parent == node, tl.arange(0, tree.parent.shape[0]), -1), 0)


@triton.jit
def children_tokens(tree, node, since, until):
    """Tokens of the children of `node` among the nodes since..until, in a vector that is -1 elsewhere."""
    if tree.parent is None:
        lane = tl.arange(0, 2) + node + 1
        token = tl.load(tree.tokens + lane, mask=(lane == node + 1) & (lane < tree.size), other=-1)
        return tl.where((lane >= since) & (lane <= until) & (token < tree.vocabulary), token, -1)
    else:
        lane = tl.arange(0, tree.parent.shape[0])
        return tl.where((tree.parent == node) & (lane >= since) & (lane <= until), tree.token, -1)
