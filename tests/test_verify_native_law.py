"""The compiled `verify_chain` leaves the target's law unchanged, by counting."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chi2

import specdec_kernels as sk
from specdec_kernels import backends

MISSING = backends.MISSING["cpu"]
pytestmark = [pytest.mark.native, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]

VOCABULARY, DRAFTS, SIGNIFICANCE = 16, 3, 1e-4


def transitions(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [V, V] of what follows each token, of a target and a drafter; each has tokens that never follow."""
    target = torch.randn(VOCABULARY, VOCABULARY, generator=generator) * 1.5
    draft = target + 0.5 * torch.randn(VOCABULARY, VOCABULARY, generator=generator)
    for logits in (target, draft):
        logits[torch.rand(logits.shape, generator=generator) < 0.15] = -torch.inf
        logits[:, 3] = 0.5
    return target, draft


def run(trials, *, dtype=torch.float32, trimmed=False, point_mass=False, temperature=1.0, claimed=None, seed=0):
    """(transition probabilities [V, V], roots [B], Verified) of `trials` chains of a Markov target and drafter.

    `claimed`: the drafter's temperature as the verifier is told, where that is not what it drew with.
    """
    g = torch.Generator().manual_seed(seed)
    target, draft = (logits.to(dtype) for logits in transitions(g))
    vocab = torch.tensor([0, 2, 3, 5, 8, 9, 13]) if trimmed else torch.arange(VOCABULARY)
    draft = draft[:, vocab]
    q = torch.softmax(draft.double() / temperature, 1)
    tokens = torch.empty(trials, DRAFTS + 1, dtype=torch.int64)
    tokens[:, 0] = torch.randint(VOCABULARY, (trials,), generator=g)
    for j in range(DRAFTS):
        drawn = q.argmax(1)[tokens[:, j]] if point_mass else torch.multinomial(q[tokens[:, j]], 1, generator=g)[:, 0]
        tokens[:, j + 1] = vocab[drawn]
    rows = tokens.reshape(-1)
    got = sk.verify_chain(
        rows.to(torch.int32),
        torch.arange(trials + 1, dtype=torch.int32) * (DRAFTS + 1),
        target[rows],
        None if point_mass else draft[rows],
        max_depth=DRAFTS,
        draft_vocab=vocab.to(torch.int32) if trimmed else None,
        params=sk.SamplingParams(temperature=temperature),
        draft_params=sk.SamplingParams(temperature=claimed or temperature),
        rng=sk.Philox(torch.randint(-(2**63), 2**63 - 1, (trials,), generator=g), torch.arange(trials)),
        backend="cpu",
    )
    return torch.softmax(target.double() / temperature, 1), tokens[:, 0], got


def pearson(counts: torch.Tensor, expected: torch.Tensor) -> tuple[float, int]:
    """(statistic, degrees of freedom); in each row, cells of less than 5 count with the row's largest."""
    usable = expected > 5
    largest = expected.argmax(1, keepdim=True)
    merged = [x.masked_fill(usable, 0.0).sum(1, keepdim=True) for x in (counts, expected)]
    counts, expected = (x.scatter_add(1, largest, m) for x, m in zip((counts, expected), merged, strict=True))
    statistic = ((counts - expected) ** 2 / expected)[usable].sum()
    return float(statistic), int((usable.sum(1) - 1).clamp(min=0).sum())


def check_law(law: torch.Tensor, roots: torch.Tensor, got: sk.Verified) -> None:
    """At every position, what follows a token has the target's law, given that the walk came that far."""
    before = roots
    for j in range(DRAFTS + 1):
        there = got.num_tokens > j
        after = got.tokens[there, j].long()
        pairs = before[there] * VOCABULARY + after
        counts = torch.bincount(pairs, minlength=law.numel()).to(law.dtype).view(law.shape)
        assert (counts[law == 0] == 0).all(), f"position {j}: a token of probability 0"
        statistic, freedom = pearson(counts, law * counts.sum(1, keepdim=True))
        assert freedom > 10, f"position {j}: too few came that far"
        assert statistic < chi2.isf(SIGNIFICANCE, freedom), f"position {j}: {statistic:.0f} with {freedom} degrees"
        before = torch.where(there, got.tokens[:, j].long(), 0)


VARIANTS = [
    {},
    {"dtype": torch.bfloat16},
    {"trimmed": True},
    {"point_mass": True},
    {"temperature": 0.6},
    {"trimmed": True, "temperature": 1.7, "dtype": torch.float16},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_law(options):
    check_law(*run(30_000, **options))


@pytest.mark.full
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_law_of_many_trials(options):
    check_law(*run(200_000, seed=1, **options))


def test_counting_sees_a_wrong_drafter():
    """Told another q than the one that drew, no verifier keeps the law, and the test notices."""
    with pytest.raises(AssertionError, match="position 0"):
        check_law(*run(30_000, claimed=2.0))
