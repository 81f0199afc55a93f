"""head_topk and head_sample against their definition in float64, on every backend and awkward input."""

from __future__ import annotations

import pytest
import torch

import specdec_kernels as sk
from head_cases import BACKENDS, TOLERANCE, check_ranking, inputs, logits64, lse_and_entropy, whole
from specdec_kernels.philox import gumbels

pytestmark = pytest.mark.native
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF = float("inf")
# B, V, D: no block, part of a block, a whole block, several; vectors with and without a remainder.
SHAPES = [
    (0, 111, 8),
    (1, 1000, 60),
    (3, 256, 192),
    (7, 1000, 8),
    (16, 111, 60),
    (2, 40, 4096),
    (19, 700, 192),
    (3, 5, 1),
]


def stream(batch: int, seed: int = 0) -> sk.Philox:
    """Seeds beyond 32 bits, offsets and rows of their own."""
    index = torch.arange(batch)
    return sk.Philox((index + seed) * 0x1_0000_0003, index * 7 + 5, index.to(torch.int32) % 3)


def noise(rng: sk.Philox, ids):
    return gumbels(rng.seed[:, None], rng.offset[:, None], rng.row[:, None], ids).double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_topk_and_sample_match_float64(backend, shape, dtype):
    batch, height, _dim = shape
    hidden, weight = inputs(*shape, dtype)
    generator = torch.Generator().manual_seed(1)
    bias, scale = torch.randn(height, generator=generator), torch.rand(height, generator=generator) + 0.5
    logits = logits64(hidden, weight, bias=bias, scale=scale)
    lse, entropy = lse_and_entropy(logits, 0.7)
    ids = torch.arange(height).expand(batch, height)
    rest = {"bias": bias, "scale": scale, "temperature": 0.7, "return_logits": True, "backend": backend}
    rng = stream(batch)
    top = sk.head_topk(hidden, weight, 8, **rest)
    drawn = sk.head_sample(hidden, weight, 8, rng=rng, **rest)
    check_ranking(top.tokens, logits, ids)
    check_ranking(drawn.tokens, logits / 0.7 + noise(rng, ids), ids)
    for got in (top, drawn):
        torch.testing.assert_close(got.all_logits.double(), logits, **TOLERANCE)
        torch.testing.assert_close(got.lse.double(), lse, **TOLERANCE)
        torch.testing.assert_close(got.entropy.double(), entropy, rtol=1e-4, atol=1e-4)
        real = got.tokens >= 0
        picked = got.all_logits.gather(1, got.tokens.clamp(min=0).long())
        assert torch.equal(got.logits, torch.where(real, picked, -INF))
        assert got.tokens.dtype == torch.int32 and got.logits.dtype == torch.float32


