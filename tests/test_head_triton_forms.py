"""The head's Triton kernels on quantised weights and as one rank's part; their noise, their law and their memory.

Runs as test_head_triton.py does.
"""

from __future__ import annotations

import importlib
import itertools
import math
from pathlib import Path

import pytest
import torch

import specdec_kernels as sk
from head_cases import inputs, whole
from head_triton_support import stream, there
from specdec_kernels import philox
from test_head_law import VOCABULARY, check_pairs
from verify_backends import INTERPRETED, TRITON_DEVICES, in_another_process

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = triton.language
gumbel = importlib.import_module("specdec_kernels.triton.head_noise").gumbel

OPS = torch.ops.specdec_kernels


@pytest.fixture(params=TRITON_DEVICES)
def device(request) -> str:
    return request.param


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted run")
@pytest.mark.parametrize("which, least", [("not full", 30), pytest.param("full", 2, marks=pytest.mark.full)])
def test_under_the_interpreter(which, least):
    assert in_another_process(str(Path(__file__)), "-m", which, TRITON_INTERPRET="1") >= least


def quantised(weight, format):
    """(values, scales, what they stand for in fp32) of a [V, D] weight; see head_topk for the formats."""
    height, dim = weight.shape
    if format == "fp8":
        scale = weight.abs().amax(1) / 448
        values = (weight / scale[:, None]).to(torch.float8_e4m3fn)
        return values, scale, values.float() * scale[:, None]
    if format == "int8":
        scale = weight.abs().amax(1) / 127
        values = (weight / scale[:, None]).round()
        return values.to(torch.int8), scale, values * scale[:, None]
    groups = -(-dim // 128)
    padded = torch.nn.functional.pad(weight, (0, groups * 128 - dim)).view(height, groups, 128)
    scale = padded.abs().amax(2) / 7
    values = (padded / scale[:, :, None]).round().clamp(-8, 7)
    low, high = (values + 8).to(torch.uint8).split(64, dim=2)
    dequantised = (values * scale[:, :, None]).view(height, -1)[:, :dim]
    return (low | high << 4).reshape(height, -1), scale, dequantised


@pytest.mark.parametrize("format", ["int8", "fp8", "int4"])
@pytest.mark.parametrize(
    "batch, dim, dtype",
    [
        (1, 200, torch.bfloat16),
        (5, 60, torch.float16),
        *(pytest.param(*each, marks=pytest.mark.full) for each in ((1, 60, torch.float32), (5, 200, torch.bfloat16))),
    ],
)
def test_quantised_weights(device, batch, dim, dtype, format):
    """Against the reference on what they stand for: the logits' law is the same, sums of 200 products are rounded."""
    hidden, weight = inputs(batch, 150, dim)
    hidden = hidden.to(dtype)
    values, scales, stands_for = quantised(weight, format)
    generator = torch.Generator().manual_seed(3)
    rows = torch.stack([torch.randperm(150, generator=generator)[:100] for _ in range(batch)]).to(torch.int32)
    bias = torch.randn(150, generator=generator)
    rest = (None, None, bias, scales, 0.7, None, True)
    plain = (None, None, bias, None, 0.7, None, True)
    for of_rows in (rows[0], rows):
        want = OPS.head_topk.reference(hidden.float(), stands_for, 2, of_rows, *plain)
        got = OPS.head_topk.triton(*there((hidden, values, 2, of_rows, *rest), device))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=5e-5)
    rng = stream(batch)
    want = OPS.head_sample.reference(hidden.float(), stands_for, 2, *rng, None, *plain)
    got = OPS.head_sample.triton(*there((hidden, values, 2, *rng, None, *rest), device))
    assert torch.equal(got[1].cpu(), want[1])


