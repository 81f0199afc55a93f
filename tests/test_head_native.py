"""What the CPU head's sums, memory and offsets promise."""

from __future__ import annotations

import math

import pytest
import torch

import specdec_kernels as sk
from head_cases import inputs, logits64, lse_and_entropy
from malloc_peak import peak, peaks_of, report
from specdec_kernels import backends

MISSING = backends.MISSING["cpu"]
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
NATIVE = pytest.mark.native
INF = float("inf")


def merge(parts: list[sk.HeadPart]):
    """(lse, entropy) fp32 of [B, 3] sums of several ranks, as HeadPart's docstring says."""
    sums = torch.stack([part.sums for part in parts])
    anchor = sums[..., 0].amax(0)
    lower = torch.where(sums[..., 0] > -INF, sums[..., 0] - anchor, 0.0)
    mass = (sums[..., 1] * lower.exp2()).sum(0)
    moment = ((sums[..., 2] + lower * sums[..., 1]) * lower.exp2()).sum(0)
    lse, entropy = (anchor + mass.log2()) * math.log(2), (mass.log2() - moment / mass) * math.log(2)
    return lse.float(), ((entropy * 2**30).round() / 2**30).clamp(min=0).float()


@NATIVE
@pytest.mark.parametrize("temperature", [1.0, 0.3, 1e-3, 50.0])
def test_any_sharding_gives_the_same_bits(temperature):
    hidden, weight = inputs(12, 2000, 60, torch.bfloat16)
    bias = torch.randn(2000, generator=torch.Generator().manual_seed(1)) * 5
    bias[:100] = -INF
    whole = sk.head_topk(hidden, weight, 1, bias=bias, temperature=temperature, backend="cpu")
    lse, entropy = lse_and_entropy(logits64(hidden, weight, bias=bias)[:, 100:], temperature)
    torch.testing.assert_close(whole.lse.double(), lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.entropy.double(), entropy, rtol=1e-4, atol=1e-4)
    for cuts in ([2000], [1000, 1000], [1, 1999], [90, 7, 903, 240, 760], [17] * 117 + [11]):
        parts = []
        for w, b in zip(weight.split(cuts), bias.split(cuts), strict=True):
            parts.append(sk.head_part(hidden, w, 1, bias=b, temperature=temperature, backend="cpu"))
            assert torch.equal(parts[-1].sums[:, 0], parts[-1].sums[:, 0].floor())
        got = merge(parts)
        assert torch.equal(got[0], whole.lse)
        assert torch.equal(got[1], whole.entropy)


@NATIVE
@pytest.mark.parametrize("logit", [0.0, 1.0, -3.7, 1e4, -1e4, 3e38, -3e38, 1e-40])
@pytest.mark.parametrize("temperature", [1.0, 1e-6, 1e-30, 1e6])
def test_ties_of_any_size(logit, temperature):
    """300 equal logits: sums are powers of two times 300, entropy is ln 300, whatever the logit."""
    weight = torch.full((400, 1), logit)
    bias = torch.where(torch.arange(400) % 4 == 1, -INF, 0.0)
    got = sk.head_topk(torch.ones(1, 1), weight, 2, bias=bias, temperature=temperature, backend="cpu")
    assert got.tokens.tolist() == [[0, 2]]
    exact = logit / temperature + math.log(300)  # may be beyond fp32
    torch.testing.assert_close(got.lse, torch.tensor([exact], dtype=torch.float64).float(), rtol=1e-6, atol=1e-6)
    assert abs(float(got.entropy) - math.log(300)) < 1e-5
    part = sk.head_part(torch.ones(1, 1), weight, 2, bias=bias, temperature=temperature, backend="cpu")
    assert 300 <= float(part.sums[0, 1]) < 600


@NATIVE
@pytest.mark.parametrize("gap", [20.0, 200.0, 2000.0, 1e30])
def test_entropy_of_nearly_one_token_is_not_negative(gap):
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(1000, 1, generator=generator) - gap
    weight[777] = torch.rand(1, generator=generator) * 9
    scales = torch.rand(64, 1, generator=generator) + 0.5
    got = sk.head_topk(scales, weight, 1, backend="cpu")
    assert (got.entropy >= 0).all() and (got.tokens == 777).all()
    _, exact = lse_and_entropy(logits64(scales, weight), 1.0)
    torch.testing.assert_close(got.entropy.double(), exact, rtol=1e-4, atol=1e-7)


