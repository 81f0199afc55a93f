"""Closed forms, orderings and limits of the verifiers, by enumeration in float64."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from scipy.optimize import linprog

import law
from specdec_kernels.kv_scores import caote_scores, keydiff_scores
from specdec_kernels.optimum import optimal_acceptance
from specdec_kernels.reference import rules
from specdec_kernels.reference.bottom_up import block, traversal
from specdec_kernels.reference.coins import Draws
from specdec_kernels.reference.rows import Rows, normalised
from specdec_kernels.reference.tree_view import TreeView
from test_verify_law import EXACT, VERIFIERS


def contexts(case, length):
    """Every sequence of `length` tokens: ([V^length, length] p, [V^length, length] q) of its tokens, one by one."""
    V, p, q = case.vocabulary, [], []
    for sequence in itertools.product(range(V), repeat=length):
        flat, row_p, row_q = 0, [], []
        for level, token in enumerate(sequence):
            row_p.append(case.p[level][flat, token])
            row_q.append(case.q[level][flat, token])
            flat = flat * V + token
        p.append(row_p)
        q.append(row_q)
    return torch.tensor(p, dtype=torch.float64), torch.tensor(q, dtype=torch.float64)


def accepted(case, name, branching):
    scheme, verifier, point_mass = VERIFIERS[name]
    return law.expected_accepted(case, law.draw_all(case, branching, scheme), verifier, point_mass=point_mass)


CHAIN_CASES = [(3, 3, 0), (4, 2, 1), (3, 2, 2), (2, 3, 3)]


@pytest.mark.parametrize("vocabulary,depth,seed", CHAIN_CASES)
def test_expected_length_of_token_and_block_verification(vocabulary, depth, seed):
    case = law.Case.random(vocabulary, depth, seed)
    token, of_block = 0.0, 0.0
    for length in range(1, depth + 1):
        p, q = contexts(case, length)
        token += float(torch.minimum(p, q).prod(1).sum())
        splits = torch.stack([q[:, :j].prod(1) * p[:, j:].prod(1) for j in range(length + 1)], 1)
        of_block += float(splits.amin(1).sum())
    branching = [1] * depth
    assert accepted(case, "token", branching) == pytest.approx(token, abs=EXACT)
    assert accepted(case, "block", branching) == pytest.approx(of_block, abs=EXACT)
    assert of_block >= token - EXACT


@pytest.mark.parametrize("vocabulary,depth,seed", CHAIN_CASES)
@pytest.mark.parametrize("replacement", [False, True])
def test_traversal_of_a_chain_is_block_verification(vocabulary, depth, seed, replacement):
    case = law.Case.random(vocabulary, depth, seed)
    drawn = law.draw_all(case, [1] * depth, "iid")
    lengths = [law.expected_accepted(case, drawn, v) for v in (block, partial(traversal, replacement=replacement))]
    assert lengths[0] == pytest.approx(lengths[1], abs=EXACT)


@pytest.mark.parametrize("name", [n for n in VERIFIERS if "point" not in n and n != "target_only"])
def test_one_draft_is_accepted_with_one_minus_total_variation(name):
    case = law.Case.random(4, 1, seed=11)
    expected = float(torch.minimum(case.p[0], case.q[0]).sum())
    assert accepted(case, name, [1]) == pytest.approx(expected, abs=EXACT)


@pytest.mark.parametrize("name", [n for n in VERIFIERS if "point" not in n and n != "target_only"])
def test_equal_distributions_accept_everything_and_disjoint_ones_nothing(name):
    depth = 2
    case = law.Case.random(4, depth, seed=12)
    case.q = [t.clone() for t in case.p]
    assert accepted(case, name, [1] * depth) == pytest.approx(depth, abs=EXACT)
    for level in range(depth + 1):
        case.p[level][:, 2:] = 0
        case.q[level][:, :2] = 0
        case.p[level] /= case.p[level].sum(1, keepdim=True)
        case.q[level] /= case.q[level].sum(1, keepdim=True)
    scheme, verifier, _ = VERIFIERS[name]
    drawn = law.draw_all(case, [1] * depth, scheme)
    assert law.expected_accepted(case, drawn, verifier) == pytest.approx(0.0, abs=EXACT)
    assert float((law.output_law(case, drawn, verifier) - case.target_law()).abs().max()) < EXACT


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [1, 2, 3])
def test_acceptance_of_multi_round_k_seq_and_greedy_multi(k, seed):
    case = law.Case.random(4, 1, seed)
    p, q = case.p[0][0], case.q[0][0]
    rest, missed = p, 1.0
    for _ in range(k):
        missed *= 1 - float(torch.minimum(rest, q).sum())
        rest = normalised((rest - q).clamp(min=0)[None], p[None])[0]
    assert accepted(case, "multi_round", [k]) == pytest.approx(1 - missed, abs=EXACT)
    optimum = float(optimal_acceptance(p, q, k))
    assert 1 - missed <= optimum + EXACT

    k_seq = accepted(case, "k_seq", [k])
    low, high = 1.0, float(k)
    for _ in range(200):
        rho = (low + high) / 2
        beta = float(torch.minimum(q, p / rho).sum())
        low, high = (rho, high) if 1 - (1 - beta) ** k > rho * beta else (low, rho)
    assert k_seq == pytest.approx(1 - (1 - float(torch.minimum(q, p / high).sum())) ** k, abs=1e-12)
    assert (1 - (1 - 1 / k) ** k) * optimum - EXACT <= k_seq <= optimum + EXACT

    top = q.argsort(descending=True, stable=True)[: k - 1]
    outside = torch.ones(4, dtype=torch.bool).index_fill(0, top, False)
    left = torch.where(outside, q, 0.0)
    rate = float(p[top].sum() + torch.minimum(p, left / left.sum())[outside].sum())
    assert accepted(case, "greedy_multi", [k]) == pytest.approx(rate, abs=EXACT)


def linear_program(p, drawn):
    """The transport problem itself: most mass of (token, drafts) in which the token is one of the drafts."""
    V, ways = len(p), [way for way, _ in drawn]
    gain, rows, bounds = [], [], []
    for token in range(V):
        gain.extend(-float(token in way) for way in ways)
    for token in range(V):
        row = torch.zeros(V, len(ways))
        row[token] = 1
        rows.append(row.reshape(-1).tolist())
        bounds.append(float(p[token]))
    for j, (_, chance) in enumerate(drawn):
        row = torch.zeros(V, len(ways))
        row[:, j] = 1
        rows.append(row.reshape(-1).tolist())
        bounds.append(chance)
    return -linprog(gain, A_eq=rows, b_eq=bounds, bounds=(0, None)).fun


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_optimum_three_ways(k):
    for seed in range(5):
        case = law.Case.random(4 if k < 3 else 3, 0, seed)
        p, q = case.p[0][0], case.q[0][0]
        V = len(p)
        sets = itertools.chain.from_iterable(itertools.combinations(range(V), n) for n in range(V + 1))
        by_sets = 1 + min(float(p[list(s)].sum() - q[list(s)].sum() ** k) if s else 0.0 for s in sets)
        found = float(optimal_acceptance(p, q, k))
        assert found == pytest.approx(by_sets, abs=EXACT)
        assert found == pytest.approx(linear_program(p, law.siblings("iid", q, k)), abs=1e-8)
        hit = 1 - (1 - q) ** k
        assert float((p * hit).sum()) - EXACT <= found <= float(torch.minimum(p, hit).sum()) + EXACT
        found = float(optimal_acceptance(p, q, k, replacement=False))
        assert found == pytest.approx(linear_program(p, law.siblings("without_replacement", q, k)), abs=1e-8)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_no_verifier_exceeds_the_optimum_without_replacement(k):
    for seed in range(4):
        case = law.Case.random(4, 1, seed)
        optimum = float(optimal_acceptance(case.p[0][0], case.q[0][0], k, replacement=False))
        for name in ("without_replacement", "traversal"):
            assert accepted(case, name, [k]) <= optimum + EXACT
        if k == 1:
            assert optimum == pytest.approx(float(torch.minimum(case.p[0], case.q[0]).sum()), abs=EXACT)


TRIMMED = [
    "token",
    "block",
    "multi_round",
    "without_replacement",
    "k_seq",
    "greedy_multi",
    "traversal",
    "traversal_iid",
]


@pytest.mark.parametrize("name", TRIMMED)
def test_a_trimmed_q_is_lossless_and_bounded_by_the_mass_it_covers(name):
    scheme, verifier, _ = VERIFIERS[name]
    k = 1 if name in ("token", "block") else 2
    for seed, outside in ((1, [1]), (2, [0, 3]), (3, None)):
        case = law.Case.random(4, 1, seed)
        for level in range(2):
            kept = torch.ones(4, dtype=torch.bool)
            if outside is None:  # all of p lies outside the trimmed vocabulary
                case.p[level][:, :2] = 0
                case.p[level] /= case.p[level].sum(1, keepdim=True)
                kept[2:] = False
            else:
                kept[outside] = False
            case.q[level] = torch.where(kept, case.q[level], 0.0)
            case.q[level] /= case.q[level].sum(1, keepdim=True)
        drawn = law.draw_all(case, [k], scheme)
        assert float((law.output_law(case, drawn, verifier) - case.target_law()).abs().max()) < EXACT
        covered = float(case.p[0][0][case.q[0][0] > 0].sum())
        assert law.expected_accepted(case, drawn, verifier) <= covered + EXACT


def residual_of(rule, p, q, drawn):
    """What the reference's own rule leaves of p when every draw is rejected."""
    x = torch.tensor([drawn])
    nodes = torch.arange(1, len(drawn) + 1)[None]
    coins = law.Enumeration(torch.zeros(1, len(drawn) + 1, 1, dtype=torch.bool))
    _, rest = rule(p[None], q.log()[None], x, torch.ones_like(x, dtype=torch.bool), Draws(nodes[:, 0], nodes), coins)
    return rest[0]


