"""Tree attention against attention along each path in float64."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attention_cases import NAN, Case, bits_of, naive

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def check(case: Case, **options):
    want, want_lse = naive(case, **options)
    given_options = {k: v for k, v in options.items() if k != "mask"}
    if options.get("mask") is not None:
        given_options["mask_bits"] = bits_of(options["mask"], case.tree.max_nodes)
    exact = torch.float64 if case.dtype == torch.float64 else torch.float32
    tolerance = TOLERANCE[case.dtype]
    # By default a native backend serves what it can, so the definition that all are held against is named.
    for caches, backend in product(({}, case.paged(1), case.paged(4)), (None, "reference")):
        out, lse = case.run(return_lse=True, backend=backend, **caches, **given_options)
        assert out.dtype == case.dtype and lse.dtype == exact
        torch.testing.assert_close(out.double(), want, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(lse.double(), want_lse, atol=min(tolerance, 1e-4), rtol=min(tolerance, 1e-4))


@st.composite
def cases(draw):
    def parents():
        nodes = draw(st.integers(1, 70) if draw(st.integers(0, 4)) == 0 else st.integers(1, 9))
        return [-1, *(draw(st.integers(max(0, node - 4), node - 1)) for node in range(1, nodes))]

    batch = draw(st.integers(0, 3))
    q_heads, kv_heads = draw(st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 2), (4, 1)]))
    return Case(
        requests=[parents() for _ in range(batch)],
        prefixes=[draw(st.integers(0, 20)) for _ in range(batch)],
        q_heads=q_heads,
        kv_heads=kv_heads,
        size=draw(st.sampled_from([4, 8, 15])),
        value_size=draw(st.sampled_from([4, 9])),
        dtype=draw(st.sampled_from([torch.float64, torch.float32])),
        seed=draw(st.integers(0, 99)),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases(), st.data())
def test_random_trees(case, data):
    generator = torch.Generator().manual_seed(case.seed)
    options = {}
    if data.draw(st.booleans(), "window"):
        options["window"] = data.draw(st.integers(1, 12), "window size")
    if data.draw(st.booleans(), "softcap"):
        options["softcap"] = 1.5
    if data.draw(st.booleans(), "sinks"):
        options["sinks"] = torch.randn(case.q_heads, generator=generator)
    if data.draw(st.booleans(), "scale"):
        options["scale"] = 0.3
    if data.draw(st.booleans(), "scales of the cache"):
        options["k_scale"] = torch.rand(case.kv_heads, generator=generator) + 0.5
        options["v_scale"] = torch.rand(case.kv_heads, generator=generator) + 0.5
    check(case, **options)


@settings(max_examples=30, deadline=None)
@given(cases(), st.integers(0, 2**30), st.one_of(st.none(), st.integers(1, 8)))
def test_mask_bits_of_any_graph(case, seed, window):
    """Several parents, later nodes, rows that see nothing, nodes that nobody sees."""
    generator = torch.Generator().manual_seed(seed)
    mask = []
    for request in case.requests:
        mask += (torch.rand(len(request), len(request), generator=generator) < 0.4).tolist()
    check(case, mask=mask, window=window)


def test_hidden_nodes_may_hold_nan_and_empty_rows_are_zero():
    case = Case([[-1, 0, 0]], [0])
    case.keys[0, :, 1], case.values[0, :, 1] = NAN, NAN
    mask = [[True, False, False], [False, False, False], [True, False, True]]
    check(case, mask=mask)
    out, lse = case.run(mask_bits=bits_of(mask, 3), return_lse=True)
    assert (out[1] == 0).all() and (lse[1] == -math.inf).all()
    sinks = torch.arange(4.0)
    out, lse = case.run(mask_bits=bits_of(mask, 3), sinks=sinks, return_lse=True)
    assert (out[1] == 0).all() and lse[1].equal(sinks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    check(Case([[-1, 0, 1, 1, 0], [-1]], [33, 0], dtype=dtype), window=9, softcap=20.0)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_eight_bit_caches(dtype):
    case = Case([[-1, 0, 0, 1], [-1, 0]], [5, 0])
    scale = 0.02 if dtype == torch.int8 else 0.5
    stored = [(cache.nan_to_num(0.0) / scale).clamp(-120, 120).to(dtype) for cache in (case.keys, case.values)]
    case.keys, case.values = (cache.float() for cache in stored)
    per_head = torch.full((2,), scale)
    want, _ = naive(case, k_scale=per_head, v_scale=per_head)
    for scales in (scale, per_head):
        out = case.run(key_cache=stored[0], value_cache=stored[1], k_scale=scales, v_scale=scales)
        torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=2e-5)


def test_window_counts_positions_not_slots():
    """A sibling's slots must not push an ancestor out of the window: the defect of slot-counting kernels."""
    star = Case([[-1, *[0] * 8]], [3])
    wide = star.run(window=3)
    check(star, window=3)
    alone = Case([[-1, 0]], [3])
    alone.query, alone.tree = star.query[[0, 8]], alone.tree
    alone.keys = star.keys[:, :, [0, 1, 2, 3, 11]]
    alone.values = star.values[:, :, [0, 1, 2, 3, 11]]
    torch.testing.assert_close(alone.run(window=3)[1], wide[8])


def test_strides_of_the_cache_do_not_matter():
    case = Case([[-1, 0, 0], [-1, 0]], [6, 2])
    want = case.run()
    by_slot = {"key_cache": case.keys.transpose(1, 2).contiguous().transpose(1, 2)}
    inside = torch.full((*case.values.shape[:3], 2 * case.value_size), NAN)
    inside[..., ::2] = case.values
    torch.testing.assert_close(case.run(**by_slot, value_cache=inside[..., ::2]), want)
    torch.testing.assert_close(case.run(query=case.query.transpose(0, 1).contiguous().transpose(0, 1)), want)


def test_requests_do_not_see_each_other(device):
    case = Case([[-1, 0, 0], [-1, 0, 1, 1], [-1]], [6, 0, 9])
    clean = case.run(device)
    case.keys[1] = NAN
    case.query[3:7] = NAN
    broken = case.run(device)
    assert broken[:3].equal(clean[:3]) and broken[7:].equal(clean[7:]) and broken[3:7].isnan().all()


def test_devices_agree(device):
    case = Case([[-1, 0, 0, 1], [-1, 0]], [40, 0], dtype=torch.float64)
    for caches in ({}, case.paged(16)):
        out, lse = case.run(device, return_lse=True, window=7, k_scale=1.5, **caches)
        want = case.run(return_lse=True, window=7, k_scale=1.5)
        torch.testing.assert_close((out.cpu(), lse.cpu()), want)


def test_empty_batch_and_padding_rows():
    empty = Case([], [])
    out, lse = empty.run(return_lse=True)
    assert out.shape == (0, 4, 8) and lse.shape == (0, 4)
    case = Case([[-1, 0]], [3])
    want = case.run()
    parents = torch.tensor([-1, 0, 0, 0], dtype=torch.int32)
    padded = case.run(query=torch.cat([case.query, case.query]), tree=case.tree._replace(parents=parents))
    assert padded[:2].equal(want) and (padded[2:] == 0).all()
