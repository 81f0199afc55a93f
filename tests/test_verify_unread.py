"""Rows that a walk never reaches are not read by the reference: what they hold stops no request."""

from __future__ import annotations

import pytest
import torch

from specdec_kernels import DraftTree, verify_chain, verify_tree
from specdec_kernels.verify import TREE_METHODS
from verify_cases import random_logits, random_tree, streams


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tree(t, target, draft, **options):
    return verify_tree(t, target, draft, backend="reference", **options)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))


# Node 1 has children 2 and 3, node 4 has child 5; the root has children 1 and 4.
# Every draft is likelier in q than in p, but for node 4, which the rejection of node 1 must leave possible.
FORK = DraftTree(*(torch.tensor(x, dtype=torch.int32) for x in ([0, 1, 2, 3, 2, 0], [-1, 0, 1, 1, 0, 4], [0, 6])), 6, 2)
FORK_P = torch.tensor([0.1, 0.3, 0.35, 0.15, 0.1]).expand(6, -1).log()
FORK_Q = torch.tensor([0.2, 0.45, 0.15, 0.1, 0.1]).expand(6, -1).log().clone()
FORK_Q[1] = torch.tensor([0.05, 0.05, 0.6, 0.2, 0.1]).log()


def rows_read(method, path, dead):
    """(target rows, draft rows) of FORK that a walk along `path` reads; node 1 has weight 0 if it is `dead`."""
    inner = {0, 1, 4}
    if method.startswith("traversal"):  # leaves 2, 3, 1 come before 5, 4, 0
        entered = {0} | ({1} if not dead else set()) | ({4} if path[-1] in (5, 4, 0) else set())
        return entered | {path[-1]}, entered
    if method == "typical":
        return {0, 4, path[-1]} | ({1} if not dead else set()), set()
    return set(path), set(path) & inner if method not in ("greedy", "target_only") else set()


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("method", TREE_METHODS)
def test_rows_that_a_walk_never_reaches_are_not_read(method, dead):
    target, draft = FORK_P.clone(), FORK_Q
    if dead:
        target[0, 1] = -torch.inf
    ends = set()
    for seed in range(12):
        coins = {
            "accept_uniforms": torch.rand(6, generator=generator(seed)) ** 0.5,
            "final_uniforms": torch.rand(1, generator=generator(seed + 100)),
        }
        clean = tree(FORK, target, draft, method=method, **coins, logprobs=True)
        path = [node for node in clean.nodes[0].tolist() if node >= 0]
        ends.add(path[-1])
        for name, read in zip(("target", "draft"), rows_read(method, path, dead), strict=True):
            for row in range(6):
                rows = {"target": target.clone(), "draft": draft.clone()}
                rows[name][row] = torch.nan
                found = tree(FORK, rows["target"], rows["draft"], method=method, **coins, logprobs=True)
                assert int(found.num_tokens) == (0 if row in read else int(clean.num_tokens)), (path, name, row)
                assert row in read or same(found, clean)
    assert len(ends) > 1 or method in ("greedy", "typical")


@pytest.mark.parametrize("dead", [False, True])
def test_block_reads_rows_down_to_the_first_draft_without_weight(dead):
    target, draft = FORK_P[:4].clone(), FORK_Q[:4]
    tokens, cu = torch.tensor([0, 1, 2, 3], dtype=torch.int32), torch.tensor([0, 4], dtype=torch.int32)
    if dead:
        target[1, 2] = -torch.inf
    ends = set()
    for seed in range(12):
        options = {"max_depth": 3, "method": "block", "rng": streams(1, seed), "backend": "reference"}
        clean = verify_chain(tokens, cu, target, draft, **options)
        end = int(clean.num_tokens) - 1
        ends.add(end)
        weighty = {0, 1} if dead else {0, 1, 2}
        for name, read in (("target", weighty | {end}), ("draft", weighty)):
            for row in range(4):
                rows = {"target": target.clone(), "draft": draft.clone()}
                rows[name][row] = torch.nan
                found = verify_chain(tokens, cu, rows["target"], rows["draft"], **options)
                assert int(found.num_tokens) == (0 if row in read else int(clean.num_tokens)), (end, name, row)
                assert row in read or same(found, clean)
    assert ends >= {0, 1} and max(ends) == (1 if dead else 3)


def test_what_lies_deeper_than_max_depth_is_not_there():
    t = random_tree(10, 12, 7, generator(34))
    target, draft = random_logits(len(t.tokens), 7, generator(35)), random_logits(len(t.tokens), 7, generator(36))
    shallow = torch.where(t.depths() > 1, -1, t.tokens)
    assert t.max_depth > 1
    for method in TREE_METHODS:
        cut, bounded = (
            tree(tr, target, draft, method=method, rng=streams(10))
            for tr in (t._replace(tokens=shallow, max_depth=1), t._replace(max_depth=1))
        )
        assert same(cut, bounded)
