"""The CPU kernels of tree attention against the reference, in every instruction set (`make test-full`)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attention_cases import NAN, Case, bits_of
from specdec_kernels import SharedPrefix, backends

MISSING = backends.MISSING["cpu"]
pytestmark = [pytest.mark.native, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]

# Of outputs of order 1. Weights of bf16 round to 2^-9 and so does the output; those of fp16 stay in fp32.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
FLOATS = list(TOLERANCE)
EIGHT_BITS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]


def tree(nodes: int, generator: torch.Generator) -> list[int]:
    """Parents of a random tree that is neither a chain nor a star."""
    return [-1, *(int(torch.randint(max(0, n - 5), n, (), generator=generator)) for n in range(1, nodes))]


def compare(case: Case, **changes):
    """Both backends on the same inputs; what the cpu gave."""
    got, got_lse = case.run(backend="cpu", return_lse=True, **changes)
    want, want_lse = case.run(backend="reference", return_lse=True, **changes)
    assert got.dtype == want.dtype and got_lse.dtype == torch.float32
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(got_lse, want_lse, atol=2e-5, rtol=1e-5)
    return got, got_lse


def spread(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers between NaNs, with a stride in every dimension."""
    wide = tensor.new_full([2 * n + 1 for n in tensor.shape], NAN)
    view = wide[tuple(slice(1, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


@st.composite
def cases(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    group, kv_heads = draw(st.sampled_from([(1, 1), (1, 3), (2, 2), (4, 1), (5, 2), (7, 1)]))
    trees = draw(st.lists(st.one_of(st.integers(1, 6), st.integers(1, 75)), min_size=0, max_size=3))
    return Case(
        requests=[tree(n, generator) for n in trees],
        prefixes=[draw(st.one_of(st.just(0), st.integers(0, 70), st.integers(0, 300))) for _ in trees],
        q_heads=group * kv_heads,
        kv_heads=kv_heads,
        size=draw(st.sampled_from([1, 8, 24, 33, 40, 64])),
        value_size=draw(st.sampled_from([1, 8, 16, 31, 80])),
        dtype=draw(st.sampled_from(FLOATS)),
        seed=draw(st.integers(0, 99)),
    )


def paged(case: Case, draw) -> dict:
    size = draw(st.sampled_from([0, 1, 7, 16, 64, 128]), "slots of a page, 0 for a dense cache")
    return case.paged(size) if size else {}


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases(), st.data())
def test_random_trees(case, data):
    generator = torch.Generator().manual_seed(case.seed)
    options = paged(case, data.draw)
    if data.draw(st.booleans(), "window"):
        options["window"] = data.draw(st.one_of(st.integers(1, 9), st.integers(1, 200)), "window size")
    if data.draw(st.booleans(), "softcap"):
        options["softcap"] = data.draw(st.sampled_from([0.5, 3.0, 50.0]), "cap")
    if data.draw(st.booleans(), "sinks"):
        options["sinks"] = 3 * torch.randn(case.q_heads, generator=generator)
    if data.draw(st.booleans(), "scale"):
        options["scale"] = data.draw(st.sampled_from([-0.3, 0.0, 0.2]), "factor")
    if data.draw(st.booleans(), "scales of the cache"):
        options["k_scale"] = torch.rand(case.kv_heads, generator=generator) - 0.5
        options["v_scale"] = torch.rand(case.kv_heads, generator=generator) - 0.5
    if data.draw(st.booleans(), "any graph"):
        rows, most = len(case.query), case.tree.max_nodes
        share = data.draw(st.sampled_from([0.02, 0.4, 0.95]), "share of edges")
        options["mask_bits"] = bits_of((torch.rand(rows, most, generator=generator) < share).tolist(), most)
    if data.draw(st.booleans(), "strides"):
        for name in ("key_cache", "value_cache"):
            options[name] = spread(options.get(name, case.keys if name == "key_cache" else case.values))
        case.query = spread(case.query)
    compare(case, **options)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases(), st.data())
def test_shared_prefixes(case, data):
    """Groups within the batch, lengths of each member."""
    batch = len(case.requests)
    groups = [data.draw(st.integers(-1, batch), "group") for _ in range(batch)]
    owners = [g if 0 <= g < batch else b for b, g in enumerate(groups)]
    lens = [data.draw(st.integers(0, case.prefixes[b]), "length") for b in range(batch)]
    used = [max([lens[b] for b in range(batch) if owners[b] == owner], default=0) for owner in range(batch)]
    for b in range(batch):  # an owner has to have the slots, whatever its own prefix is; copies of them are not read
        for cache in (case.keys, case.values):
            cache[b, :, : used[b]] = cache[b, :, : used[b]].nan_to_num(0.5)
            if owners[b] != b:
                cache[b, :, used[b] : lens[b]] = NAN
    options = paged(case, data.draw)
    if "block_table" in options:  # blocks behind an owner's last slot are read by others now
        options["block_table"].clamp_(min=0)
        for name in ("key_cache", "value_cache"):
            options[name].nan_to_num_(0.25)
    if data.draw(st.booleans(), "window"):
        options["window"] = data.draw(st.integers(1, 200), "window size")
    shared = SharedPrefix(torch.tensor(groups, dtype=torch.int32), torch.tensor(lens, dtype=torch.int32))
    compare(case, shared=shared, **options)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_long_prefixes_are_split_and_merged(dtype):
    generator = torch.Generator().manual_seed(1)
    case = Case(
        [tree(3, generator), tree(40, generator), [-1]], [2500, 4700, 1024], size=16, value_size=16, dtype=dtype
    )
    compare(case)
    compare(case, window=1500)
    lens = torch.tensor([2400, 2300, 1000], dtype=torch.int32)
    compare(case, shared=SharedPrefix(torch.full((3,), 1, dtype=torch.int32), lens))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_trees_of_a_thousand_nodes(dtype):
    generator = torch.Generator().manual_seed(2)
    case = Case([tree(1024, generator), tree(130, generator)], [37, 0], q_heads=3, kv_heads=1, dtype=dtype)
    compare(case)
    compare(case, window=12, **case.paged(16))


@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_usual_head_sizes(size, dtype):
    generator = torch.Generator().manual_seed(3)
    for group in (1, 4):
        case = Case([tree(21, generator)], [131], 2 * group, 2, size, size, dtype)
        compare(case)


@pytest.mark.parametrize("cache", [*FLOATS, *EIGHT_BITS], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_pair_of_dtypes(dtype, cache):
    generator = torch.Generator().manual_seed(4)
    case = Case([tree(9, generator), [-1, 0]], [150, 70], size=24, value_size=40, dtype=dtype)
    scale = 0.02 if cache == torch.int8 else 0.5
    stored = {}
    for name, tensor in (("key_cache", case.keys), ("value_cache", case.values)):
        numbers = tensor.float().nan_to_num(0.0) / scale
        stored[name] = (numbers.clamp(-120, 120) if cache == torch.int8 else numbers).to(cache)
    compare(case, **stored, k_scale=scale, v_scale=-scale)
    compare(case, **stored, k_scale=scale, v_scale=scale, window=30)


@pytest.mark.parametrize("cache", EIGHT_BITS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_all_numbers_of_eight_bits(dtype, cache):
    """One key for each: a value comes out as it is, NaN and infinity as well."""
    numbers = torch.arange(256, dtype=torch.uint8).view(cache)
    keys = torch.zeros(256, 1, 1, 8).to(cache)
    values = numbers.view(256, 1, 1, 1).expand(256, 1, 1, 8).contiguous()
    case = Case([[-1]] * 256, [0] * 256, 1, 1, dtype=dtype, spare=0)
    got = case.run(key_cache=keys, value_cache=values, backend="cpu")
    torch.testing.assert_close(got[:, 0, 0], numbers.float().to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_a_node_does_not_see_cannot_reach_it(dtype):
    """Broken keys and values of one node reach the nodes that see it, and no others."""
    generator = torch.Generator().manual_seed(5)
    for nodes, prefix in ((3, 0), (9, 70), (40, 20)):
        parents = tree(nodes, generator)
        case = Case([parents], [prefix], size=16, value_size=24, dtype=dtype)
        clean = case.run(backend="cpu")
        sees = [{0} for _ in parents]
        for node, parent in enumerate(parents):
            sees[node] = (sees[parent] if parent >= 0 else set()) | {node}
        for broken in (1, nodes // 2, nodes - 1):
            reached = torch.tensor([broken in seen for seen in sees])
            for what, bad in (("keys", NAN), ("values", NAN), ("values", math.inf)):
                cache = getattr(case, what).clone()
                cache[0, :, prefix + broken, 3] = bad
                got = case.run(backend="cpu", **{"key_cache" if what == "keys" else "value_cache": cache})
                assert got[~reached].equal(clean[~reached])
                column = got[..., 3] if what == "values" else got
                assert not column[reached].isfinite().any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_members_of_a_group_see_their_own_length_only(dtype):
    """Requests 0 and 1 read the first 20 and 75 slots of request 2; one of those between is broken."""
    generator = torch.Generator().manual_seed(6)
    case = Case([tree(5, generator), tree(6, generator), [-1]], [70, 130, 90], dtype=dtype)
    shared = SharedPrefix(torch.full((3,), 2, dtype=torch.int32), torch.tensor([20, 75, 0], dtype=torch.int32))
    case.keys[0, :, :20], case.values[1, :, :75] = NAN, NAN  # they have copies of their own, which nobody reads
    clean = case.run(backend="cpu", shared=shared)
    assert clean.isfinite().all()
    for cache in (case.keys, case.values):
        mine = cache[2, :, 60].clone()
        cache[2, :, 60] = NAN
        got = case.run(backend="cpu", shared=shared)
        assert got[:5].equal(clean[:5]) and got[5:].isnan().all()
        cache[2, :, 60] = mine
    query = case.query[5:11].clone()
    case.query[5:11] = NAN
    got = case.run(backend="cpu", shared=shared)
    assert got[:5].equal(clean[:5]) and got[11:].equal(clean[11:]) and got[5:11].isnan().all()
    case.query[5:11] = query
    assert case.run(backend="cpu", shared=shared).equal(clean)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_results_do_not_depend_on_threads_or_neighbours(dtype):
    generator = torch.Generator().manual_seed(7)
    requests = [tree(n, generator) for n in (1, 90, 4, 17)]
    case = Case(requests, [2300, 1500, 0, 300], 8, 2, 16, 24, dtype)
    threads = torch.get_num_threads()
    try:
        for options in ({}, {"window": 200}, case.paged(16)):
            torch.set_num_threads(1)
            want = case.run(backend="cpu", return_lse=True, **options)
            for count in (2, 7, 64):
                torch.set_num_threads(count)
                got = case.run(backend="cpu", return_lse=True, **options)
                assert all(map(torch.equal, got, want)), f"{count} threads"
            if "block_table" in options:
                continue
            for b, request in enumerate(requests):
                alone = Case([request], [case.prefixes[b]], 8, 2, 16, 24, dtype)
                first = int(case.tree.cu_nodes[b])
                alone.query = case.query[first : first + len(request)]
                alone.keys, alone.values = case.keys[b : b + 1], case.values[b : b + 1]
                got = alone.run(backend="cpu", return_lse=True, **options)
                assert all(a.equal(b[first : first + len(request)]) for a, b in zip(got, want, strict=True))
        case.query[1:91] = NAN
        case.keys[1] = NAN
        got = case.run(backend="cpu", return_lse=True)
        torch.set_num_threads(1)
        want = Case(requests, [2300, 1500, 0, 300], 8, 2, 16, 24, dtype).run(backend="cpu", return_lse=True)
        for a, b in zip(got, want, strict=True):
            assert a[1:91].isnan().all() and a[0].equal(b[0]) and a[91:].equal(b[91:])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_scores_of_any_size(dtype):
    """Far from 0, where a softmax that forgot its maximum would overflow, and where one key takes all."""
    generator = torch.Generator().manual_seed(8)
    case = Case([tree(20, generator)], [200], size=16, value_size=16, dtype=dtype)
    for scale in (1e-30, 30.0, 3000.0):
        got, lse = case.run(backend="cpu", scale=scale, return_lse=True)
        want, want_lse = case.run(backend="reference", scale=scale, return_lse=True)
        torch.testing.assert_close(got, want, atol=4 * TOLERANCE[dtype] if scale > 1 else TOLERANCE[dtype], rtol=1e-2)
        torch.testing.assert_close(lse, want_lse, atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("nodes", [1, 3, 16, 17])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_scores_that_are_all_infinitely_low_sum_to_nothing(dtype, nodes):
    case = Case([[-1] + [0] * (nodes - 1)], [128 - nodes], 1, 1, 32, 32, dtype, spare=0)
    case.query.fill_(1)
    case.keys.fill_(-math.inf)
    _, lse = case.run(backend="cpu", return_lse=True)
    assert (lse == -math.inf).all()


def test_numbers_that_do_not_fit_stay_in_bounds():
    """What the public function checks under SPECDEC_DEBUG only: the op clamps as the reference does."""
    case = Case([[-1, 0, 0], [-1, 0]], [6, 2])
    pool = case.paged(4)
    bits, depths = case.tree.ancestor_bits(), case.tree.depths()
    op = torch.ops.specdec_kernels.tree_attention

    def both(query=case.query, cu=(0, 3, 5), most=3, prefixes=(6, 2), table=None, shared=(None, None), window=0):
        int32 = torch.int32
        caches = (case.keys.nan_to_num(0.5), case.values.nan_to_num(0.5))
        if table is not None:
            caches = (pool["key_cache"].nan_to_num(0.5), pool["value_cache"].nan_to_num(0.5))
        arguments = (
            query, *caches, depths, bits, torch.tensor(cu, dtype=int32), most, torch.tensor(prefixes, dtype=int32),
            table, *(x if x is None else torch.tensor(x, dtype=int32) for x in shared), 0.3, window, 0.0, None, None,
            None, True,
        )  # fmt: skip
        got, want = op.default(*arguments), op.reference(*arguments)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)

    both()
    both(cu=(-4, 99, 5))
    both(cu=(3, 1, 2))
    both(most=1)
    both(prefixes=(2**31 - 1, -(2**31)))
    both(prefixes=(2**31 - 1, 5), window=2)
    both(table=torch.full((2, 3), 2**31 - 1, dtype=torch.int32))
    both(table=torch.full((2, 3), -(2**31), dtype=torch.int32))
    both(shared=((7, -3), (2**31 - 1, -5)))
    both(shared=((1, 1), (2**31 - 1, 2)))
