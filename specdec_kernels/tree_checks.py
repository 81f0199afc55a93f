"""Checks of a `DraftTree`, shared by every function that takes one."""

from __future__ import annotations

import torch

from .checks import DEBUG, INT32, check_int, check_tensor, check_values
from .reference.trees import tree_layout
from .types import DraftTree


def check_tree(tree: DraftTree, sizes: dict[str, int] | None = None, device=None) -> None:
    """Raise unless parents, cu_nodes and the bounds of `tree` fit together; binds N and B in `sizes`.

    Shapes, dtypes and devices always; values, which have to be read, under SPECDEC_DEBUG=1.
    """
    sizes = {} if sizes is None else sizes
    if not isinstance(tree, DraftTree):
        raise TypeError(f"tree: expected a DraftTree, got {type(tree).__name__}")
    check_tensor("tree.parents", tree.parents, sizes, "N", INT32, device)
    check_tensor("tree.cu_nodes", tree.cu_nodes, sizes, "B+1", INT32, tree.parents.device)
    if sizes["B+1"] < 1:
        raise ValueError("tree.cu_nodes: expected shape [B+1] with B >= 0, got [0]")
    sizes["B"] = sizes["B+1"] - 1
    check_int("tree.max_nodes", tree.max_nodes, 1)
    check_int("tree.max_depth", tree.max_depth, 0)
    if DEBUG:
        check_tree_values(tree)


def check_tree_values(tree: DraftTree) -> None:
    """Raise ValueError unless the values of parents and cu_nodes describe trees within the bounds; reads the device."""
    nodes = tree.parents.shape[0]
    check_cu_nodes("tree.cu_nodes", tree.cu_nodes, nodes, tree.max_nodes)
    starts = tree.cu_nodes[:-1].long()
    local = torch.arange(nodes, device=starts.device) - starts.repeat_interleave(tree.cu_nodes.diff().long())
    roots = (local == 0) == (tree.parents == -1)
    check_values("tree.parents", roots, tree.parents, "-1 at each root and nowhere else")
    check_values("tree.parents", tree.parents >= -1, tree.parents, "-1 or a node of the same tree")
    check_values("tree.parents", tree.parents < local, tree.parents, "parents before children")
    depths = tree_layout(tree.parents, tree.cu_nodes, tree.max_nodes, None)[0]
    check_values("tree.max_depth", depths <= tree.max_depth, depths, f"no node deeper than max_depth={tree.max_depth}")


def check_cu_nodes(name: str, cu_nodes: torch.Tensor, nodes: int, max_nodes: int) -> None:
    """Raise ValueError unless `cu_nodes` goes from 0 to `nodes` in steps of 1..max_nodes; reads the device."""
    check_values(name, cu_nodes[:1] == 0, cu_nodes[:1], "0 first")
    check_values(name, cu_nodes[-1:] == nodes, cu_nodes[-1:], f"N={nodes} last")
    sizes = cu_nodes.diff()
    check_values(name, (sizes >= 1) & (sizes <= max_nodes), sizes, f"1..{max_nodes} nodes a request")