def residual_of_traversal(p, q, drawn, replacement, w):
    """The same under traversal of a chain's last node, whose weight is `w`, with `drawn` as its children.

    The node above is drawn with probability 1 and has the target's probability w, so that w is its path weight.
    """
    V, k = len(p), len(drawn)
    parents = torch.tensor([-1, 0, *[1] * k])
    tokens = torch.tensor([0, 0, *drawn])
    top_p = torch.full((V,), (1 - w) / (V - 1), dtype=torch.float64).index_fill(0, torch.tensor([0]), w)
    top_q = torch.zeros(V, dtype=torch.float64).index_fill(0, torch.tensor([0]), 1.0)
    leaves = torch.full((k, V), 1.0 / V, dtype=torch.float64)
    tree = TreeView(tokens, parents, torch.tensor([0, 2 + k]), None, 2 + k, 2, V)
    target = Rows(torch.cat([top_p[None], p[None], leaves]).log(), V)
    draft = Rows(torch.cat([top_q[None], q[None], leaves]).log(), V)
    bits = torch.zeros(1, 2 + k, 1, dtype=torch.bool)
    bits[0, 1] = True  # all children are rejected, then the node is accepted
    path, rest, _ = traversal(tree, target, draft, law.Enumeration(bits), replacement=replacement)
    assert path[0].tolist() == [0, 1, -1]
    return rest[0]


