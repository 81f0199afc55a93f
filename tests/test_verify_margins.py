"""The oracle of verify_margins.py: it knows both answers at a threshold, and no other."""

from __future__ import annotations

import pytest
import torch

from tree_cases import FORM_IDS, FORMS, Case, Spec, random_case
from verify_margins import BAND, assert_same_walks, is_exact

REQUESTS = 8
RANDOM = [pytest.param(m, c, id=i) for (m, c), i in zip(FORMS, FORM_IDS, strict=True) if m not in ("greedy", "typical")]


def first_tests(case: Case) -> torch.Tensor:
    """[B] packed nodes whose coins decide first."""
    return case.cu_nodes[:-1].long() + (case.method != "target_only")


def coin(case: Case, which: str) -> torch.Tensor:
    """[B] the final coin of each request, or that of its first test."""
    return case.options["final_uniforms"] if which == "final" else case.options["accept_uniforms"][first_tests(case)]


def with_coin(case: Case, which: str, values: torch.Tensor) -> Case:
    if which == "final":
        return case.with_options(final_uniforms=values)
    return case.with_options(accept_uniforms=case.options["accept_uniforms"].index_copy(0, first_tests(case), values))


def thresholds(case: Case, which: str):
    """(case with the coin just below a threshold, case with it just above, requests that have a threshold)."""

    def outcome(values):
        answer = with_coin(case, which, values).run("reference", logprobs=False)
        return torch.cat([answer.tokens, answer.nodes], 1)

    low, high = torch.zeros(REQUESTS), torch.full((REQUESTS,), 1 - 2.0**-24)
    below = outcome(low)
    found = (below != outcome(high)).any(1)
    for _ in range(26):
        middle = (low + high) / 2
        same = (below == outcome(middle)).all(1)
        low, high = torch.where(same, middle, low), torch.where(same, high, middle)
    return with_coin(case, which, low), with_coin(case, which, high), found.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("which", ["accept", "final"])
@pytest.mark.parametrize(("method", "chain"), RANDOM)
def test_both_answers_are_right_at_a_threshold_and_one_beside_it(method, chain, which):
    shape = [-1, 0, 1, 2] if chain else [-1, 0, 0, 1, 1, 2]
    case = random_case(Spec(method, chain, 21, REQUESTS, len(shape), explicit=True), [shape] * REQUESTS)
    below, above, found = thresholds(case, which)
    answers = below.run("reference"), above.run("reference")
    beside = with_coin(case, which, (coin(below, which) - 3e-4).clamp(min=0.0))
    found = [request for request in found if coin(below, which)[request] > 1e-3][:2]
    assert found
    for request in found:
        assert all(is_exact(given, answer, request) for answer in answers for given in (below, above))
        assert not is_exact(beside, answers[1], request)


@pytest.mark.parametrize(("method", "chain"), FORMS, ids=FORM_IDS)
def test_wrong_answers_are_seen(method, chain):
    case = random_case(Spec(method, chain, 22, 3, filters="kp", temperature="mixed"))
    right = case.run("reference")
    last = right.num_tokens.long()[:, None] - 1
    wrong_token = right.tokens.scatter(1, last, (right.tokens.gather(1, last) + 1) % 33)
    assert_same_walks(case, right, right)
    for request in range(3):
        assert is_exact(case, right, request)
        assert not is_exact(case, right._replace(tokens=wrong_token), request)
        assert not is_exact(case, right._replace(num_tokens=right.num_tokens + 1), request)
    with pytest.raises(AssertionError, match="backend is wrong in request 0"):
        assert_same_walks(case, right._replace(tokens=wrong_token), right)
    with pytest.raises(AssertionError):
        assert_same_walks(case, right._replace(logprobs=right.logprobs + 100 * BAND), right)
