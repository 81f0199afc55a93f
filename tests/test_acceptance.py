"""The acceptance report of bench/: its closed forms, bounds and measurements on rows small enough to enumerate."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

import law
from specdec_kernels import optimal_acceptance
from test_verify_law import VERIFIERS

BENCH = Path(__file__).resolve().parents[1] / "bench"
EXACT = 1e-12
CLOSED_FORMS = ("multi_round", "k_seq", "greedy_multi", "target_only")


@pytest.fixture(scope="module")
def modules():
    """The three modules of the report, which import one another as scripts of one folder do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        import acceptance
        import acceptance_measured
        import acceptance_rates

        yield acceptance_rates, acceptance_measured, acceptance


def row_of(vocabulary: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    case = law.Case.random(vocabulary, 1, seed)
    return case.p[0][0], case.q[0][0]


def enumerated(name: str, vocabulary: int, seed: int, k: int) -> float:
    """Acceptance of one node by the reference's rule, over every way the draws and the coins can come out."""
    scheme, verifier, point_mass = VERIFIERS[name]
    case = law.Case.random(vocabulary, 1, seed)
    return law.expected_accepted(case, law.draw_all(case, [k], scheme), verifier, point_mass=point_mass)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_forms_are_what_enumeration_gives(modules, name, seed):
    rates, _, _ = modules
    found = getattr(rates, name)(*row_of(4, seed), 3)
    for k in (1, 2, 3):
        assert float(found[k - 1]) == pytest.approx(enumerated(name, 4, seed, k), abs=EXACT)


def least(p, ways) -> float:
    """1 + min over all sets H of p(H) - Pr(all draws lie in H): the optimum of any way to draw (2502.18779)."""
    sets = itertools.chain.from_iterable(itertools.combinations(range(len(p)), n) for n in range(len(p) + 1))
    return 1 + min(float(p[list(h)].sum()) - sum(chance for way, chance in ways if set(way) <= set(h)) for h in sets)


@pytest.mark.parametrize(("name", "scheme"), [("greedy_multi", "greedy_multi"), ("target_only", "top_k")])
def test_deterministic_drafts_reach_their_own_optimum(modules, name, scheme):
    rates, _, _ = modules
    for seed, k in itertools.product(range(5), (1, 2, 3)):
        p, q = row_of(5, seed)
        found = float(getattr(rates, name)(p, q, 3)[k - 1])
        assert found == pytest.approx(least(p, law.siblings(scheme, q, k)), abs=EXACT)


@pytest.mark.parametrize("block", [3, 4, 256])
def test_the_bound_without_replacement(modules, block):
    """The integral is the Plackett-Luce mass of every prefix, and no optimum is above the result."""
    rates, _, _ = modules
    for seed in range(8):
        p, q = row_of(6, seed)
        found = rates.bound_without_replacement(p, q, 3, block=block)
        order = (q / p).argsort(descending=True).tolist()
        for k in (1, 2, 3):
            ways = law.siblings("without_replacement", q, k)
            prefixes = [set(order[:n]) for n in range(7)]
            gaps = [float(p[list(h)].sum()) - sum(c for way, c in ways if set(way) <= h) for h in prefixes]
            assert float(found[k - 1]) == pytest.approx(1 + min(gaps), abs=rates.ACCURACY)
            optimum = float(optimal_acceptance(p, q, k, replacement=False))
            assert float(found[k - 1]) >= optimum - rates.ACCURACY
            for name in ("without_replacement", "traversal") if k < 3 else ():
                assert enumerated(name, 6, seed, k) <= float(found[k - 1]) + rates.ACCURACY
        assert float(found[0]) == pytest.approx(float(torch.minimum(p, q).sum()), abs=rates.ACCURACY)


def test_the_bound_of_rows_with_zeros_and_of_a_peaked_draft(modules):
    rates, _, _ = modules
    p = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0], dtype=torch.float64)
    q = torch.tensor([0.0, 0.4, 0.0, 0.6, 0.0], dtype=torch.float64)
    assert rates.bound_without_replacement(p, q, 2).tolist() == pytest.approx([0.2, 0.2], abs=rates.ACCURACY)
    peak = torch.tensor([1 - 3e-9, 1e-9, 1e-9, 1e-9, 0.0], dtype=torch.float64)
    found = rates.bound_without_replacement(p, peak, 3)
    for k in (1, 2, 3):
        assert float(found[k - 1]) >= least(p, law.siblings("without_replacement", peak, k)) - rates.ACCURACY


