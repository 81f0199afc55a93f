"""Dynamic shortlists: clusters that partition, a router that unites, and a q that is what the draws came from."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import specdec_kernels as sk
from head_cases import BACKENDS, TOLERANCE, inputs, logits64
from specdec_loop import tiny

INF = float("inf")


def planted(groups: int, size: int, dim: int, spread: float, seed: int = 0):
    """(rows [groups * size, dim] around as many directions, the group of each), shuffled."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(groups, dim, generator=generator), dim=1)
    owner = torch.arange(groups).repeat(size)[torch.randperm(groups * size, generator=generator)]
    length = torch.rand(len(owner), 1, generator=generator) + 0.5  # clusters are directions, whatever the length
    return length * (directions[owner] + spread * torch.randn(len(owner), dim, generator=generator)), owner


def partition(rows: torch.Tensor) -> list[list[int]]:
    return [[row for row in line if row >= 0] for line in rows.tolist()]


@pytest.mark.parametrize(("height", "clusters"), [(1000, 30), (97, 97), (50, 1), (64, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_clusters_partition_the_rows(height, clusters, dtype):
    _, weight = inputs(1, height, 12, dtype)
    always = torch.tensor([height - 1, 0, 7]) if clusters < 97 else None
    found = sk.cluster_rows(weight, clusters, always=always, seed=4)
    members = partition(found.rows)
    fixed = [] if always is None else [0, 7, height - 1]
    assert found.always.tolist() == fixed
    assert sorted(chain(fixed, *members)) == list(range(height))
    assert all(line == sorted(line) for line in members)
    assert found.rows.shape == (clusters, -(-(height - len(fixed)) // clusters))
    means = torch.stack([weight[line].float().mean(0) if line else torch.zeros(12) for line in members])
    torch.testing.assert_close(found.centroids, means.to(dtype), rtol=1e-2, atol=1e-3)
    far = [((weight[line].float() - means[i]) ** 2).mean() if line else 0.0 for i, line in enumerate(members)]
    torch.testing.assert_close(found.spreads, torch.tensor(far), rtol=1e-3, atol=1e-5)
    again = sk.cluster_rows(weight, clusters, always=always, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_clusters_find_what_was_planted():
    """Far apart, groups come back whole but for a few starts in one group; a random partition shares 1/8 of them."""
    weight, owner = planted(8, 40, 24, spread=0.05)
    best = max(
        sum(int(torch.bincount(owner[line]).max()) for line in partition(sk.cluster_rows(weight, 8, seed=seed).rows))
        for seed in range(4)
    )
    assert best >= 0.8 * len(owner)
    by_seed = [sk.cluster_rows(weight, 8, seed=seed).rows for seed in (0, 1)]
    assert not torch.equal(*by_seed)


def test_rows_without_a_direction_are_placed_too():
    weight = torch.zeros(20, 4)
    weight[:3] = torch.eye(4)[:3]
    found = sk.cluster_rows(weight, 4)
    assert sorted(chain(*partition(found.rows))) == list(range(20))
    assert found.centroids.isfinite().all()


def test_shortlists_of_the_shipped_drafter_accept_more_than_a_fixed_one():
    """1 - TV from the target at 2000 of 32000 rows: picked for each position, against the most frequent ones."""
    pair = tiny.load(torch.float32)
    prompts = tiny.heldout_prompts(4, 64, pair.tokenizer)
    states = []
    with torch.no_grad():
        for model in (pair.target, pair.drafter):
            states.append(model.base_model(prompts).last_hidden_state[:, 8:].flatten(0, 1))
    law = torch.softmax(states[0] @ pair.target.get_output_embeddings().weight.detach().T, 1)
    weight, hidden = pair.drafter.get_output_embeddings().weight.detach(), states[1]

    logits = hidden @ weight.T

    def accepted(rows):
        listed = logits.gather(1, rows.clamp(min=0).long())
        q = sk.scatter_logits(listed, sk.Shortlist(rows, None, 0), len(weight)).softmax(1)
        return float(torch.minimum(law, q).sum(1).mean())

    clusters = sk.cluster_rows(weight, 512, always=pair.vocab_order[:500], iterations=2)
    picked = sk.route(hidden, clusters, (2000 - 500) // clusters.rows.shape[1]).rows
    assert picked.shape[1] <= 2000
    fixed = accepted(pair.vocab_order[:2000].expand(len(hidden), -1))
    everything = float(torch.minimum(law, logits.softmax(1)).sum(1).mean())
    found = accepted(picked)
    print(f"1 - TV: fixed {fixed:.3f}, picked {found:.3f}, all {everything:.3f}")
    assert fixed + 0.02 < found < everything


def united(scores, count, groups, budget):
    """What `route` promises, in plain Python: clusters of each group, by the best place that any vector gives them."""
    lists = []
    for group in sorted(groups):
        place: dict[int, tuple[int, float]] = {}
        for line in groups[group]:
            ranked = sorted(range(scores.shape[1]), key=lambda c, line=line: (-scores[line, c], c))
            for rank, cluster in enumerate(ranked[:count]):
                peak = max(float(scores[other, cluster]) for other in groups[group])
                place[cluster] = min(place.get(cluster, (count, 0.0)), (rank, -peak))
        lists.append(sorted(place, key=lambda c, place=place: (*place[c], c))[:budget])
    return lists


@pytest.mark.parametrize("budget", [1, 3, 5, 20])
@pytest.mark.parametrize("ties", [False, True])
def test_route_unites_what_the_nodes_of_a_tree_pick(budget, ties):
    generator = torch.Generator().manual_seed(budget)
    clusters = sk.cluster_rows(torch.randn(210, 6, generator=generator), 20, always=torch.arange(5))
    scores = torch.randn(9, 20, generator=generator)
    scores = scores.round() if ties else scores
    row_groups = torch.tensor([0, 0, 0, 1, 3, 3, 3, 3, 3], dtype=torch.int32)
    members = {g: [i for i in range(9) if row_groups[i] == g] for g in range(4)}
    found = sk.route(torch.zeros(9, 6), clusters, 3, scores=scores, row_groups=row_groups, groups=4, budget=budget)
    assert found.shared == 5 and torch.equal(found.row_groups, row_groups)
    assert found.rows.shape == (4, 5 + budget * clusters.rows.shape[1])
    for line, want in zip(found.rows.tolist(), united(scores, 3, members, budget), strict=True):
        listed = [row for cluster in want for row in clusters.rows[cluster].tolist()]
        assert line[:5] == [0, 1, 2, 3, 4]
        assert line[5:] == listed + [-1] * (budget * clusters.rows.shape[1] - len(listed))


def test_route_without_groups_and_with_strangers():
    hidden, weight = inputs(6, 300, 16)
    clusters = sk.cluster_rows(weight, 12)
    scores = hidden @ clusters.centroids.T + hidden.square().sum(1, keepdim=True) * clusters.spreads / 2
    found = sk.route(hidden, clusters, 2)
    assert found.row_groups is None and found.rows.shape == (6, 2 * clusters.rows.shape[1])
    for line, best in zip(found.rows, scores.topk(2).indices, strict=True):
        assert torch.equal(line, clusters.rows[best].flatten())
    # A node of no group picks nothing, and its own logits are all -inf.
    row_groups = torch.tensor([0, 0, -1, 1, 2, 1], dtype=torch.int32)
    with_stranger = sk.route(hidden, clusters, 2, row_groups=row_groups, groups=2, budget=4)
    known = [0, 1, 3, 5]
    without = sk.route(hidden[known], clusters, 2, row_groups=row_groups[known], groups=2, budget=4)
    assert torch.equal(with_stranger.rows, without.rows)
    lists = {"rows": with_stranger.rows, "row_groups": row_groups}
    step = sk.head_topk(hidden, weight, 3, return_logits=True, backend="reference", **lists)
    assert (step.tokens[[2, 4]] == -1).all() and (step.tokens[known] >= 0).all()
    assert (sk.scatter_logits(step.all_logits, with_stranger, 300)[[2, 4]] == -INF).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_head_over_a_shortlist(backend):
    """Trees of 4, 1 and 3 nodes: each node over its tree's list; compact and scattered logits say the same."""
    hidden, weight = inputs(8, 400, 16)
    row_groups = torch.tensor([0, 0, 0, 0, 1, 2, 2, 2], dtype=torch.int32)
    clusters = sk.cluster_rows(weight, 40, always=torch.tensor([399, 0]))
    lists = sk.route(hidden, clusters, 3, row_groups=row_groups, groups=3, budget=6)
    step = sk.head_topk(hidden, weight, 5, rows=lists.rows, row_groups=row_groups, return_logits=True, backend=backend)
    wide = sk.scatter_logits(step.all_logits, lists, 400)
    compact, vocab = sk.compact_logits(step.all_logits, lists, 400)
    assert compact.shape == (8, len(vocab)) and len(vocab) == 2 + 3 * 6 * 10
    assert (vocab[1:] > vocab[:-1]).all() and vocab[0] == 0 and vocab[-1] == 399
    logits = logits64(hidden, weight)
    for node in range(8):
        own = lists.rows[row_groups[node]]
        own = own[own >= 0].long()
        assert len(own) == len(own.unique())
        outside = torch.ones(400, dtype=torch.bool)
        outside[own] = False
        torch.testing.assert_close(wide[node, own].double(), logits[node, own], **TOLERANCE)
        assert (wide[node, outside] == -INF).all()
        assert torch.equal(compact[node], wide[node, vocab.long()])
        assert set(own.tolist()) <= set(vocab.tolist())
        best = own[logits[node, own].topk(5).indices]
        assert step.tokens[node].tolist() == best.tolist()


def test_compact_logits_of_several_steps():
    """Two steps of one round, joined: one vocabulary holds all lists, and never more than the target's."""
    hidden, weight = inputs(4, 60, 8)
    clusters = sk.cluster_rows(weight, 10)
    steps = [sk.route(hidden[part], clusters, 2) for part in (slice(0, 2), slice(2, 4))]
    rows = torch.cat([step.rows for step in steps])
    joined = sk.Shortlist(rows, torch.arange(4, dtype=torch.int32), 0)
    logits = torch.stack([torch.arange(rows.shape[1]) + 100.0 * i for i in range(4)])
    compact, vocab = sk.compact_logits(logits, joined, 60)
    assert set(rows.unique().tolist()) <= set(vocab.tolist())
    assert len(vocab) == min(60, 4 * rows.shape[1])
    assert torch.equal(sk.scatter_logits(logits, joined, 60)[:, vocab.long()], compact)
    assert (compact > -INF).sum(1).tolist() == [rows.shape[1]] * 4
    many = sk.Shortlist(rows.repeat(5, 1), None, 0)
    compact, vocab = sk.compact_logits(logits.repeat(5, 1), many, 60)
    assert vocab.tolist() == list(range(60))


def test_sizes_depend_on_no_value():
    """Fake tensors have no values: what would read one, as a CUDA graph could not, raises."""
    with FakeTensorMode():
        hidden, weight = torch.empty(6, 8), torch.empty(100, 8)
        ids = torch.empty(0, dtype=torch.int32)
        clusters = sk.RowClusters(torch.empty(20, 5, dtype=torch.int32), torch.empty(20, 8), torch.empty(20), ids)
        groups = torch.empty(6, dtype=torch.int32)
        lists = sk.route(hidden, clusters, 2, row_groups=groups, groups=3, budget=3)
        step = sk.head_topk(hidden, weight, 4, rows=lists.rows, row_groups=groups, return_logits=True)
        assert sk.scatter_logits(step.all_logits, lists, 100).shape == (6, 100)
        compact, vocab = sk.compact_logits(step.all_logits, lists, 100)
        assert compact.shape == (6, 45) and vocab.shape == (45,)


def test_a_draft_step_is_one_graph():
    hidden, weight = inputs(6, 120, 16)
    clusters = sk.cluster_rows(weight, 10)
    down, up = sk.low_rank_factors(weight, 8)
    groups = torch.tensor([0, 0, 0, 1, 1, 1], dtype=torch.int32)

    def step(hidden):
        lists = sk.route(hidden, clusters, 2, row_groups=groups, groups=2, budget=4)
        top = sk.head_topk(hidden, weight, 4, rows=lists.rows, row_groups=groups, return_logits=True)
        thin = sk.low_rank_head(hidden, down, up, 4)
        return top.tokens, sk.scatter_logits(top.all_logits, lists, 120), thin.tokens, thin.lse

    traced = torch.compile(step, fullgraph=True, backend="eager")
    assert all(torch.equal(a, b) for a, b in zip(traced(hidden), step(hidden), strict=True))


def some_clusters():
    return sk.cluster_rows(torch.eye(8), 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sk.cluster_rows(torch.eye(8), 9), r"clusters: expected in 1\.\.8, got 9"),
        (lambda: sk.cluster_rows(torch.eye(8), 2, iterations=0), "iterations: expected >= 1, got 0"),
        (lambda: sk.cluster_rows(torch.eye(8), 2, always=torch.tensor([8])), r"always: expected ids in 0\.\.7, got 8"),
        (lambda: sk.cluster_rows(torch.eye(8), 2, always=torch.tensor([3, 3])), "always: expected each id once, got 3"),
        (lambda: sk.cluster_rows(torch.eye(8), 1, always=torch.arange(8)), "always: expected fewer than all 8 rows"),
        (lambda: sk.route(torch.zeros(2, 7), some_clusters(), 1), r"hidden: expected shape \[N=2, D=8\], got \[2, 7\]"),
        (lambda: sk.route(torch.zeros(2, 8), some_clusters(), 5), r"count: expected in 1\.\.4, got 5"),
        (lambda: sk.route(torch.zeros(2, 8), some_clusters(), 1, budget=2), "budget: expected None without row_groups"),
        (
            lambda: sk.route(torch.zeros(2, 8), some_clusters(), 1, scores=torch.zeros(2, 3)),
            r"scores: expected shape \[N=2, C=4\], got \[2, 3\]",
        ),
        (
            lambda: sk.scatter_logits(
                torch.zeros(2, 3), sk.Shortlist(torch.zeros(2, 4, dtype=torch.int32), None, 0), 9
            ),
            r"all_logits: expected shape \[N=2, R=4\], got \[2, 3\]",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_weight_with_a_broken_row_is_named():
    weight = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    weight[3, 0] = float("nan")
    with pytest.raises(ValueError, match="weight: expected finite rows; this row is not one, got 3 at index 3"):
        sk.cluster_rows(weight, 8)


def test_a_cluster_without_rows_is_not_picked():
    weight = torch.randn(14, 2, generator=torch.Generator().manual_seed(209)) + torch.tensor([2.0, 0.0])
    made = sk.cluster_rows(weight, 6, seed=209)
    empty = made._replace(
        rows=torch.cat([made.rows, torch.full_like(made.rows[:1], -1)]),
        centroids=torch.cat([made.centroids, torch.zeros(1, 2)]),
        spreads=torch.cat([made.spreads, torch.zeros(1)]),
    )
    hidden = torch.randn(500, 2, generator=torch.Generator().manual_seed(1))
    assert (sk.route(hidden, empty, 1).rows >= 0).any(1).all()
