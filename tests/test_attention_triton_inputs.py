"""What the Triton kernel of tree_attention is given: dtypes, strides, values that do not fit, the op's contract."""

from __future__ import annotations

import math

import pytest
import torch

import specdec_kernels as sk
from attention_cases import NAN, Case, bits_of
from attention_triton import check_reference, each_device, run
from specdec_kernels import SharedPrefix

pytestmark = each_device


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8], ids=str)
def test_eight_bit_caches(device, dtype):
    case = Case([[-1, 0, 0, 1], [-1, 0]], [45, 0], size=16)
    scale = 0.02 if dtype == torch.int8 else 0.5
    poison = 127 if dtype == torch.int8 else NAN
    caches = [(cache / scale).clamp(-120, 120) for cache in (case.keys, case.values)]
    stored = [torch.where(cache.isnan(), poison, cache).to(dtype) for cache in caches]
    per_head = torch.tensor([scale, 2 * scale])
    options = {"key_cache": stored[0], "value_cache": stored[1], "k_scale": per_head, "v_scale": per_head}
    check_reference(case, device, small=True, **options)
    case.query = case.query.half()
    case.dtype = torch.float16
    check_reference(case, device, small=True, **options)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_every_number_of_eight_bits(device, dtype):
    """All bit patterns of fp8 as values, each in a slot one node sees; what is not finite in a request of its own."""
    numbers = torch.arange(256, dtype=torch.uint8)
    finite = numbers.view(dtype).float().isfinite()
    for parts, which in (([[-1] * int(finite.sum())], finite), ([[-1]] * int((~finite).sum()), ~finite)):
        case = Case(parts, [0] * len(parts), 1, 1, spare=0)
        n = case.tree.max_nodes
        alone = bits_of([[i == j for j in range(n)] for _ in parts for i in range(n)], n)
        values = numbers[which].view(dtype)
        cache = values.view(len(parts), 1, n, 1).expand(-1, -1, -1, 8)
        out, _ = run(case, device, key_cache=torch.zeros(cache.shape).to(dtype), value_cache=cache, mask_bits=alone)
        torch.testing.assert_close(out[:, 0, 0], values.float(), rtol=0, atol=0, equal_nan=True)


def test_dtypes_of_query_and_cache_may_differ(device):
    case = Case([[-1, 0, 0]], [20])
    for query, cache in (
        (torch.float32, torch.float16),
        (torch.float16, torch.float32),
        (torch.float16, torch.bfloat16),
    ):
        case.query, case.dtype = case.query.to(query), torch.float16
        check_reference(case, device, key_cache=case.keys.to(cache), value_cache=case.values.to(cache))


@pytest.mark.parametrize("layout", ["dense", "paged"])
def test_strides(device, layout):
    case = Case([[-1, 0, 0], [-1, 0]], [26, 2])
    caches = {"key_cache": case.keys, "value_cache": case.values} if layout == "dense" else case.paged(8)
    want = run(case, device, **caches)
    turned = {n: c.transpose(1, 2).contiguous().transpose(1, 2) for n, c in caches.items() if "cache" in n}
    wide = torch.full((*caches["value_cache"].shape[:3], 16), NAN)
    wide[..., ::2] = caches["value_cache"]
    query = case.query
    case.query = query.transpose(0, 1).contiguous().transpose(0, 1)
    changed = caches | turned | {"value_cache": wide[..., ::2]}
    if layout == "paged":
        changed["block_table"] = torch.stack([caches["block_table"], caches["block_table"]], 2)[..., 0]
    for a, b in zip(run(case, device, **changed), want, strict=True):
        assert torch.equal(a, b)