@NATIVE
@pytest.mark.parametrize("poison", [float("nan"), INF], ids=str)
def test_parts_of_broken_and_empty_requests(poison):
    hidden, weight = inputs(3, 700, 8)
    hidden[1, 3] = poison
    weight[650] = hidden[1].sign().nan_to_num() * 4  # +inf somewhere, also where the poison is an infinity
    part = sk.head_part(hidden, weight, 2, backend="cpu")
    assert part.sums[1, 1:].isnan().all() and (part.tokens[1] == -1).all() and (part.keys[1] == -INF).all()
    assert part.sums[[0, 2]].isfinite().all() and (part.tokens[[0, 2]] >= 0).all()
    nothing = sk.head_part(hidden, weight, 2, rows=torch.full((5,), -1, dtype=torch.int32), backend="cpu")
    assert nothing.sums.tolist() == [[-INF, 0.0, 0.0]] * 3 and (nothing.tokens == -1).all()
    assert sk.head_part(hidden, weight[:0], 2, backend="cpu").sums.tolist() == [[-INF, 0.0, 0.0]] * 3


@NATIVE
@pytest.mark.parametrize("draws", [False, True])
def test_parts_are_what_the_reference_says(draws):
    hidden, weight = inputs(6, 999, 60)
    rng = sk.Philox(torch.arange(6), torch.arange(6)) if draws else None
    names = torch.arange(999, dtype=torch.int32) * 3
    options = {"rng": rng, "token_ids": names, "temperature": 0.7}
    got, want = (sk.head_part(hidden, weight, 7, **options, backend=name) for name in ("cpu", "reference"))
    assert torch.equal(got.tokens, want.tokens) and got.keys.dtype == torch.float64
    for a, b in ((got.keys, want.keys), (got.logits, want.logits)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=3e-5)
    for a, b in zip(merge([got]), merge([want]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 16])
def test_rows_beyond_two_to_the_31_elements(batch):
    """Rows that lie there are read as they are elsewhere; no page between is touched."""
    dim, near = 4096, 300
    first = 2**31 // dim
    weight = torch.empty(first + near, dim, dtype=torch.bfloat16)
    hidden, weight[first:] = inputs(batch, near, dim, torch.bfloat16)
    rows = torch.arange(first, first + near, dtype=torch.int32)
    got = sk.head_topk(hidden, weight, 5, rows=rows, return_logits=True, backend="cpu")
    want = sk.head_topk(hidden, weight[first:], 5, token_ids=rows, return_logits=True, backend="cpu")
    assert all(map(torch.equal, got, want)) and int(got.tokens.min()) >= first


HEIGHT, DIM, BATCH = 64_128, 64, 16


def calls():
    """Calls over one weight: in fp32 it has 16 MiB, the logits of all requests 4 MiB."""
    hidden, weight = inputs(BATCH, HEIGHT, DIM)
    rows = torch.arange(0, HEIGHT, 4, dtype=torch.int32)
    lines, groups = torch.stack([rows, rows + 1]), (torch.arange(BATCH) // 8).to(torch.int32)
    rng = sk.Philox(torch.arange(BATCH), torch.arange(BATCH))
    every = rows.expand(BATCH, -1).contiguous()
    for dtype in (torch.float32, torch.bfloat16):
        x, w = hidden.to(dtype), weight.to(dtype)
        for name, how in {
            "all rows": {},
            "gathered": {"rows": rows},
            "groups": {"rows": lines, "row_groups": groups},
            "own rows": {"rows": every},
            "trimmed": {"token_ids": torch.arange(HEIGHT, dtype=torch.int32), "bias": weight[:, 0].clone()},
        }.items():
            for op, rest in ((sk.head_topk, {}), (sk.head_sample, {"rng": rng}), (sk.head_part, {"rng": rng})):
                yield (
                    f"{op.__name__} {name} {dtype}",
                    lambda op=op, x=x, w=w, how=how, rest=rest: op(x, w, 8, **how, **rest, backend="cpu"),
                )
    yield "logits", lambda: sk.head_topk(hidden, weight, 8, return_logits=True, backend="cpu")


def measure() -> dict[str, int]:
    """Peak bytes of each call beyond what was in use before it."""
    torch.set_num_threads(2)
    peaks = {}
    for name, call in calls():
        peaks[name] = peak(call)[0]
    return peaks


def test_no_logits_and_no_copy_of_the_weight(tmp_path):
    peaks = peaks_of(__file__, tmp_path)
    logits = 4 * BATCH * HEIGHT
    # Three fp64 sums for every 240 rows of a request, a block's products of 64 vectors for each thread, small lists.
    limit = 24 * BATCH * (HEIGHT // 240 + 1) + 2 * 4 * 64 * 240 + 2**17
    assert limit < logits / 8
    assert logits <= peaks.pop("logits") < logits + limit
    assert len(peaks) == 30
    assert max(peaks.values()) < limit, {name: peak for name, peak in peaks.items() if peak >= limit}


if __name__ == "__main__":
    report(measure)
