"""Output laws through the public functions, statistically: merged draws, point masses, rows too peaked for fp32."""

from __future__ import annotations

import pytest
import torch

from specdec_kernels import DraftTree, Philox, SamplingParams, head_sample, verify_tree
from specdec_kernels.verify import TREE_METHODS
from verify_cases import random_logits, streams

DRAWN = [m for m in TREE_METHODS if m not in ("typical", "greedy")]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def tree(t, target, draft=None, **options):
    return verify_tree(t, target, draft, backend="reference", **options)


def test_merged_draws_have_the_law_of_separate_ones():
    """Statistically, through the public function: three i.i.d. draws merged into counts, random order from Philox."""
    V, k, trials = 3, 3, 60_000
    g = generator(29)
    p, q = torch.tensor([0.1, 0.3, 0.6]), torch.tensor([0.5, 0.4, 0.1])
    draws = torch.multinomial(q, trials * k, True, generator=g).reshape(trials, k)
    tokens = torch.full((trials, 1 + k), -1, dtype=torch.int32)
    counts = torch.ones(trials, 1 + k, dtype=torch.int32)
    tokens[:, 0] = 0
    first = (draws[:, :, None] == draws[:, None, :]).to(torch.int8).argmax(2)
    for j in range(k):
        fresh = first[:, j] == j
        tokens[:, 1 + j] = torch.where(fresh, draws[:, j].int(), -1)
        counts[:, 1 + j] = torch.where(fresh, (first == j).sum(1).int(), 1)
    parents = torch.tensor([-1, 0, 0, 0], dtype=torch.int32).repeat(trials)
    cu = torch.arange(trials + 1, dtype=torch.int32) * (1 + k)
    t = DraftTree(tokens.reshape(-1), parents, cu, 1 + k, 1, counts.reshape(-1))
    N = trials * (1 + k)
    rng = Philox(torch.arange(trials), torch.zeros(trials, dtype=torch.int64))
    for method in ("multi_round", "k_seq"):
        found = tree(t, p.log().expand(N, V), q.log().expand(N, V), method=method, rng=rng)
        observed = torch.bincount(found.tokens[:, 0].long(), minlength=V).double()
        statistic = float(((observed - p.double() * trials) ** 2 / (p.double() * trials)).sum())
        assert statistic < 18.42, (method, observed)  # chi-square at 1e-4, 2 degrees of freedom


@pytest.mark.parametrize("method", DRAWN)
def test_a_point_mass_draft_is_lossless_for_any_tree(method):
    if method in ("k_seq", "greedy_multi"):
        with pytest.raises(ValueError, match=r"draft_logits: method .* needs the distribution"):
            t = DraftTree.chain(torch.zeros(1, 3))
            tree(t, random_logits(3, 5, generator(31)), method=method, rng=streams(1))
        return
    V, trials = 5, 20_000
    paths = [[[0, 1], [2, 3], [2, 4]]] * trials
    t = DraftTree.from_paths(paths, [0] * trials)
    n = t.max_nodes
    rows = random_logits(n, V, generator(32), sharpness=1.0)
    found = tree(t, rows.repeat(trials, 1), method=method, rng=Philox(torch.arange(trials), torch.full((trials,), 9)))
    p = rows.softmax(1).double()
    observed = torch.bincount(found.tokens[:, 0].long(), minlength=V).double()
    assert float(((observed - p[0] * trials) ** 2 / (p[0] * trials)).sum()) < 23.51  # 1e-4, 4 degrees of freedom
    for token, node in ((0, 1), (2, 3)):
        second = found.tokens[(found.tokens[:, 0] == token) & (found.num_tokens > 1), 1].long()
        observed = torch.bincount(second, minlength=V).double()
        expected = p[node] * len(second)
        assert float(((observed - expected) ** 2 / expected).sum()) < 23.51


@pytest.mark.parametrize("temperature,draft_temperature", [(0.05, 0.05), (0.1, 0.1), (1.0, 0.0)])
@pytest.mark.parametrize("method", ["without_replacement", "traversal", "greedy_multi"])
def test_peaked_rows_stay_lossless(method, temperature, draft_temperature):
    """What is left of q once its peak is drawn has underflowed in fp32; its logarithms have not."""
    trials, k = 20_000, 3
    q, p = torch.tensor([6.0, 0.0, -0.5, -5.0]), torch.tensor([-3.0, 5.0, -3.0, 5.11])
    if draft_temperature == 0:  # greedy drafts: the top k, each a point mass
        p = p / 5
    rng = Philox(torch.arange(trials), torch.zeros(trials, dtype=torch.int64))
    drawn = head_sample(
        q.expand(trials, 4), torch.eye(4), k, rng=rng, temperature=draft_temperature, backend="reference"
    )
    children = drawn.tokens
    if method == "greedy_multi":  # at these temperatures the first two draws are the top two, the third is a draw
        children = torch.cat([torch.tensor([[0, 1]]).expand(trials, 2), children[:, 2:]], 1).to(torch.int32)
    tokens = torch.cat([torch.zeros(trials, 1, dtype=torch.int32), children], 1)
    parents = torch.tensor([-1, 0, 0, 0], dtype=torch.int32).repeat(trials)
    t = DraftTree(tokens.reshape(-1), parents, torch.arange(trials + 1, dtype=torch.int32) * 4, 4, 1)
    rows = trials * 4
    found = tree(
        t,
        p.expand(rows, 4),
        q.expand(rows, 4),
        method=method,
        params=SamplingParams(temperature=temperature),
        draft_params=SamplingParams(temperature=draft_temperature),
        rng=rng,
    )
    law = (p.double() / temperature).softmax(0)
    observed = torch.bincount(found.tokens[:, 0].long(), minlength=4).double()
    likely = law > 1e-3
    assert int(observed[~likely].sum()) <= 1
    expected = law[likely] * trials
    assert float(((observed[likely] - expected) ** 2 / expected).sum()) < 21.11  # 1e-4, 3 degrees of freedom
