"""Every exact verifier leaves the target's law unchanged, by enumeration; every known mistake does not."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import law
from specdec_kernels import DraftTree, Philox, head_sample, verify_chain
from specdec_kernels.reference import rules
from specdec_kernels.reference.bottom_up import block, traversal
from specdec_kernels.reference.rows import normalised
from specdec_kernels.reference.verify import top_down

EXACT = 1e-13
VISIBLE = 5e-3  # least bias that a negative control must show


def walk(rule):
    return lambda tree, target, draft, coins: top_down(tree, target, draft, rule, coins)


# name -> (how siblings are drawn, verifier, whether q is a point mass)
VERIFIERS = {
    "token": ("iid", walk(rules.multi_round), False),
    "multi_round": ("iid", walk(rules.multi_round), False),
    "without_replacement": ("without_replacement", walk(rules.without_replacement), False),
    "k_seq": ("iid", walk(rules.k_seq), False),
    "greedy_multi": ("greedy_multi", walk(rules.greedy_multi), False),
    "target_only": ("top_k", walk(rules.target_only), True),
    "point_mass": ("top_k", walk(rules.multi_round), True),
    "traversal": ("without_replacement", partial(traversal, replacement=False), False),
    "traversal_iid": ("iid", partial(traversal, replacement=True), False),
    "traversal_point_mass": ("top_k", partial(traversal, replacement=True), True),
    "block": ("iid", block, False),
    "block_point_mass": ("top_k", block, True),
}
CHAINS = ("token", "block", "block_point_mass")
SHAPES = [(4, [2]), (4, [3]), (3, [3]), (4, [1, 1]), (3, [1, 1, 1]), (3, [2, 1]), (3, [1, 2]), (3, [2, 2])]
DEEP = [(3, [2, 1, 1]), (2, [2, 2, 1]), (4, [2, 1]), (3, [3, 1])]


def bias(case, scheme, verifier, branching, point_mass=False, **options) -> float:
    drawn = law.draw_all(case, branching, scheme)
    found = law.output_law(case, drawn, verifier, point_mass=point_mass, **options)
    assert abs(float(found.sum()) - 1) < EXACT
    return float((found - case.target_law()).abs().max())


def check_lossless(name, vocabulary, branching, zeros):
    scheme, verifier, point_mass = VERIFIERS[name]
    case = law.Case.random(vocabulary, len(branching), seed=sum(branching) + vocabulary, zeros=zeros)
    if zeros and scheme in ("without_replacement", "greedy_multi"):  # k tokens of positive probability must exist
        case.q = law.Case.random(vocabulary, len(branching), seed=1).q
    assert bias(case, scheme, verifier, branching, point_mass) < EXACT


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", VERIFIERS)
def test_the_output_law_is_the_targets(name, shape, zeros):
    vocabulary, branching = shape
    if name in CHAINS and set(branching) != {1}:
        branching = [1] * len(branching)
    check_lossless(name, vocabulary, branching, zeros)


@pytest.mark.full
@pytest.mark.parametrize("shape", DEEP, ids=str)
@pytest.mark.parametrize("name", [n for n in VERIFIERS if n not in CHAINS])
def test_the_output_law_of_deeper_trees(name, shape):
    check_lossless(name, *shape, zeros=False)


def merged(drawn: law.Drawn, k: int):
    """Trees of depth 1 with equal draws merged into counts: ([B, 1+k] nodes, counts), unused nodes hold -1."""
    tokens, counts = torch.full_like(drawn.tokens, -1), torch.zeros_like(drawn.tokens)
    for row, drawn_row in enumerate(drawn.tokens.tolist()):
        first_seen = list(dict.fromkeys(drawn_row[1:]))
        tokens[row, 0], counts[row, 0] = 0, 1
        for j, token in enumerate(first_seen, start=1):
            tokens[row, j] = token
            counts[row, j] = drawn_row[1:].count(token)
    contexts = torch.where(tokens > 0, tokens, 0)
    contexts[:, 0] = 0
    return law.Drawn(tokens, drawn.parents, contexts, drawn.levels, drawn.weight), counts


@pytest.mark.parametrize(
    "rule,vocabulary,k",
    [
        (rules.multi_round, 3, 2),
        (rules.multi_round, 3, 3),
        (rules.k_seq, 3, 2),
        (rules.k_seq, 2, 3),
        pytest.param(rules.k_seq, 3, 3, marks=pytest.mark.full),
    ],
)
def test_merged_draws_in_random_order_are_lossless(rule, vocabulary, k):
    case = law.Case.random(vocabulary, 1, seed=3)
    drawn, counts = merged(law.draw_all(case, [k], "iid"), k)
    found = law.output_law(case, drawn, walk(rule), counts=counts, draws=k)
    assert float((found - case.target_law()).abs().max()) < EXACT


def worst_bias(scheme, verifier, branching, vocabulary=3, point_mass=False) -> float:
    cases = (law.Case.random(vocabulary, len(branching), seed=s) for s in range(8))
    return max(bias(case, scheme, verifier, branching, point_mass) for case in cases)


def test_control_not_renormalising_q_without_replacement():
    def wrong(p, q, x, mask, draws, coins):
        rest, draft = p, q.softmax(1)
        accepted = torch.full_like(x[:, 0], -1) if x.shape[1] else torch.full((len(p),), -1)
        for j in range(x.shape[1]):
            token = x[:, j : j + 1]
            trying = mask[:, j] & (accepted < 0)
            hit = coins.accept(draws, j, draft.gather(1, token)[:, 0], rest.gather(1, token)[:, 0], trying)
            accepted = torch.where(trying & hit, j, accepted)
            missed = (trying & ~hit)[:, None]
            rest = torch.where(missed, normalised((rest - draft).clamp(min=0), p), rest)
            draft = torch.where(missed, draft.scatter(1, token, 0.0), draft)
        return accepted, rest

    assert worst_bias("without_replacement", walk(wrong), [3], vocabulary=4) > VISIBLE


def test_control_top_k_siblings_with_stochastic_q():
    assert worst_bias("top_k", walk(rules.multi_round), [2]) > 0.1
    assert worst_bias("top_k", walk(rules.without_replacement), [2]) > 0.1
    assert worst_bias("top_k", block, [1]) > 0.1


def reordered_by_q(p, q, x, mask, draws, coins):
    order = q.gather(1, x).argsort(1, descending=True)
    draws = draws._replace(nodes=draws.nodes.gather(1, order))
    accepted, rest = rules.without_replacement(p, q, x.gather(1, order), mask.gather(1, order), draws, coins)
    back = order.gather(1, accepted.clamp(min=0)[:, None])[:, 0] if x.shape[1] else accepted
    return torch.where(accepted >= 0, back, -1), rest


def test_control_siblings_sorted_by_q_instead_of_draw_order():
    assert worst_bias("without_replacement", walk(reordered_by_q), [2]) > VISIBLE


def test_control_residual_subtracts_q_only_at_the_drafted_token():
    def wrong(p, q, x, mask, draws, coins):
        accepted, rest = rules.multi_round(p, q, x, mask, draws, coins)
        if x.shape[1]:
            drafted = q.softmax(1).gather(1, x[:, :1])
            rest = normalised(p.scatter_add(1, x[:, :1], -drafted).clamp(min=0), p)
        return accepted, rest

    assert worst_bias("iid", walk(wrong), [1]) > VISIBLE


def skip_repeats(p, q, x, mask, draws, coins):
    fresh = torch.ones_like(mask)
    for j in range(x.shape[1]):
        fresh[:, j] = ~(x[:, :j] == x[:, j : j + 1]).any(1)
    return rules.multi_round(p, q, x, mask & fresh, draws, coins)


def test_control_duplicate_iid_siblings_skipped():
    assert worst_bias("iid", walk(skip_repeats), [3]) > VISIBLE


def repeats_together(rule):
    """Equal draws tried together, in order of first appearance: what merging does if it forgets the order."""

    def wrong(p, q, x, mask, draws, coins):
        if not x.shape[1]:
            return rule(p, q, x, mask, draws, coins)
        first = (x[:, :, None] == x[:, None, :]).to(torch.int8).argmax(2)
        order = first.argsort(dim=1, stable=True)
        draws = draws._replace(nodes=draws.nodes.gather(1, order))
        accepted, rest = rule(p, q, x.gather(1, order), mask.gather(1, order), draws, coins)
        return torch.where(accepted >= 0, order.gather(1, accepted.clamp(min=0)[:, None])[:, 0], -1), rest

    return wrong


@pytest.mark.parametrize("rule", [rules.multi_round, rules.k_seq])
def test_control_equal_draws_grouped(rule):
    assert worst_bias("iid", walk(repeats_together(rule)), [2]) < EXACT, "two draws cannot tell"
    assert worst_bias("iid", walk(repeats_together(rule)), [3]) > 2e-3


def test_control_no_residual_update_between_siblings():
    def wrong(p, q, x, mask, draws, coins):
        q = q.softmax(1)
        accepted = torch.full_like(x[:, 0], -1) if x.shape[1] else torch.full((len(p),), -1)
        for j in range(x.shape[1]):
            token = x[:, j : j + 1]
            trying = mask[:, j] & (accepted < 0)
            hit = coins.accept(draws, j, q.gather(1, token)[:, 0], p.gather(1, token)[:, 0], trying)
            accepted = torch.where(trying & hit, j, accepted)
        return accepted, normalised((p - q).clamp(min=0), p) if x.shape[1] else p

    assert worst_bias("iid", walk(wrong), [2]) > VISIBLE


def test_control_argmax_draft_verified_with_softmax_q():
    assert worst_bias("top_k", walk(rules.multi_round), [1]) > 0.1


TRIALS = 100_000
LIMIT = 44.26  # chi-square at 1e-4 with 15 degrees of freedom


def pair_statistic(drafts, accept, p, q, generator) -> float:
    """Chi-square of the first two output tokens of chains of two drafts, against the product of p."""
    V = p.shape[1]
    tree = DraftTree.chain(torch.cat([torch.zeros(TRIALS, 1, dtype=torch.int64), drafts.long()], 1))
    target, draft = (torch.cat([x, x[:1]]).log().repeat(TRIALS, 1) for x in (p, q))
    found = verify_chain(
        tree.tokens,
        tree.cu_nodes,
        target,
        draft,
        max_depth=2,
        accept_uniforms=accept.reshape(-1),
        final_uniforms=torch.rand(TRIALS, generator=generator),
        backend="reference",
    )
    second = torch.multinomial(p[1], TRIALS, True, generator=generator)
    second = torch.where(found.num_tokens >= 2, found.tokens[:, 1].long(), second)
    observed = torch.bincount(found.tokens[:, 0].long() * V + second, minlength=V * V).double()
    expected = (p[0][:, None] * p[1]).reshape(-1).double() * TRIALS
    return float(((observed - expected) ** 2 / expected).sum())


def pair_of_positions():
    generator = torch.Generator().manual_seed(5)
    p, q = torch.rand(2, 2, 4, generator=generator).softmax(-1).unbind(0)
    p = p**2 / (p**2).sum(1, keepdim=True)  # far enough from q that coins matter
    return p, q, generator


def test_control_shared_coins_of_a_path():
    """One coin for all positions of a request."""
    p, q, generator = pair_of_positions()
    drafts = torch.stack([torch.multinomial(q[i], TRIALS, True, generator=generator) for i in range(2)], 1)
    coins = torch.rand(TRIALS, 3, generator=generator)
    assert pair_statistic(drafts, coins, p, q, generator) < LIMIT
    assert pair_statistic(drafts, coins[:, :1].expand(-1, 3), p, q, generator) > 10 * LIMIT


def test_control_one_noise_vector_for_several_positions():
    """Drafts of two positions drawn with the same Gumbel noise, as if `Philox.row` were left out."""
    p, q, generator = pair_of_positions()
    seeds, zeros = torch.arange(TRIALS), torch.zeros(TRIALS, dtype=torch.int64)

    def drafts(rows):
        columns = []
        for logits, row in zip(q.log(), rows, strict=True):
            rng = Philox(seeds, zeros, torch.full((TRIALS,), row, dtype=torch.int32))
            columns.append(head_sample(logits.expand(TRIALS, 4), torch.eye(4), rng=rng, backend="reference").tokens)
        return torch.cat(columns, 1)

    coins = torch.rand(TRIALS, 3, generator=generator)
    assert pair_statistic(drafts([0, 1]), coins, p, q, generator) < LIMIT
    assert pair_statistic(drafts([0, 0]), coins, p, q, generator) > 10 * LIMIT