def rejected_draws(p, q, replacement, w, generator):
    """Draws that can all be rejected and the scalars c, m of what is left: (p - c q)+ / m."""
    drawn, c, m, r = [], 0.0, 1.0, 1.0
    for x in torch.randperm(len(p), generator=generator).tolist():
        if w * float((p[x] - c * q[x]).clamp(min=0)) / m >= float(q[x]) / r or len(drawn) == 3:
            continue  # such a draw is always accepted
        left = float((p - (c + m / (w * r)) * q).clamp(min=0).sum())
        if left < 1e-6:
            break
        drawn.append(x)
        c += m / (w * r)
        surplus = w * left / m  # sum of (w P - Q)+
        w = 1.0 if w == 1.0 else surplus / (surplus + 1 - w)
        m, r = left, r if replacement else r - float(q[x])
    return drawn, c, m


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("w", [1.0, 0.9])
def test_residuals_need_two_numbers(replacement, w):
    """The reference recurs step by step, P = norm((w P - Q)+); two scalars give the same.

    Rejected draws have p(x) < c q(x), which is what makes the zeroed entries of Q take care of themselves.
    """
    rule = rules.multi_round if replacement else rules.without_replacement
    checked = 0
    for seed in range(200):
        case = law.Case.random(8, 0, seed)
        p, q = case.p[0][0], case.q[0][0]
        drawn, c, m = rejected_draws(p, q, replacement, w, torch.Generator().manual_seed(seed))
        if not drawn:
            continue
        checked += len(drawn) > 1
        found = (p - c * q).clamp(min=0) / m
        if w == 1.0:
            assert float((found - residual_of(rule, p, q, drawn)).abs().max()) < 1e-11
        assert float((found - residual_of_traversal(p, q, drawn, replacement, w)).abs().max()) < 1e-11
    assert checked > 50


def test_caote_of_an_entry_with_all_the_weight():
    values = torch.randn(1, 1, 3, 4, generator=torch.Generator().manual_seed(1))
    assert caote_scores(torch.tensor([[[1.0, 0.0, 0.0]]]), values)[0, 0].tolist() == [torch.inf, 0.0, 0.0]
    assert caote_scores(torch.ones(1, 1, 1), values[:, :, :1], fast=True).tolist() == [[[torch.inf]]]


def test_keydiff_ignores_the_scale_of_keys_and_caote_is_the_eviction_error():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(2, 3, 17, 8, dtype=torch.float64, generator=generator)
    scale = torch.rand(2, 3, 17, 1, dtype=torch.float64, generator=generator) + 0.1
    assert torch.allclose(keydiff_scores(keys), keydiff_scores(keys * scale), atol=1e-12)
    weights = torch.randn(2, 3, 17, dtype=torch.float64, generator=generator).softmax(-1)
    output = (weights[..., None] * keys).sum(2)
    scores = caote_scores(weights, keys)
    for j in range(17):
        without = weights.clone()
        without[..., j] = 0
        moved = (without[..., None] * keys).sum(2) / without.sum(-1)[..., None]
        assert torch.allclose((moved - output).norm(dim=-1), scores[..., j], atol=1e-12)
