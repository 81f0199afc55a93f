"""The law of head_sample: chi-square of the first and of the second draw, fixed seeds, significance 1e-4."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chi2

import specdec_kernels as sk
from head_cases import BACKENDS

TRIALS, VOCABULARY = 200_000, 16


def draws(backend: str, trials: int, vary: str, temperature: float = 1.0, rows=None):
    """(probabilities [V] in float64, tokens [trials, 2]); `vary` says what tells one trial from the next."""
    generator = torch.Generator().manual_seed(11)
    weight = torch.randn(VOCABULARY, 8, generator=generator)
    hidden = torch.randn(8, generator=generator)
    bias = torch.zeros(VOCABULARY)
    bias[3] = -float("inf")
    index = torch.arange(trials)
    parts = {"seed": torch.full((trials,), 77), "offset": torch.full((trials,), 5), "row": torch.zeros_like(index)}
    parts[vary] = index
    rng = sk.Philox(parts["seed"], parts["offset"], parts["row"].to(torch.int32))
    law = torch.softmax((weight.double() @ hidden.double() + bias) / temperature, 0)
    got = sk.head_sample(
        hidden.expand(trials, -1), weight, 2, rng=rng, bias=bias, rows=rows, temperature=temperature, backend=backend
    )
    return law, got.tokens.long()


def check_counts(counts, law):
    """Chi-square of observed counts against probabilities; what cannot happen must not."""
    assert (counts[law == 0] == 0).all()
    possible = law > 0
    expected = law[possible] * counts.sum()
    # The limit law needs about five expected hits a cell: rarer ones are counted together.
    rare = expected < 5
    seen = counts[possible].double()
    seen = torch.cat([seen[~rare], seen[rare].sum()[None]]) if rare.any() else seen
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]]) if rare.any() else expected
    statistic = float(((seen - expected) ** 2 / expected).sum())
    limit = chi2.isf(1e-4, len(expected) - 1)
    assert statistic < limit, f"chi-square {statistic:.1f}, limit {limit:.1f}"


def pairs_law(law):
    """[V, V] Plackett-Luce law of the first two draws: q(a) q(b) / (1 - q(a)), a != b."""
    pairs = law[:, None] * law[None] / (1 - law[:, None])
    return pairs.fill_diagonal_(0)


def check_pairs(law, tokens):
    check_counts(torch.bincount(tokens[:, 0], minlength=VOCABULARY), law)
    second = pairs_law(law).sum(0)
    check_counts(torch.bincount(tokens[:, 1], minlength=VOCABULARY), second)
    pairs = torch.bincount(tokens[:, 0] * VOCABULARY + tokens[:, 1], minlength=VOCABULARY**2)
    check_counts(pairs, pairs_law(law).reshape(-1))


@pytest.mark.parametrize("vary", ["seed", "offset", "row"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_draws_follow_plackett_luce(backend, vary):
    check_pairs(*draws(backend, TRIALS, vary))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_draws_follow_the_tempered_law(backend, temperature):
    rows = torch.arange(VOCABULARY, dtype=torch.int32).flip(0)
    check_pairs(*draws(backend, TRIALS, "offset", temperature, rows))


@pytest.mark.parametrize(
    "mistake", ["one noise vector for all trials", "second draw with replacement", "no temperature"]
)
def test_the_test_sees_mistakes(mistake):
    """Negative controls: the chi-square must refuse draws that follow another law."""
    if mistake == "no temperature":
        law, tokens = draws("reference", 50_000, "seed", 1.25)
        law = law**1.25 / (law**1.25).sum()
    else:
        law, tokens = draws("reference", 50_000, "seed")
    if mistake == "one noise vector for all trials":
        tokens = tokens[:500].repeat(100, 1)
    if mistake == "second draw with replacement":
        tokens = torch.stack([tokens[:, 0], tokens[:, 0].roll(1)], 1)
    with pytest.raises(AssertionError):
        check_pairs(law, tokens)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("temperature", [1e-4, 1e-6, 1e-8])
def test_equal_logits_are_drawn_equally_at_any_temperature(backend, temperature):
    """Near temperature 0 a quotient of two equal large logits must not swallow the noise that decides between them."""
    draws = 4000
    rng = sk.Philox(torch.arange(draws), torch.zeros(draws, dtype=torch.int64))
    hidden, weight = torch.full((draws, 1), 20.0), torch.tensor([[1.0], [0.5], [1.0], [-1.0]])
    found = sk.head_sample(hidden, weight, 2, rng=rng, temperature=temperature, backend=backend)
    assert set(found.tokens[:, 0].tolist()) == {0, 2} == set(found.tokens[:, 1].tolist())
    share = float((found.tokens[:, 0] == 0).double().mean())
    assert abs(share - 0.5) < 3.9 * 0.5 / draws**0.5  # two-sided 1e-4
    assert torch.allclose(found.entropy, torch.tensor(2.0).log().expand(draws), atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-42])
def test_the_smallest_temperatures_draw_the_largest_logit(backend, temperature):
    rng = sk.Philox(torch.arange(50), torch.zeros(50, dtype=torch.int64))
    hidden, weight = torch.full((50, 1), -20.0), torch.tensor([[1.0], [0.5], [-1.5], [-1.0]])
    found = sk.head_sample(hidden, weight, 3, rng=rng, temperature=temperature, backend=backend)
    assert found.tokens.unique(dim=0).tolist() == [[2, 3, 1]]
    assert found.entropy.abs().max() < 1e-6