def test_fp8_of_every_byte(device):
    """All 256 bytes, subnormal numbers and both NaN too."""
    bytes_ = torch.arange(256, dtype=torch.uint8)[:, None].view(torch.float8_e4m3fn)
    for batch in (1, 3):
        hidden = torch.ones(batch, 1)
        rest = (None, None, None, torch.ones(256), 1.0, None, True)
        logits = OPS.head_topk.triton(*there((hidden, bytes_, 1, None, *rest), device))[4].cpu()
        assert torch.equal(logits[0].nan_to_num(nan=7777.0), bytes_.float()[:, 0].nan_to_num(nan=7777.0))


def parts_of(device, hidden, weight, bounds, k, rng, temperatures, backend="triton"):
    """head_part of the rows between each two of `bounds`."""
    found = []
    for first, last in itertools.pairwise(bounds):
        ids = torch.arange(first, last, dtype=torch.int32)
        call = (hidden, weight[first:last], k, *rng, None, None, ids, None, None, 1.0, temperatures)
        found.append([x.cpu() for x in getattr(OPS.head_part, backend)(*there(call, device))])
    return found


@pytest.mark.parametrize("batch, draws", [(3, True), (17, False)])
def test_parts_agree_and_merge(device, batch, draws):
    """Uneven shards and the whole: the reference's candidates, and sums that merge to one fp32 lse and entropy."""
    hidden, weight = whole(batch, 230, 12)
    temperatures = torch.tensor([1.0, 0.05, 1e-4] + [3.0] * (batch - 3))
    rng = stream(batch) if draws else (None, None, None)
    results = []
    for bounds in ((0, 230), (0, 1, 1, 100, 230)):
        parts = parts_of(device, hidden, weight, bounds, 5, rng, temperatures)
        wanted = parts_of("cpu", hidden, weight, bounds, 5, rng, temperatures, "reference")
        for got, want in zip(parts, wanted, strict=True):
            assert torch.equal(got[2], want[2]) and torch.equal(got[1], want[1])
            torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(got[3], want[3], rtol=1e-6, atol=1e-12)
            assert got[0].dtype == got[3].dtype == torch.float64
        sums = torch.stack([part[3] for part in parts])
        anchor = sums[..., 0].amax(0)
        shift = (sums[..., 0] - anchor).clamp(min=-2000.0)
        total = (torch.exp2(shift) * sums[..., 1]).sum(0)
        weighted = (torch.exp2(shift) * (sums[..., 2] + shift * sums[..., 1])).sum(0)
        results.append((math.log(2) * (anchor + total.log2()), math.log(2) * (total.log2() - weighted / total)))
    (lse, entropy), (other_lse, other_entropy) = results
    assert torch.equal(lse.float(), other_lse.float()) and torch.equal(entropy.float(), other_entropy.float())
    law = torch.distributions.Categorical(logits=(hidden.double() @ weight.double().T) / temperatures[:, None])
    torch.testing.assert_close(entropy, law.entropy(), rtol=1e-5, atol=1e-6)


def test_a_part_without_a_distribution(device):
    hidden, weight = inputs(3, 40, 8)
    hidden[1, 2] = math.nan
    call = (hidden, weight, 2, None, None, None, None, None, None, None, None, 1.0, None)
    keys, logits, tokens, sums = (x.cpu() for x in OPS.head_part.triton(*there(call, device)))
    assert sums[1, 1:].isnan().all() and sums[[0, 2]].isfinite().all()
    assert (tokens[1] == -1).all() and (keys[1] == -math.inf).all() and (tokens[[0, 2]] >= 0).all()
    call = (hidden[:1], weight, 2, *call[3:9], torch.full((40,), -math.inf), *call[10:])
    keys, logits, tokens, sums = (x.cpu() for x in OPS.head_part.triton(*there(call, device)))
    assert sums[0].tolist() == [-math.inf, 0.0, 0.0] and (logits == -math.inf).all() and (tokens == -1).all()


@triton.jit
def noise_kernel(words, out, SIZE: tl.constexpr):
    lane = tl.arange(0, SIZE)
    tl.store(out + lane, gumbel(tl.load(words + lane).to(tl.uint32)))