@pytest.mark.parametrize("k", [1, 2, 8, 64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lowest_target_id(backend, k):
    hidden, weight = whole(4, 600, 12)
    generator = torch.Generator().manual_seed(2)
    names = torch.randperm(5000, generator=generator)[:600].to(torch.int32)
    rows = torch.randperm(600, generator=generator)[:400].to(torch.int32)
    each = torch.stack([torch.randperm(600, generator=generator)[:400] for _ in range(4)]).to(torch.int32)
    for how, ids in [
        ({}, torch.arange(600).expand(4, -1)),
        ({"token_ids": names}, names.expand(4, -1)),
        ({"rows": rows}, rows.expand(4, -1)),
        ({"rows": each}, each),
    ]:
        logits = logits64(hidden, weight, how.get("rows"))
        got = sk.head_topk(hidden, weight, k, **how, backend=backend)
        for b in range(4):
            order = sorted(range(logits.shape[1]), key=lambda i, b=b: (-logits[b, i], int(ids[b, i])))[:k]
            assert got.tokens[b].tolist() == ids[b, order].tolist()
            assert got.logits[b].tolist() == logits[b, order].tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_equal_a_trimmed_weight(backend, dtype):
    hidden, weight = inputs(3, 900, 60, dtype)
    generator = torch.Generator().manual_seed(3)
    bias, scale = torch.randn(900, generator=generator), torch.rand(900, generator=generator)
    rows = torch.randperm(900, generator=generator)[:517].to(torch.int32)
    trimmed = weight[rows.long()].clone(), bias[rows.long()], scale[rows.long()]
    rng = stream(3)
    for op, rest in ((sk.head_topk, {}), (sk.head_sample, {"rng": rng})):
        gathered = op(hidden, weight, 5, rows=rows, bias=bias, scale=scale, return_logits=True, backend=backend, **rest)
        own = op(
            hidden, weight, 5, rows=rows.repeat(3, 1), bias=bias, scale=scale, return_logits=True, backend=backend,
            **rest,
        )  # fmt: skip
        named = op(
            hidden, trimmed[0], 5, token_ids=rows, bias=trimmed[1], scale=trimmed[2], return_logits=True,
            backend=backend, **rest,
        )  # fmt: skip
        assert torch.equal(gathered.tokens, named.tokens) and torch.equal(gathered.tokens, own.tokens)
        for a, b in zip(gathered, named, strict=True):
            torch.testing.assert_close(a, b, **TOLERANCE)
        for a, b in zip(gathered, own, strict=True):
            torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_request_has_its_own_rows(backend):
    hidden, weight = inputs(5, 300, 60)
    generator = torch.Generator().manual_seed(4)
    rows = torch.stack([torch.randperm(300, generator=generator)[:270] for _ in range(5)]).to(torch.int32)
    logits = logits64(hidden, weight, rows)
    got = sk.head_topk(hidden, weight, 6, rows=rows, return_logits=True, backend=backend)
    check_ranking(got.tokens, logits, rows)
    torch.testing.assert_close(got.all_logits.double(), logits, **TOLERANCE)
    torch.testing.assert_close(got.lse.double(), torch.logsumexp(logits, 1), **TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_do_not_exist_have_no_probability(backend):
    hidden, weight = inputs(2, 50, 16)
    weight[0] = float("nan")  # what an index clamped to 0 would read
    rows = torch.tensor([3, -1, 7, 50, 9, 2**31 - 1, -(2**31)], dtype=torch.int32)
    kept = torch.tensor([3, 7, 9], dtype=torch.int32)
    for op, rest in ((sk.head_topk, {}), (sk.head_sample, {"rng": stream(2)})):
        got = op(hidden, weight, 5, rows=rows, return_logits=True, backend=backend, **rest)
        want = op(hidden, weight, 5, rows=kept, backend=backend, **rest)
        assert torch.equal(got.tokens, want.tokens)
        torch.testing.assert_close(got.logits, want.logits, **TOLERANCE)
        torch.testing.assert_close(got.lse, want.lse, **TOLERANCE)
        assert (got.all_logits[:, [1, 3, 5, 6]] == -INF).all() and got.all_logits[:, [0, 2, 4]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_fewer_rows_than_k(backend):
    hidden, weight = inputs(3, 4, 16)
    for op, rest in ((sk.head_topk, {}), (sk.head_sample, {"rng": stream(3)})):
        got = op(hidden, weight, 6, backend=backend, **rest)
        assert (got.tokens[:, 4:] == -1).all() and (got.logits[:, 4:] == -INF).all()
        assert sorted(got.tokens[0, :4].tolist()) == [0, 1, 2, 3]
        for none in ({"rows": torch.empty(0, dtype=torch.int32)}, {"rows": torch.empty(3, 0, dtype=torch.int32)}):
            got = op(hidden, weight, 2, return_logits=True, backend=backend, **none, **rest)
            assert (got.tokens == -1).all() and (got.logits == -INF).all() and got.all_logits.shape == (3, 0)
            assert (got.lse == -INF).all() and (got.entropy == 0).all()
        got = op(hidden, weight[:0], 2, backend=backend, rows=torch.tensor([0, 1], dtype=torch.int32), **rest)
        assert (got.tokens == -1).all() and (got.lse == -INF).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_views_are_read_where_they_lie(backend, dtype):
    hidden, weight = inputs(3, 300, 60, dtype)
    wide = torch.full((300, 100), float("nan"), dtype=dtype)
    wide[:, 7:67] = weight
    every_other = torch.arange(600, dtype=torch.int32).flip(0)[::2]
    rows = every_other.clone().sub_(1).clamp_(max=299)
    strided = torch.stack([rows, rows], dim=1)[:, 1]
    want = sk.head_topk(hidden, weight, 4, rows=rows, return_logits=True, backend=backend)
    for h in (hidden, hidden.T.contiguous().T, torch.cat([hidden, hidden], 1)[:, :60]):
        for w in (weight, wide[:, 7:67], weight.T.contiguous().T):
            got = sk.head_topk(h, w, 4, rows=strided, return_logits=True, backend=backend)
            assert torch.equal(got.tokens, want.tokens)
            torch.testing.assert_close(got.all_logits, want.all_logits, **TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_banned_tokens_never_appear(backend):
    hidden, weight = inputs(2, 600, 16)
    bias = torch.full((600,), -INF)
    bias[[5, 300, 599]] = torch.tensor([0.0, 1.0, -2.0])
    for op, rest in ((sk.head_topk, {}), (sk.head_sample, {"rng": stream(2)})):
        got = op(hidden, weight, 5, bias=bias, backend=backend, **rest)
        assert all(sorted(t[:3]) == [5, 300, 599] and t[3:] == [-1, -1] for t in got.tokens.tolist())
        lse, entropy = lse_and_entropy(logits64(hidden, weight, bias=bias)[:, [5, 300, 599]], 1.0)
        torch.testing.assert_close(got.lse.double(), lse, **TOLERANCE)
        torch.testing.assert_close(got.entropy.double(), entropy, rtol=1e-4, atol=1e-4)
        nothing = op(hidden, weight, 5, bias=torch.full((600,), -INF), backend=backend, **rest)
        assert (nothing.tokens == -1).all() and (nothing.lse == -INF).all() and (nothing.entropy == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [float("nan"), INF], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_broken_request_leaves_its_neighbours_alone(backend, poison, dtype):
    hidden, weight = inputs(5, 700, 60, dtype)
    bias = torch.zeros(700)
    for op, rest in ((sk.head_topk, {}), (sk.head_sample, {"rng": stream(5)})):
        clean = op(hidden, weight, 3, bias=bias, backend=backend, **rest)
        dirty = hidden.clone()
        dirty[2, 17] = poison
        got = op(dirty, weight, 3, bias=bias, backend=backend, **rest)
        assert (got.tokens[2] == -1).all() and (got.logits[2] == -INF).all()
        assert got.lse[2].isnan() and got.entropy[2].isnan()
        others = [0, 1, 3, 4]
        for a, b in zip(got[:4], clean[:4], strict=True):
            assert torch.equal(a[others], b[others])


@pytest.mark.parametrize("backend", BACKENDS)
def test_temperatures_of_each_request(backend):
    hidden, weight = inputs(4, 500, 60)
    temperatures = torch.tensor([1.0, 0.25, 3.0, 0.6])
    rng = stream(4)
    for op, rest in ((sk.head_topk, {}), (sk.head_sample, {"rng": rng})):
        got = op(hidden, weight, 4, temperature=temperatures, backend=backend, **rest)
        for b, temperature in enumerate(temperatures.tolist()):
            one = op(hidden, weight, 4, temperature=temperature, backend=backend, **rest)
            assert torch.equal(got.tokens[b], one.tokens[b])
            torch.testing.assert_close(got.lse[b], one.lse[b], **TOLERANCE)
            torch.testing.assert_close(got.entropy[b], one.entropy[b], **TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_temperature_zero_is_the_top_k(backend):
    hidden, weight = whole(4, 500, 9)
    top = sk.head_topk(hidden, weight, 6, backend=backend)
    drawn = sk.head_sample(hidden, weight, 6, rng=stream(4), temperature=0.0, backend=backend)
    for a, b in zip(top[:4], drawn[:4], strict=True):
        assert torch.equal(a, b)
    mixed = torch.tensor([0.0, 1.0, 0.0, 1.0])
    got = sk.head_sample(hidden, weight, 6, rng=stream(4), temperature=mixed, backend=backend)
    one = sk.head_sample(hidden, weight, 6, rng=stream(4), backend=backend)
    assert torch.equal(got.tokens[::2], top.tokens[::2]) and torch.equal(got.tokens[1::2], one.tokens[1::2])
    assert torch.equal(got.lse, top.lse)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_draw_depends_on_its_stream_and_ids_only(backend):
    hidden, weight = inputs(6, 800, 60)
    rng = stream(6)
    base = sk.head_sample(hidden, weight, 5, rng=rng, backend=backend)
    order = torch.tensor([4, 0, 5, 2])
    picked = sk.Philox(*(part[order] for part in rng))
    assert torch.equal(sk.head_sample(hidden[order], weight, 5, rng=picked, backend=backend).tokens, base.tokens[order])
    shuffled = torch.randperm(800, generator=torch.Generator().manual_seed(5)).to(torch.int32)
    assert torch.equal(sk.head_sample(hidden, weight, 5, rng=rng, rows=shuffled, backend=backend).tokens, base.tokens)
    zeros = sk.Philox(rng.seed, rng.offset, torch.zeros(6, dtype=torch.int32))
    without = sk.head_sample(hidden, weight, 5, rng=sk.Philox(rng.seed, rng.offset), backend=backend)
    assert torch.equal(sk.head_sample(hidden, weight, 5, rng=zeros, backend=backend).tokens, without.tokens)
    for change in (rng._replace(seed=rng.seed + 1), rng._replace(offset=rng.offset + 1), rng._replace(row=rng.row + 1)):
        assert not torch.equal(sk.head_sample(hidden, weight, 5, rng=change, backend=backend).tokens, base.tokens)


def test_every_device(device):
    """Unforced, on whatever serves the device: the same draws, whole numbers so that no logit is rounded."""
    hidden, weight = whole(5, 600, 12)
    rows = torch.randperm(600, generator=torch.Generator().manual_seed(6))[:400].to(torch.int32)
    rng = stream(5)
    here = [tensor.to(device) for tensor in (hidden, weight, rows)]
    there = sk.Philox(*(part.to(device) for part in rng))
    top = sk.head_topk(*here[:2], 8, rows=here[2])
    drawn = sk.head_sample(*here[:2], 8, rng=there, rows=here[2], temperature=0.5)
    want = sk.head_topk(hidden, weight, 8, rows=rows, backend="reference")
    assert torch.equal(top.tokens.cpu(), want.tokens) and torch.equal(top.logits.cpu(), want.logits)
    torch.testing.assert_close(top.lse.cpu(), want.lse, **TOLERANCE)
    keys = logits64(hidden, weight, rows) / 0.5 + noise(rng, rows[None])
    check_ranking(drawn.tokens.cpu(), keys, rows.expand(5, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_results_do_not_depend_on_threads_or_neighbours(backend, dtype):
    hidden, weight = inputs(21, 3000, 60, dtype)
    rng = stream(21)

    def both(part=slice(None)):
        own = sk.Philox(*(value[part] for value in rng))
        top = sk.head_topk(hidden[part], weight, 9, return_logits=True, temperature=0.8, backend=backend)
        return *top, *sk.head_sample(hidden[part], weight, 9, rng=own, temperature=0.8, backend=backend)[:4]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = both()
        for count in (2, 5):
            torch.set_num_threads(count)
            assert all(map(torch.equal, both(), want)), f"{count} threads"
        for part in (slice(0, 1), slice(1, 4), slice(3, 20)):
            alone = both(part)
            assert all(torch.equal(a, b[part]) for a, b in zip(alone, want, strict=True)), part
    finally:
        torch.set_num_threads(threads)
