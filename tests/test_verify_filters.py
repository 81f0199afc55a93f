"""The sets that filters keep, where rounding decides: thresholds are on z = (x - max) / T, ties stay in."""

from __future__ import annotations

import math

import pytest
import torch

from specdec_kernels.reference.rows import Rows

INF = float("inf")


def kept(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> list[int]:
    zero = torch.zeros(len(logits), dtype=torch.int64)
    index = torch.arange(len(logits))
    weights, sound = Rows(logits, logits.shape[1], scalars=(temperature, top_k, top_p, min_p)).log_weights(index, zero)
    assert bool(sound.all())
    return (weights > -INF).int().tolist()


@pytest.mark.parametrize("min_p", [1e-6, 0.05, 0.1, 0.3, 0.5, 0.9, 1.0])
def test_min_p_keeps_exactly_the_z_that_reach_its_logarithm(min_p):
    """Around the threshold, one unit in the last place apart: exp(z) in fp32 is the same for many of them."""
    bar = math.log(float(torch.tensor(min_p, dtype=torch.float32)))
    z = [torch.tensor(min(bar, 0.0), dtype=torch.float32)]
    for direction in (-INF, 0.0):
        x = z[0]
        for _ in range(40):
            x = torch.nextafter(x, torch.tensor(direction))
            z.append(x)
    row = torch.stack([torch.tensor(0.0), *z])
    expected = [int(x >= bar) for x in row.tolist()]
    assert kept(row[None], min_p=min_p)[0] == expected
    assert 0 < sum(expected) < len(expected)


def test_min_p_of_fp64_logits_is_exact_in_fp64():
    bar = math.log(float(torch.tensor(0.1, dtype=torch.float32)))
    row = torch.tensor([0.0, bar, math.nextafter(bar, -INF), math.nextafter(bar, 0.0)], dtype=torch.float64)
    assert kept(row[None], min_p=0.1) == [[1, 1, 0, 1]]


def test_ties_are_those_of_z_not_of_logits():
    row = torch.tensor([[0.0, -1e-8, -2e-8, -1e30]])
    assert kept(row, temperature=1.0, top_k=1) == [[1, 0, 0, 0]]
    # Divided by the temperature the first three underflow to one z.
    assert kept(row, temperature=1e38, top_k=1) == [[1, 1, 1, 0]]
    assert kept(row, temperature=1e38, top_p=0.1) == [[1, 1, 1, 0]]


def test_top_p_stops_at_the_first_value_that_reaches_the_mass():
    row = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    exact = torch.zeros(1, 4).scatter(1, torch.tensor([[3]]), 1.0)
    assert kept(row, top_p=0.4) == [[1, 0, 0, 0]]
    assert kept(row, top_p=0.6) == [[1, 1, 0, 0]]
    assert kept(row, top_p=0.8) == [[1, 1, 1, 1]], "a tie stays in"
    assert kept(torch.zeros(1, 8), top_p=0.01) == [[1] * 8]
    assert kept(row, top_p=0.0) == [[1, 0, 0, 0]]
    assert kept(exact * 1000, top_p=1 - 2.0**-24) == [[0, 0, 0, 1]]


def test_top_p_is_of_what_top_k_left():
    row = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert kept(row, top_p=0.5) == [[1, 1, 0, 0]]
    assert kept(row, top_k=2, top_p=0.5) == [[1, 0, 0, 0]]


def test_min_p_is_relative_to_the_largest_whatever_the_filters_before_it_left():
    row = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert kept(row, min_p=0.6) == [[1, 1, 0, 0]]
    assert kept(row, top_k=3, min_p=0.3) == [[1, 1, 1, 0]]
    assert kept(row, temperature=2.0, min_p=0.6) == [[1, 1, 1, 0]]
