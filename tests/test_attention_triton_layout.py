"""The Triton kernel of tree_layout against the reference."""

from __future__ import annotations

import random

import pytest
import torch

import specdec_kernels as sk
from attention_triton import each_device, poisoned

pytestmark = each_device


@pytest.mark.parametrize("seed", range(4))
def test_tree_layout(device, seed):
    draw = random.Random(seed)
    sizes = [draw.choice([1, 2, 33, 130]) for _ in range(3)]
    parents = [p for n in sizes for p in [-1, *(draw.randint(max(0, i - 5), i - 1) for i in range(1, n))]]
    cu_nodes = torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0).to(torch.int32)
    padding = 3 * seed
    tree = sk.DraftTree(
        *(torch.tensor(parents + [7] * padding, dtype=torch.int32),) * 2, cu_nodes, max(sizes), max(sizes)
    )
    prefix = torch.tensor([5, 0, 2**30], dtype=torch.int32) if seed % 2 else None
    here = tree._replace(parents=tree.parents.to(device), cu_nodes=cu_nodes.to(device))
    with poisoned():
        got = sk.trees.tree_layout(here, None if prefix is None else prefix.to(device), backend="triton")
    want = sk.trees.tree_layout(tree, prefix, backend="reference")
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.cpu()[: sum(sizes)], b[: sum(sizes)]) and (a.cpu()[sum(sizes) :] == 0).all()


def test_tree_layout_of_what_is_no_tree(device):
    """Parents that do not come first, nodes in no tree, no requests at all: nothing hangs, nothing leaves a tensor."""
    parents = torch.tensor([-1, 1, 9, -5, 2**31 - 1, -(2**31)], dtype=torch.int32)
    for cu_nodes in ([0, 6], [3, 2, 5], [0, 3, 4], [-1, 9], [6]):
        cu = torch.tensor(cu_nodes, dtype=torch.int32)
        tree = sk.DraftTree(parents, parents, cu, 6, 6)
        here = tree._replace(parents=parents.to(device), cu_nodes=cu.to(device))
        with poisoned():
            depths, bits, positions = sk.trees.tree_layout(here, backend="triton")
        assert ((depths >= 0) & (depths < 6)).all() and (bits >= 0).all() and (bits < 64).all()
        if cu_nodes == [0, 6]:
            for a, b in zip((depths, bits, positions), sk.trees.tree_layout(tree, backend="reference"), strict=True):
                assert torch.equal(a.cpu(), b)
