"""A request's walk depends on nothing but the request and on no row that it does not reach, on every backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import specdec_kernels as sk
from tree_cases import FORM_IDS, FORMS, Case, Spec, fits, random_case
from verify_backends import assert_same_bits, every_backend, of, run
from verify_margins import assert_same_walks

pytestmark = every_backend("cpu", "triton", "cuda", cpu=pytest.mark.native, cuda=pytest.mark.gpu)

EVERY_METHOD = pytest.mark.parametrize(("method", "chain"), FORMS, ids=FORM_IDS)
CROWDED = {"trimmed": 40, "masked": True, "filters": "KPM", "draft_filters": "k", "temperature": "mixed", "gaps": True}


@EVERY_METHOD
@pytest.mark.parametrize("options", [{"vocabulary": 9000}, {"vocabulary": 111, **CROWDED}], ids=["wide", "crowded"])
def test_batch_and_order_change_no_bit(backend, method, chain, options):
    case = random_case(Spec(method, chain, 15, 7, **options))
    expected, order = run(case, backend), [4, 0, 6, 2, 5, 1, 3]
    assert_same_bits(run(case.select(order), backend), of(expected, order))
    assert_same_bits(run(case.select([2] * 9 + order), backend), of(expected, [2] * 9 + order))
    for request in range(7):
        assert_same_bits(run(case.select([request]), backend), of(expected, [request]))


@EVERY_METHOD
@pytest.mark.parametrize(
    "options", [{"vocabulary": 30_000}, {"vocabulary": 30_000, **CROWDED}], ids=["plain", "crowded"]
)
def test_threads_change_no_bit(backend, method, chain, options):
    if backend != "cpu":
        pytest.skip("only the CPU has threads that torch counts")
    case = random_case(Spec(method, chain, 16, 3, 6, **options))
    threads, expected = torch.get_num_threads(), run(case, backend)
    try:
        for number in (1, 2, 3, 16):  # 16 > 3 requests: the threads share a row
            torch.set_num_threads(number)
            assert_same_bits(run(case, backend), expected)
    finally:
        torch.set_num_threads(threads)


def kept_by_typical(case: Case, nodes: range, p: torch.Tensor) -> set[int]:
    """Nodes of a request on whose path every token passes the threshold of typical acceptance."""
    bar = (0.3 * (-torch.special.entr(p).sum(1)).exp()).clamp(max=0.09)
    kept = {0}
    for parent, children in enumerate(case.children_of(nodes)):
        row = nodes.start + parent
        tokens = {child: int(case.tokens[nodes.start + child]) for child in children if parent in kept}
        kept |= {child for child, token in tokens.items() if p[row, token] > bar[row]}
    return kept


def visited_bottom_up(case: Case, nodes: range, p: torch.Tensor, end: int) -> set[int]:
    """Inner nodes that traversal verification enters before it accepts `end`; all of its descendants are behind it."""
    children, entered = case.children_of(nodes), set()

    def visit(node) -> bool:
        entered.update({node} if children[node] else ())
        for child in children[node]:
            # A token without probability has no weight, so nothing below it can be accepted.
            if p[nodes.start + node, int(case.tokens[nodes.start + child])] > 0 and visit(child):
                return True
        return node == end

    visit(0)
    return entered


def unreached(case: Case, answer: sk.Verified, request: int, p: torch.Tensor) -> tuple[list[int], list[int]]:
    """(rows of the target, rows of the draft) of a request, packed, that the walk to its answer does not reach."""
    nodes, method = case.requests()[request], case.method
    children = case.children_of(nodes)
    path = answer.nodes[request, : int(answer.num_tokens[request])].tolist()
    target = set(path)
    if method == "typical" and "lossy" not in case.options:
        target |= {node for node in kept_by_typical(case, nodes, p) if children[node]}
    elif method in ("block", "traversal", "traversal_iid") and "lossy" not in case.options:
        target |= visited_bottom_up(case, nodes, p, path[-1])
    reads_draft = method not in ("greedy", "typical", "target_only") and "lossy" not in case.options
    draft = {node for node in target if children[node]} if reads_draft else set()
    return tuple([nodes.start + i for i in range(len(nodes)) if i not in reached] for reached in (target, draft))


REACH = {
    "plain": {},
    "trimmed": {"trimmed": 20, "masked": True, "gaps": True},
    "filters": {"filters": "KPM", "draft_filters": "p", "temperature": "mixed"},
    "point_mass": {"point_mass": True},
    "zeros": {"zeros": True},
    "synthetic": {"lossy": "synthetic"},
}


def reach(method: str, chain: bool, name: str) -> Spec:
    return Spec(method, chain, 12, 30, 10, 48, distance=2.0, **REACH[name])


@pytest.mark.parametrize(
    ("method", "chain", "name"),
    [
        pytest.param(method, chain, name, id=f"{form}-{name}")
        for (method, chain), form in zip(FORMS, FORM_IDS, strict=True)
        for name in REACH
        if fits(reach(method, chain, name))
    ],
)
def test_rows_the_walk_does_not_reach_change_nothing(backend, method, chain, name):
    case = random_case(reach(method, chain, name))
    p = case.target_probs()
    for who in ("reference", backend):
        clean = run(case, who)
        target, draft = case.target.clone(), None if case.draft is None else case.draft.clone()
        for request in range(30):
            of_target, of_draft = unreached(case, clean, request, p)
            target[of_target] = torch.nan
            if draft is not None:
                draft[of_draft] = torch.nan
        assert target.isnan().any()
        poisoned = replace(case, target=target, draft=draft)
        assert_same_bits(run(poisoned, who), clean)


@EVERY_METHOD
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_broken_rows_stay_in_their_request(backend, method, chain, bad):
    """One row after another is broken, once in the target and once in the draft, in copies of the same request."""
    vocabulary = 40 if backend == "triton" else 4500  # beyond a block; the interpreter would take minutes
    case = random_case(Spec(method, chain, 3, 4, 9, vocabulary, temperature=0.7))
    requests = case.requests()
    whole = max(range(4), key=lambda b: len(requests[b]))
    neighbour, size = (whole + 1) % 4, len(requests[whole])
    copies = case.select([x for _ in range(2 * size) for x in (whole, neighbour)])
    clean = run(case.select([neighbour]), backend)
    for copy, node in enumerate(copies.cu_nodes[:-1:2].tolist()):
        logits = copies.target if copy < size else copies.draft
        row = logits[node + copy % size]
        row[... if bad == -torch.inf else -7] = bad
    got, expected = run(copies, backend), copies.run("reference")
    assert_same_walks(copies, got, expected, backend)
    assert (expected.num_tokens[::2] == 0).any() and (expected.num_tokens[::2] > 0).any()
    broken = got.num_tokens == 0
    assert (got.tokens[broken] == -1).all() and (got.nodes[broken] == -1).all() and got.logprobs[broken].isnan().all()
    neighbours = list(range(1, 4 * size, 2))
    assert_same_bits(of(got, neighbours), of(clean, [0] * len(neighbours)))


@EVERY_METHOD
def test_a_mask_hides_what_is_broken(backend, method, chain):
    case = random_case(Spec(method, chain, 14, 7, vocabulary=111, masked=True))
    clean = run(case, backend)
    words = case.options["params"].allowed
    allowed = (words[:, :, None] >> torch.arange(32, dtype=torch.int32)).reshape(len(words), -1)[:, :111] & 1
    case.target = torch.where(allowed == 1, case.target, torch.nan)
    assert_same_bits(run(case, backend), clean)