def test_noise_of_extreme_words(device):
    """The logarithms keep the noise exact at both ends, where it decides what a thin tail draws."""
    ends = torch.cat(
        [torch.arange(200), 2**32 - 1 - torch.arange(200), 2 ** torch.arange(32), torch.arange(592) * 2**22]
    )
    out = torch.empty(1024, device=device)
    noise_kernel[(1,)](ends.to(device), out, SIZE=1024)
    v = philox.gumbel_argument(ends).double()
    torch.testing.assert_close(out.cpu().double(), -torch.log(-torch.log1p(-v)), rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize("trials", [300, pytest.param(3_000, marks=pytest.mark.full)])
def test_draws_follow_plackett_luce(device, trials):
    generator = torch.Generator().manual_seed(11)
    weight, hidden = (torch.randn(size, 8, generator=generator) for size in (VOCABULARY, 1))
    bias = torch.zeros(VOCABULARY)
    bias[3] = -math.inf
    rng = sk.Philox(torch.full((trials,), 77), torch.arange(trials))
    call = (hidden.expand(trials, -1), weight, 2, *rng, None, None, None, bias, None, 0.8, None, False)
    tokens = OPS.head_sample.triton(*there(call, device))[1].cpu()
    law = torch.softmax((weight.double() @ hidden[0].double() + bias) / 0.8, 0)
    check_pairs(law, tokens.long())


@pytest.mark.parametrize(
    "overload", ["head_sample", *(pytest.param(name, marks=pytest.mark.full) for name in ("head_topk", "head_part"))]
)
def test_opcheck(device, overload):
    hidden, weight = inputs(3, 20, 8)
    rng = () if overload == "head_topk" else tuple(stream(3))
    rest = (None, None, torch.arange(20, dtype=torch.int32), torch.randn(20), None, 0.5, torch.rand(3) + 0.1)
    call = (hidden, weight, 4, *rng, *rest, *([] if overload == "head_part" else [True]))
    torch.library.opcheck(getattr(OPS, overload).triton, there(call, device))


@pytest.mark.parametrize("k, rows", [(1, None), (8, None), (64, None), (8, "own"), (8, "groups")])
@pytest.mark.parametrize("batch", [1, 16, 64, 256])
def test_memory(batch, k, rows):
    """A few numbers for each program and request, no logits, and the weight itself: on tensors without data."""
    from specdec_kernels.triton import head

    height, count = 128256, 2048 if rows else 128256
    hidden, weight = (torch.empty(n, 4096, dtype=torch.bfloat16, device="meta") for n in (batch, height))
    lines = {None: None, "own": hidden.new_empty(batch, count, dtype=torch.int32)}
    lines["groups"] = hidden.new_empty(3, count, dtype=torch.int32)
    groups = hidden.new_empty(batch, dtype=torch.int32) if rows == "groups" else None
    seed = hidden.new_empty(batch, dtype=torch.int64)
    _, found = head.launches(
        "sm_90", 132, hidden, weight, k, seed, seed, None, lines[rows], groups, None, None, None, 1.0, None, False,
        part=False,
    )  # fmt: skip
    (_, grid, scan, _), (_, _, merge, _) = found
    scratch = ("keys", "ids", "logits", "sums")
    programs = grid[1]
    assert programs <= 132 * 3 and programs * k <= 16384
    assert sum(scan[name].nbytes for name in scratch) == batch * programs * (k * (8 + 4 + 4) + 3 * 4)
    given = {id(x) for x in (hidden, weight, seed, lines[rows], groups)}
    more = [x for x in (*scan.values(), *merge.values()) if isinstance(x, torch.Tensor) and id(x) not in given]
    assert max(x.numel() for x in more) <= batch * programs * max(k, 3)
    if k <= 8 and not rows:
        assert sum(scan[name].nbytes for name in scratch) < batch * count * 4 / 10
