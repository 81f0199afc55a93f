"""A thin tail over a whole vocabulary: head_sample draws it as often as its mass says, down to single tokens of 1e-8.

1000 tokens share 0.999 and 127256 share 0.001. A token of the tail is drawn first only with a noise of about 19, which
noise of 24 bits, ending at 17, never reaches: it left these draws without a tail.
"""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import binom

import specdec_kernels as sk
from head_cases import BACKENDS, check_ranking
from specdec_kernels import philox

VOCABULARY, HEAVY, TAIL = 128256, 1000, 1e-3
# Requests of the pool below that draw a token of the tail, as the pool itself found them.
LUCKY = [1744, 1988, 3484]


def draw(backend: str, seeds: torch.Tensor):
    """(logits [V], tokens [B, 2]) of one request a seed; hidden states of one element, so that noise is the work."""
    heavy = torch.arange(HEAVY) * (VOCABULARY // HEAVY)
    weight = torch.full((VOCABULARY, 1), math.log(TAIL / (VOCABULARY - HEAVY)))
    weight[heavy] = math.log((1 - TAIL) / HEAVY)
    rng = sk.Philox(seeds, torch.full_like(seeds, 3))
    drawn = sk.head_sample(torch.ones(len(seeds), 1), weight, 2, rng=rng, backend=backend)
    return weight[:, 0], drawn.tokens


def in_tail(logits, tokens):
    return logits[tokens.long()] < -10


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_the_tail_is_drawn_as_often_as_its_mass_says(backend):
    # The second of two draws is of the tail with probability 1.001e-3: as good as the first.
    draws = 12_000
    seen = int(in_tail(*draw(backend, torch.arange(draws // 2))).sum())
    low, high = binom.ppf([5e-5, 1 - 5e-5], draws, TAIL)
    assert 0 < low <= seen <= high, f"{seen} of {draws} draws are of the tail, expected {low:.0f} to {high:.0f}"


@pytest.mark.native
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_draws_the_same_tail(backend):
    seeds = torch.tensor(LUCKY)
    logits, tokens = draw(backend, seeds)
    assert in_tail(logits, tokens).any(1).all()
    ids = torch.arange(VOCABULARY)
    zero = torch.zeros((), dtype=torch.int64)
    words = philox.words(seeds[:, None], zero + 3, philox.DRAFT, zero, ids)
    noise = -torch.log(-torch.log1p(-(words.double() + 0.5) * 2.0**-32))
    check_ranking(tokens, logits.double() + noise, ids.expand(len(seeds), -1))