@pytest.mark.parametrize("vocabulary", [7, 300])
def test_the_order_of_the_curves(modules, vocabulary):
    rates, _, _ = modules
    for seed in range(5):
        p, q = row_of(vocabulary, seed)
        curves = {name: getattr(rates, name)(p, q, 6) for name in CLOSED_FORMS}
        curves["optimum"], curves["bound"] = rates.optimum(p, q, 6), rates.bound_without_replacement(p, q, 6)
        for name, curve in curves.items():
            assert bool((curve.diff() >= -rates.ACCURACY).all()) and float(curve[0]) >= 0, name
            assert float(curve[-1]) <= 1 + rates.ACCURACY
            if name != "target_only":
                assert float(curve[0]) == pytest.approx(float(torch.minimum(p, q).sum()), abs=rates.ACCURACY)
        k = torch.arange(1, 7)
        assert bool((curves["multi_round"] <= curves["optimum"] + EXACT).all())
        assert bool((curves["k_seq"] <= curves["optimum"] + EXACT).all())
        assert bool((curves["k_seq"] >= (1 - (1 - 1 / k) ** k) * curves["optimum"] - EXACT).all())


def small_rows(measured, count: int, vocab=None):
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(2, count, 6, generator=generator)
    return [measured.make_row(target, draft, vocab, 0.8) for target, draft in zip(*logits, strict=True)]


def test_verify_tree_decides_as_the_closed_forms_say(modules):
    _, measured, acceptance = modules
    rows = small_rows(measured, 4)
    found = acceptance.curves(rows, 3, trials=4000)
    assert acceptance.complaints(found, 4 * 4000) == []
    for name in ("without_replacement", "traversal"):
        mean = sum(torch.tensor([expected(name, row, k) for k in (1, 2, 3)]) for row in rows) / len(rows)
        assert bool(((found[name].measured - mean).abs() < acceptance.SIGMAS * found[name].error).all())


def expected(name: str, row, k: int) -> float:
    scheme, verifier, point_mass = VERIFIERS[name]
    tables = [[x[None], x.expand(len(x), -1)] for x in (row.p, row.q)]
    case = law.Case(len(row.p), 1, *tables)
    return law.expected_accepted(case, law.draw_all(case, [k], scheme), verifier, point_mass=point_mass)


def test_on_one_node_traversal_decides_as_recursive_rejection_does(modules):
    _, measured, _ = modules
    (row,) = small_rows(measured, 1)
    tokens = measured.draws("traversal", row.q, 4, 500, torch.Generator().manual_seed(1))
    decisions = [
        measured.decide(method, row, tokens, torch.Generator().manual_seed(2), None)
        for method in ("without_replacement", "traversal")
    ]
    assert torch.equal(*decisions)
    assert len(decisions[0].unique()) > 2


def test_a_trimmed_head_accepts_at_most_what_it_covers(modules):
    _, measured, acceptance = modules
    rows = small_rows(measured, 3, vocab=torch.tensor([0, 2, 5], dtype=torch.int32))
    found = acceptance.curves(rows, 3, trials=500)
    assert acceptance.complaints(found, 3 * 500) == []
    covered = sum(float(row.p[[0, 2, 5]].sum()) for row in rows) / 3
    for name in ("multi_round", "k_seq", "greedy_multi", "target_only"):
        assert float(found[name].closed[-1]) <= covered + EXACT


def test_what_cannot_be_is_said(modules):
    _, measured, acceptance = modules
    found = acceptance.curves(small_rows(measured, 2), 2, trials=200)
    assert acceptance.complaints(found, 400) == []
    for name in acceptance.BOUNDS:
        wrong = {**found, name: found[name]._replace(measured=torch.ones(2, dtype=torch.float64))}
        assert any(line.startswith(f"{name}: measured") for line in acceptance.complaints(wrong, 400))
    above = {**found, "k_seq": found["k_seq"]._replace(closed=found[acceptance.IID].closed + 1e-3)}
    assert any("closed form" in line and "above" in line for line in acceptance.complaints(above, 400))


def test_the_table_and_the_picture(modules, tmp_path):
    _, measured, acceptance = modules
    found = acceptance.curves(small_rows(measured, 2), 2, trials=50)
    text = acceptance.table(found)
    assert text.splitlines()[0] == "| accepted, % | k=1 | k=2 | measured - closed form, at most |"
    best = 100 * float(found["k_seq"].closed[1])
    (line,) = [line for line in text.splitlines() if line.startswith("| k_seq |")]
    assert f"| {best:.1f} |" in line
    acceptance.picture({"a": found, "b": found, "c": found}, tmp_path / "x.png", "title")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
