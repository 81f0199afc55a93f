"""The CPU's cut of a filtered row: without sorting, exactly the set that the sorted definition keeps."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec_kernels import backends
from specdec_kernels.reference.rows import Rows
from verify_backends import ROOT

MISSING = backends.MISSING["cpu"]
pytestmark = [pytest.mark.native, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]

INF = float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# temperature, top_k, top_p, min_p. No top_p is a simple fraction, such as half of what an even number of logits of one
# weight add up to: whether sums reach that hangs on the order in which they are rounded.
SETTINGS = [
    (1.0, 50, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (2.0, 1000, 1.0, 0.0),
    (1.0, 0, 0.9, 0.0),
    (0.6, 0, 0.55, 0.0),
    (1.0, 0, 0.0, 0.0),
    (1.0, 0, 1.0 - 2.0**-24, 0.0),
    (1.0, 50, 0.9, 0.0),
    (0.7, 1000, 0.95, 0.02),
    (1.3, 0, 0.999, 1e-4),
    (1.0, 0, 1.0, 0.1),
    (1e-30, 0, 0.55, 0.0),
    (1e-42, 5, 0.55, 0.0),
    (1e30, 20, 0.3, 0.0),
]
SOME = [SETTINGS[i] for i in (0, 3, 4, 8)]


def rows(kind: str, size: int, dtype=torch.float32, number: int = 2) -> torch.Tensor:
    """[number, size] logits in an order in which no sample finds them typical, or are."""
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(number, size, generator=generator)
    few = torch.randint(0, size, (number, min(size, 20)), generator=generator)
    gone = torch.rand(number, size, generator=generator) < 0.99
    made = {
        "wide": lambda: x * 3,
        "peaked": lambda: (x * 2 - 5).scatter(1, few, 10 + 3 * torch.randn(few.shape, generator=generator)),
        "flat": lambda: x * 1e-3,
        # As many neighbouring floats as there are columns: nothing is tied, and no weight differs from the next by more
        # than 2^-23.
        "adjacent": lambda: (1 + x.argsort(1) * 2.0**-23).float(),
        "equal": lambda: torch.ones_like(x),
        "steps": lambda: (2 * x).round(),
        "holes": lambda: x.masked_fill(gone & (torch.arange(size) > 0), -INF),
        "huge": lambda: x * (1e4 if dtype == torch.float16 else 1e30),
        "exponents": lambda: x.sign() * (8 * x).exp().clamp(max=1e4),
        "subnormal": lambda: x * (1e-6 if dtype == torch.float16 else 1e-39),
        "zeros": lambda: torch.where(x > 0, 0.0, -0.0) - (x.abs() > 1).float(),
        "sorted": lambda: (x * 3).sort(1).values,
        "blocked": lambda: x + 9 * (torch.arange(size) < size // 8),
        "comb": lambda: x + 6 * (torch.arange(size) % 32 < 4),
        "inverse_comb": lambda: x - 6 * (torch.arange(size) % 32 < 4),
    }
    return made[kind]().to(dtype)


KINDS = ["wide", "peaked", "flat", "adjacent", "equal", "steps", "holes", "huge", "exponents", "subnormal", "zeros"]
KINDS += ["sorted", "blocked", "comb", "inverse_comb"]


def cuts(logits, setting, **further) -> torch.Tensor:
    return torch.ops.specdec_kernels._filter_cut(logits, *map(float, setting), **further)


def assert_exact(logits, setting, *, allowed=None, ids=None, vocabulary=None) -> None:
    number, size = logits.shape
    definition = Rows(logits, vocabulary or size, vocab=ids, scalars=setting, allowed=allowed)
    weights, sound = definition.log_weights(torch.arange(number), torch.zeros(number, dtype=torch.int64))
    assert bool(sound.all())
    x = logits.float()
    columns = torch.arange(size) if ids is None else ids.long()
    if allowed is not None:
        x = x.masked_fill((allowed[:, columns >> 5] >> (columns & 31).int()) & 1 == 0, -INF)
    # What a low temperature divides to -inf has no weight, whether it is cut or not.
    weighs = (x - x.amax(1, keepdim=True)) / torch.tensor(setting[0], dtype=torch.float32) > -INF
    kept = (x >= cuts(logits, setting, allowed=allowed, ids=ids)[:, None]) & weighs
    expected = weights[:, columns] > -INF
    assert torch.equal(kept, expected), f"{setting}: kept {kept.sum(1).tolist()} of {expected.sum(1).tolist()}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 111, 600, 4097])
@pytest.mark.parametrize("kind", KINDS)
def test_small_rows(kind, size, dtype):
    logits = rows(kind, size, dtype)
    for setting in [*SETTINGS, (1.0, size - 1, 0.55, 0.0), (1.0, size // 2, 1.0, 0.0), (1.0, size, 0.7, 0.0)]:
        assert_exact(logits, setting)


@pytest.mark.parametrize("size", [32000, 128256, 262144])
@pytest.mark.parametrize("kind", KINDS)
def test_vocabularies(kind, size):
    logits = rows(kind, size, number=1)
    for setting in SOME:
        assert_exact(logits, setting)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("kind", ["wide", "peaked", "steps"])
def test_vocabularies_in_half_precision(kind, dtype):
    logits = rows(kind, 128256, dtype, number=1)
    for setting in [*SOME, (1.0, 40000, 0.6, 0.0)]:
        assert_exact(logits, setting)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [32000, 128256, 262144])
@pytest.mark.parametrize("kind", KINDS)
def test_vocabularies_under_all_settings(kind, size, dtype):
    logits = rows(kind, size, dtype, number=1)
    for setting in [*SETTINGS, (1.0, size // 3, 0.8, 0.0), (1.0, size - 1, 1.0, 0.0)]:
        assert_exact(logits, setting)


@pytest.mark.parametrize("kind", ["wide", "peaked", "holes"])
@pytest.mark.parametrize("share", [0.0005, 0.3, 1.0])
def test_masked_rows(share, kind):
    generator = torch.Generator().manual_seed(5)
    size = 9000
    logits = rows(kind, size)
    bits = torch.rand(2, (size + 31) // 32, 32, generator=generator) < share
    bits[:, 0, 0] = True
    allowed = (bits.long() << torch.arange(32)).sum(2).int()
    for setting in SETTINGS:
        assert_exact(logits, setting, allowed=allowed)
    ids = torch.randperm(size, generator=generator)[:5001].sort().values.int()
    ids[0] = 0
    for setting in SETTINGS:
        assert_exact(logits[:, :5001].contiguous(), setting, allowed=allowed, ids=ids, vocabulary=size)


@pytest.mark.parametrize("kind", ["peaked", "wide"])
def test_masses_that_hang_on_the_last_digits(kind):
    """top_p next to what the largest logits add up to: the fast pass is too coarse for these, the exact one decides."""
    logits = rows(kind, 32000, number=1)
    ranked = logits.sort(1, descending=True).values[0]
    reached = ranked.softmax(0, dtype=torch.float64).cumsum(0)
    sizes = set()
    for index in (0, 1, 2, 5, 11, 400):
        near = reached[index].float()
        for top_p in (near, torch.nextafter(near, torch.tensor(0.0)), torch.nextafter(near, torch.tensor(1.0))):
            assert_exact(logits, (1.0, 0, float(top_p), 0.0))
            sizes.add(int((logits >= cuts(logits, (1.0, 0, float(top_p), 0.0))).sum()))
    assert {1, 2, 3, 6, 12, 401} <= sizes and {2, 3, 4, 7, 13, 402} <= sizes


@pytest.mark.parametrize("kind", ["wide", "adjacent"])
def test_masses_that_hang_on_fp64(kind):
    """Sums that come as close to fp32 numbers as 1e-10, where nothing short of fp64 tells on which side they are."""
    logits = rows(kind, 128256, number=1)
    reached = logits.sort(1, descending=True).values[0].softmax(0, dtype=torch.float64).cumsum(0)
    apart = reached - reached.float().double()
    for side, further in ((apart, 1), (-apart, 2)):
        chosen = ((side > 2e-11) & (side < 2e-10) & (reached < 0.999)).nonzero()[:6, 0].tolist()
        assert len(chosen) == 6
        settings = [(1.0, 0, float(reached[index].float()), 0.0) for index in chosen]
        kept = [int((logits >= cuts(logits, setting)).sum()) for setting in settings]
        assert kept == [index + further for index in chosen]


def test_what_a_temperature_ties_stays():
    """Different logits of one z: the smallest of them is the cut."""
    logits = torch.tensor([[0.0, -1e-8, -2e-8, -1e30]])
    assert cuts(logits, (1.0, 1, 1.0, 0.0)).tolist() == [0.0]
    for setting in ((1e38, 1, 1.0, 0.0), (1e38, 0, 0.1, 0.0)):
        assert_exact(logits, setting)
        assert cuts(logits, setting)[0] <= -2e-8


@pytest.mark.parametrize("width", [3e-8, 5.6e-8, 7.5e-8, 1e-6])
def test_ties_of_a_temperature_reach_past_what_was_looked_at(width):
    """Thousands of logits, a handful of z: more of them are tied with the k-th than the search for it stored."""
    logits = width * rows("flat", 9000) * 1e3
    for top_k in (10, 50, 400):
        for top_p in (1.0, 0.9, 0.1, 0.02):
            assert_exact(logits, (1e38, top_k, top_p, 0.0))


@pytest.mark.parametrize("min_p", [1e-6, 0.05, 0.1, 0.3, 0.9, 1.0])
def test_min_p_to_the_last_digit(min_p):
    bar = torch.tensor(min_p, dtype=torch.float32).double().log().float().clamp(max=0.0)
    z = bar.view(torch.int32) + torch.arange(-20 if min_p < 1.0 else 0, 21, dtype=torch.int32)
    logits = torch.cat([torch.zeros(1), -z.view(torch.float32).abs()])[None]
    assert_exact(logits, (1.0, 0, 1.0, min_p))
    assert min_p == 1.0 or 10 < int((logits >= cuts(logits, (1.0, 0, 1.0, min_p))).sum()) < 35


def test_nothing_to_filter_is_no_cut():
    logits = rows("holes", 5000)
    finite = int((logits > -INF).sum(1).max())
    for setting in [(1.0, 0, 1.0, 0.0), (1.0, 5000, 1.0, 0.0), (1.0, finite + 1, 1.0, 0.0), (3.0, 1e30, 1.0, 0.0)]:
        assert cuts(logits, setting).tolist() == [-INF, -INF]


def test_rows_that_are_no_distributions_have_no_cut():
    logits = torch.tensor([[1.0, float("nan")], [-INF, -INF], [1.0, INF], [2.0, 1.0]])
    assert cuts(logits, (1.0, 1, 1.0, 0.0)).isnan().tolist() == [True, True, True, False]


@pytest.mark.parametrize("kind", ["wide", "peaked", "flat", "steps", "sorted"])
def test_neither_a_wrong_total_nor_threads_change_anything(kind):
    logits = rows(kind, 50000)
    before = torch.get_num_threads()
    try:
        for setting in [*SOME, (1.0, 20000, 0.9, 0.0)]:
            expected = cuts(logits, setting)
            for total in (0.0, 1e-3, 1.0, 1e9, INF, float("nan")):
                torch.set_num_threads(1 if total < 1.0 else 3)
                assert torch.equal(cuts(logits, setting, total=total), expected), (setting, total)
    finally:
        torch.set_num_threads(before)


def cuts_as_text() -> list[str]:
    sets = [rows(kind, size, number=1) for kind in KINDS for size in (111, 20000)]
    return [cuts(logits, setting).item().hex() for logits in sets for setting in SOME]


@pytest.mark.skipif("SPECDEC_CPU_ISA" in os.environ, reason="this process is for one tier already")
def test_every_tier_cuts_alike():
    expected = cuts_as_text()
    code = "import test_verify_filter_cut as here; print(*here.cuts_as_text())"
    path = os.pathsep.join([str(ROOT / "tests"), *sys.path])
    for tier in sys.modules["specdec_kernels._C"].tiers()[:-1]:
        variables = {**os.environ, "PYTHONPATH": path, "SPECDEC_CPU_ISA": tier}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == expected, tier


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    size=st.integers(1, 3000),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    temperature=st.one_of(st.floats(0.0625, 5.0, width=32), st.sampled_from([2.0**-130, 1e-6, 1e6, 2.0**100])),
    top_k=st.one_of(st.just(0), st.integers(1, 3100)),
    top_p=st.one_of(st.just(1.0), st.integers(0, 997).map(lambda part: part / 997)),
    min_p=st.one_of(st.just(0.0), st.floats(0.0, 1.0, width=32)),
)
def test_anything(size, kind, dtype, temperature, top_k, top_p, min_p):
    assert_exact(rows(kind, size, dtype), (temperature, top_k, top_p, min_p))
