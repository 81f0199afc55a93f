"""The size of a trimmed vocabulary: coverage, the cost model, and the choice against an exhaustive sweep."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from loop_support import one_thread  # noqa: F401 (a fixture)
from specdec_loop.vocab import (
    Costs,
    Latency,
    acceptance_of,
    block_efficiency,
    choose_size,
    count_tokens,
    frequency_order,
    measure_head,
    run_coverage,
    select_rows,
    size_grid,
)
from vocab_support import CORPORA, halves

V, K = 32000, 4


def swept(heldout, order, head, costs, acceptance, sizes):
    """Seconds for each token of every size, written as the sum over runs that the cost model states."""
    rank = torch.empty(V, dtype=torch.int64)
    rank[order.long()] = torch.arange(V)
    ranks = [rank[ids.long()] for ids in heldout]
    result = []
    for size, seconds in zip(sizes, head, strict=True):
        kept = [each < size for each in ranks]
        tokens = 1.0
        for j in range(1, K + 1):
            runs = [each.unfold(0, j, 1).all(1) for each in kept if len(each) >= j]
            tokens += acceptance**j * float(sum(run.sum() for run in runs)) / sum(map(len, runs))
        result.append((costs.target + K * (costs.body + float(seconds))) / tokens)
    return torch.tensor(result, dtype=torch.float64)


def head_seconds(rows):
    """A head of 2048 bf16 channels: a launch, tiles of 512 rows, a cache that holds the first 2 MB."""
    size = (torch.as_tensor(rows) / 512).ceil().double() * 512 * 4096
    return 40e-6 + size.clamp(max=2e6) / 200e9 + (size - 2e6).clamp(min=0) / 30e9


def noisy_samples(sizes, rounds, seed):
    """Measurements on a machine that others use: what disturbs only ever adds."""
    generator = torch.Generator().manual_seed(seed)
    rand = torch.rand(3, rounds, len(sizes), generator=generator, dtype=torch.float64)
    state = torch.where(torch.rand(rounds, 1, generator=generator) < 0.4, 1.4, 1.0)
    spikes = torch.where(rand[1] < 0.1, 5 * rand[2], 0.0)
    return head_seconds(sizes) * state * (1 - 0.1 * rand[0].clamp(min=1e-9).log() + spikes)


COSTS, ACCEPTANCE = Costs(target=15e-3, body=0.6e-3, plain=14e-3), 0.8


@lru_cache(maxsize=3)
def corpus(name):
    """Order, held-out text, and the best and the last of an exhaustive sweep."""
    counted, heldout = halves(name)
    order = frequency_order(count_tokens(counted, V), force=[0])
    sizes = [*range(256, V, 32), V]
    cost = swept(heldout, order, head_seconds(sizes), COSTS, ACCEPTANCE, sizes)
    return order, heldout, cost


@pytest.mark.parametrize("name", CORPORA)
def test_the_chosen_size_is_within_3_percent_of_an_exhaustive_sweep(name):
    order, heldout, cost = corpus(name)
    # The test says something: neither all rows nor the fewest would pass it.
    assert cost[-1] > 1.1 * cost.min() and cost[0] > 1.1 * cost.min()
    measured, runs = size_grid(V, 256), run_coverage(heldout, order, K)
    for seed in range(5):
        latency = Latency.of_samples(measured, noisy_samples(measured, rounds=12, seed=seed))
        size = choose_size(runs, latency, COSTS, acceptance=ACCEPTANCE).size
        found = swept(heldout, order, head_seconds([size]), COSTS, ACCEPTANCE, [size])
        assert float(found) <= 1.03 * cost.min(), (seed, size)


@pytest.mark.full
def test_the_chosen_size_is_within_3_percent_of_a_measured_sweep():
    """Time for each token on this machine: 57 sizes of a real head against the few that the choice looks at."""
    weight = torch.randn(V, 2048, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    # More than a cache holds: how much of it is left to one process changes by the second where others run too.
    other = torch.zeros(24_000_000)
    options = {"between": other.sum, "seconds": 300}
    sizes = sorted({*size_grid(V, 256, count=32), *range(1024, V, 1024)})
    scattered = torch.randperm(V, generator=torch.Generator().manual_seed(1))
    sweep = measure_head(weight, scattered, sizes, rounds=60, **options)
    whole = float(sweep.seconds[-1])
    # Steps that weigh against the head as those of a small model do.
    costs = Costs(target=4 * whole, body=0.2 * whole, plain=3.8 * whole)
    for name in CORPORA:
        counted, heldout = halves(name)
        order = frequency_order(count_tokens(counted, V), force=[0])
        measured = measure_head(weight, order, size_grid(V, 256), rounds=25, **options)
        size = choose_size(run_coverage(heldout, order, K), measured, costs, acceptance=ACCEPTANCE).size
        cost = swept(heldout, order, sweep.seconds, costs, ACCEPTANCE, sizes)
        found = swept(heldout, order, sweep.at([size]), costs, ACCEPTANCE, [size])
        assert float(found) <= 1.03 * cost.min(), (name, size)


def test_runs_are_counted_one_by_one():
    order = torch.tensor([3, 0, 4, 1, 2])
    sequences = [[3, 3, 0, 1, 3], [4], [2, 3, 0]]
    found = run_coverage([torch.tensor(ids) for ids in sequences], order, 3)
    assert found.shape == (3, 6) and found.dtype == torch.float64
    for size in range(6):
        kept = set(order[:size].tolist())
        for j in range(1, 4):
            runs = [ids[i : i + j] for ids in sequences for i in range(len(ids) - j + 1)]
            assert found[j - 1, size] == pytest.approx(sum(kept >= set(run) for run in runs) / len(runs))


def test_block_efficiency_is_the_sum_over_lengths_of_runs():
    runs = torch.tensor([[0.5, 1.0], [0.2, 1.0], [0.1, 1.0]], dtype=torch.float64)
    expected = [1 + 0.8 * 0.5 + 0.64 * 0.2 + 0.512 * 0.1, (1 - 0.8**4) / (1 - 0.8)]
    assert block_efficiency(runs, 0.8).tolist() == pytest.approx(expected)
    assert block_efficiency(runs, 0.0).tolist() == [1, 1]
    assert block_efficiency(runs, 1.0)[1] == 4


@pytest.mark.parametrize("acceptance", [0.0, 0.37, 0.8, 1.0])
def test_acceptance_is_the_inverse_of_block_efficiency(acceptance):
    efficiency = float(block_efficiency(torch.ones(5, 1, dtype=torch.float64), acceptance))
    assert acceptance_of(efficiency, 5) == pytest.approx(acceptance, abs=1e-9)


def test_the_objective_is_what_is_stated():
    """The curves of a choice, from numbers that can be worked out by hand."""
    runs = torch.tensor([[0.0, 0.5, 0.9, 1.0], [0.0, 0.3, 0.8, 1.0]], dtype=torch.float64)
    latency = Latency(torch.tensor([1, 3]), torch.tensor([0.1, 0.9], dtype=torch.float64))
    choice = choose_size(runs, latency, Costs(target=2.0, body=0.25, plain=1.5), acceptance=0.5, step=1)
    assert choice.sizes.tolist() == [1, 2, 3]
    assert choice.head_seconds.tolist() == pytest.approx([0.1, 0.5, 0.9])
    assert choice.coverage.tolist() == [0.5, 0.9, 1.0]
    assert choice.efficiency.tolist() == pytest.approx([1.325, 1.65, 1.75])
    assert choice.round_seconds.tolist() == pytest.approx([2.7, 3.5, 4.3])
    assert choice.speedup.tolist() == pytest.approx([1.5 * 1.325 / 2.7, 1.5 * 1.65 / 3.5, 1.5 * 1.75 / 4.3])
    assert (choice.size, choice.place) == (1, 0)


def test_a_smaller_size_may_cost_the_tolerance():
    runs = torch.tensor([[0.0, 0.990, 0.999, 1.0]], dtype=torch.float64)
    latency = Latency(torch.tensor([1, 2, 3]), torch.full((3,), 1e-6, dtype=torch.float64))
    costs = Costs(target=1.0, body=0.0, plain=1.0)
    sizes = [
        choose_size(runs, latency, costs, acceptance=1.0, step=1, tolerance=tolerance).size
        for tolerance in (0, 0.001, 0.01)
    ]
    assert sizes == [3, 2, 1]


def test_every_step_and_every_measured_size_is_weighed():
    runs = torch.linspace(0, 1, 1001, dtype=torch.float64)[None]
    latency = Latency(torch.tensor([70, 333, 1000]), torch.tensor([1e-3, 2e-3, 3e-3], dtype=torch.float64))
    choice = choose_size(runs, latency, Costs(1.0, 0.0, 1.0), acceptance=0.5, step=100)
    assert choice.sizes.tolist() == [70, 100, 200, 300, 333, 400, 500, 600, 700, 800, 900, 1000]


def test_grid():
    assert size_grid(32000, 256, 16)[:3] == [256, 353, 487]
    assert len(size_grid(32000, 256)) == 24 and size_grid(32000, 256)[-1] == 32000
    assert size_grid(7, 7) == [7]
    small = size_grid(10, 1)
    assert small == sorted(set(small)) and (small[0], small[-1]) == (1, 10)


def test_forced_ids_stand_first_and_backoff_orders_equals():
    counts, corpus = torch.tensor([4, 0, 0, 9, 0, 4]), torch.tensor([1, 1, 5, 0, 5, 2])
    assert frequency_order(counts, backoff=corpus).tolist() == [3, 5, 0, 2, 4, 1]
    order = frequency_order(counts, backoff=corpus, force=[4, 1, 4])
    assert order.tolist() == [1, 4, 3, 5, 0, 2] and order.dtype == torch.int32
    for size in range(2, 7):
        rows = select_rows(frequency_order(counts, backoff=corpus), size, force=[4, 1])
        assert rows.tolist() == sorted(order[:size].tolist())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: run_coverage([torch.tensor([5])], torch.arange(5), 1), r"sequences: expected ids in 0\.\.4, got 5"),
        (lambda: run_coverage([torch.tensor([1])], torch.arange(5), 2), "at least one of draft_length=2 tokens, got"),
        (lambda: run_coverage([], torch.tensor([0, 0]), 1), r"order: expected a permutation of 0\.\.1"),
        (lambda: block_efficiency(torch.ones(1, 1), 1.1), r"acceptance: expected a number in 0\.\.1, got 1\.1"),
        (lambda: acceptance_of(5.5, 4), r"efficiency: expected 1\.\.5 for draft_length=4, got 5\.5"),
        (lambda: size_grid(10, 11), r"lowest: expected 1\.\.10, got 11"),
        (lambda: frequency_order(torch.zeros(3), backoff=torch.zeros(4)), r"backoff: expected shape \[3\], got \[4\]"),
    ],
)  # fmt: skip
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"costs": Costs(0.0, 1.0, 1.0)}, r"costs\.target: expected seconds > 0, got 0\.0"),
        ({"costs": Costs(1.0, -1.0, 1.0)}, r"costs\.body: expected seconds >= 0, got -1\.0"),
        ({"costs": Costs(1.0, 1.0, float("nan"))}, r"costs\.plain: expected seconds > 0, got nan"),
        ({"step": 0}, "step: expected >= 1, got 0"),
        ({"tolerance": -0.1}, r"tolerance: expected >= 0, got -0\.1"),
        ({"latency": Latency(torch.tensor([1, 9]), torch.ones(2).double())}, "sizes up to V=4, got 9"),
    ],
)  # fmt: skip
def test_what_cannot_be_weighed_is_refused(options, message):
    given = {"latency": Latency(torch.tensor([1, 4]), torch.ones(2).double()), "costs": Costs(1.0, 1.0, 1.0)} | options
    with pytest.raises(ValueError, match=message):
        choose_size(torch.ones(2, 5, dtype=torch.float64), acceptance=0.5, **given)