def test_distant_slots(device):
    """Offsets pass 2^31 elements; the caches are never touched between the slots that are read."""
    case = Case([[-1, 0]], [2], 1, 1, spare=0)
    stride = 2**31 // 3 + 64
    far = []
    for cache in (case.keys, case.values):
        stored = (cache * 20).to(torch.int8)
        buffer = torch.empty(3 * stride + 64, dtype=torch.int8, device=device)
        view = buffer.as_strided((1, 1, 4, 8), (4 * stride, 4 * stride, stride, 1))
        view.copy_(stored)
        far.append(view)
    want = case.run(backend="reference", key_cache=far[0].cpu(), value_cache=far[1].cpu())
    got, _ = run(case, device, key_cache=far[0], value_cache=far[1])
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_requests_do_not_see_each_other(device):
    case = Case([[-1, 0, 0], [-1, 0, 1, 1], [-1]], [6, 0, 9])
    clean, _ = run(case, device)
    case.keys[1] = NAN
    case.query[3:7] = NAN
    broken, _ = run(case, device)
    assert broken[:3].equal(clean[:3]) and broken[7:].equal(clean[7:]) and broken[3:7].isnan().all()


def test_empty_batch_and_padding_rows(device):
    empty = Case([], [])
    out, lse = run(empty, device)
    assert out.shape == (0, 4, 8) and lse.shape == (0, 4)
    case = Case([[-1, 0]], [3])
    want, _ = run(case, device)
    parents = torch.tensor([-1, 0, 0, 0], dtype=torch.int32)
    case.query = torch.cat([case.query, case.query * NAN])
    got, lse = run(case, device, tree=case.tree._replace(parents=parents))
    assert got[:2].equal(want) and (got[2:] == 0).all() and (lse[2:] == -math.inf).all()


OUTSIDE = SharedPrefix(*torch.tensor([[0, 9], [3, 900]], dtype=torch.int32))


@pytest.mark.parametrize("shared", [None, pytest.param(OUTSIDE, marks=pytest.mark.full)])
def test_values_that_do_not_fit_stay_in_bounds(device, shared):
    case = Case([[-1, 0, 0], [-1, 0]], [6, 2], spare=0)
    case.keys, case.values = case.keys.nan_to_num(), case.values.nan_to_num()
    paged = case.paged(4)
    pools = paged | {name: paged[name].nan_to_num() for name in ("key_cache", "value_cache")}
    for lens in ([6, -3], [6, 900]):
        lens = torch.tensor(lens, dtype=torch.int32)
        for caches in ({}, pools):
            check_reference(case, device, prefix_lens=lens, shared=shared, **caches)
    for block in (-1, 10**6):
        table = torch.full_like(paged["block_table"], block)
        check_reference(case, device, shared=shared, **pools | {"block_table": table})
    none = {name: pools[name][:0] for name in ("key_cache", "value_cache")}
    assert (run(case, device, shared=shared, **pools | none)[0] == 0).all()
    for cu_nodes in ([3, 2, 5], [0, 3, 4], [-1, 9, 2], [5, 0, 3]):
        tree = case.tree._replace(cu_nodes=torch.tensor(cu_nodes, dtype=torch.int32))
        layout = sk.trees.tree_layout(case.tree)
        assert run(case, device, tree=tree, layout=layout, shared=shared)[0].isfinite().all()
    long = Case([[-1, *range(69)]], [1])
    got, want = run(long, device, tree=long.tree._replace(max_nodes=64))[0], run(long, device)[0]
    assert torch.allclose(got[:64], want[:64], atol=1e-6) and (got[64:] == 0).all()


def test_what_it_cannot_serve(device):
    case = Case([[-1]], [3], dtype=torch.float64)
    with pytest.raises(sk.BackendError, match=r"^backend='triton' cannot serve tree_attention: does not serve float64"):
        run(case, device)
    with pytest.raises(sk.BackendError, match="serves head sizes up to 512, got 520"):
        run(Case([[-1]], [3], size=520), device)


def test_op_contract(device):
    case = Case([[-1, 0, 0], [-1, 0]], [6, 2])
    paged, layout = case.paged(4), sk.trees.tree_layout(case.tree)
    tail = (layout.depths, layout.ancestor_bits, case.tree.cu_nodes, 3, case.prefix_lens)
    op, ones = torch.ops.specdec_kernels.tree_attention.triton, torch.ones(2)
    call = (
        case.query, paged["key_cache"], paged["value_cache"], *tail, paged["block_table"], None, None, 0.3, 4, 9.0,
        torch.ones(4), ones, ones, True,
    )  # fmt: skip
    torch.library.opcheck(op, tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in call))
