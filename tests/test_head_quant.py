"""The head's ops on quantised weights: against float64 of what the weight stands for, in every tier."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys

import pytest
import torch

import specdec_kernels as sk
from head_cases import BACKENDS, check_ranking, inputs, lse_and_entropy
from specdec_kernels import backends
from specdec_kernels.philox import gumbels
from test_head_law import TRIALS, check_pairs

pytestmark = pytest.mark.native
FORMATS = ["int8", "int4", "fp8"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF, NAN = float("inf"), float("nan")
# B, V, D: parts of blocks, tiles, lines and groups, several of each, more than one run of 32-bit sums (D > 8192).
SHAPES = [
    (0, 9, 8),
    (1, 1000, 60),
    (2, 300, 128),
    (3, 256, 192),
    (4, 40, 4096),
    (7, 500, 200),
    (18, 111, 64),
    (2, 5, 1),
]
LONG = (3, 20, 8300)
TIERS = [] if backends.MISSING["cpu"] else sys.modules["specdec_kernels._C"].tiers()


def case(batch, height, dim, dtype=torch.float32, format="int8", seed=0):
    hidden, weight = inputs(batch, height, dim, dtype, seed)
    return hidden, sk.quantize_head(weight, format)


def stream(batch: int) -> sk.Philox:
    index = torch.arange(batch)
    return sk.Philox(index * 0x1_0000_0003, index * 7 + 5, index.to(torch.int32) % 3)


def products(hidden, head, rows=None):
    """(logits [B, R] in float64, how far a logit may be from them): the rounding of hidden to 16 bits, and of fp32."""
    weight = head.dequantize(torch.float64)
    weight = weight if rows is None else weight[rows.long()]
    hidden = hidden.double()
    step = hidden.abs().amax(1, keepdim=True) / 32767 / 2
    fixed = step * weight.abs().sum(1) * (1 + 1e-6)
    fp32 = 2.0**-23 * (hidden.abs() @ weight.abs().T) * 8
    return hidden @ weight.T, fixed + fp32


def compare(got, want, within):
    assert got.shape == want.shape
    excess = (got.double() - want).abs() - within
    assert bool((excess <= 0).all()), f"off by {float(excess.max())} more than its rounding allows"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, LONG], ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_topk_and_sample_match_float64(backend, format, shape, dtype):
    batch, height, _dim = shape
    hidden, head = case(*shape, dtype, format)
    bias = torch.randn(height, generator=torch.Generator().manual_seed(1))
    rng = stream(batch)
    options = {"bias": bias, "temperature": 0.7, "return_logits": True, "backend": backend}
    top, drawn = sk.head_topk(hidden, head, 8, **options), sk.head_sample(hidden, head, 8, rng=rng, **options)
    logits, within = products(hidden, head)
    norms = hidden.double().norm(dim=1)[:, None] * head.dequantize(torch.float64).norm(dim=1)
    ids = torch.arange(height).expand(batch, height)
    for got in (top, drawn):
        compare(got.all_logits, logits + bias, within + 2e-6 * (logits + bias).abs())
        assert bool(((got.all_logits - bias - logits).abs() <= 1e-3 * norms + 1e-5).all())
        # What is made of the logits, given the logits.
        lse, entropy = lse_and_entropy(got.all_logits.double(), 0.7)
        torch.testing.assert_close(got.lse.double(), lse, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got.entropy.double(), entropy, rtol=1e-4, atol=1e-4)
        picked = got.all_logits.gather(1, got.tokens.clamp(min=0).long())
        assert torch.equal(got.logits, torch.where(got.tokens >= 0, picked, -INF))
    check_ranking(top.tokens, top.all_logits.double(), ids)
    noise = gumbels(rng.seed[:, None], rng.offset[:, None], rng.row[:, None], ids).double()
    check_ranking(drawn.tokens, drawn.all_logits.double() / 0.7 + noise, ids)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_states_with_an_outlier(backend, format):
    """One coordinate a thousand times the others: 16 bits of it leave 5 for them, and errors must not add up."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(400, 4096, generator=generator)
    weight[200:] = weight[200:].abs()  # errors of one sign would add up here
    head = sk.quantize_head(weight, format)
    hidden = torch.randn(4, 4096, generator=generator)
    hidden[1] = 0.7
    hidden[2] = hidden[2].abs()
    hidden[3] = torch.tensor([0.49 / 32.767, 0.3]).repeat(2048)  # just below half a unit: all of them vanish
    hidden[:, 77] = 1000
    got = sk.head_topk(hidden, head, 1, return_logits=True, backend=backend).all_logits.double()
    want = head.dequantize(torch.float64)
    norms = hidden.double().norm(dim=1)[:, None] * want.norm(dim=1)
    assert float(((got - hidden.double() @ want.T).abs() / norms).max()) < 1e-3


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_states_of_any_size(backend, format):
    generator = torch.Generator().manual_seed(3)
    head = sk.quantize_head(torch.randn(50, 200, generator=generator), format)
    base = torch.randn(1, 200, generator=generator)
    sizes = torch.tensor([1e-42, 1e-38, 1e-20, 1.0, 1e20, 1e33])[:, None]
    hidden = torch.cat([base * sizes, torch.zeros(1, 200)])
    got = sk.head_topk(hidden, head, 1, return_logits=True, backend=backend).all_logits
    logits, within = products(hidden, head)
    compare(got, logits, within + 200 * 2.0**-149)  # what is too small for fp32
    assert bool((got[-1] == 0).all())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gathered_rows(backend, format):
    """Rows shared, of each request and of groups: the bits of a head that was trimmed beforehand."""
    hidden, head = case(5, 700, 200, format=format)
    generator = torch.Generator().manual_seed(4)
    rows = torch.stack([torch.randperm(700, generator=generator)[:517] for _ in range(3)]).to(torch.int32)
    rows[:, 5] = -1
    rows[:, 6] = 700
    groups = torch.tensor([1, 1, 0, 2, 7], dtype=torch.int32)
    rng = stream(5)
    # The reference multiplies matrices, whose sums go by their shapes.
    exact = torch.equal if backend == "cpu" else functools.partial(torch.allclose, rtol=1e-4, atol=1e-4)
    for op, options in ((sk.head_topk, {}), (sk.head_sample, {"rng": rng})):
        got = op(hidden, head, 6, rows=rows, row_groups=groups, return_logits=True, backend=backend, **options)
        assert got.tokens[4].tolist() == [-1] * 6 and float(got.lse[4]) == -INF
        own = op(hidden[:3], head, 6, rows=rows, return_logits=True, backend=backend, **(
            {"rng": sk.Philox(*(x[:3] for x in rng))} if options else {}
        ))  # fmt: skip
        for b in range(4):
            line = rows[groups[b]]
            known = (line >= 0) & (line < 700)
            part = sk.QuantizedHead(head.values[line[known].long()], head.scales[line[known].long()], 200)
            one = {"rng": sk.Philox(*(x[b : b + 1] for x in rng))} if options else {}
            alone = op(hidden[b : b + 1], part, 6, token_ids=line[known], return_logits=True, backend=backend, **one)
            shared = op(hidden[b : b + 1], head, 6, rows=line, return_logits=True, backend=backend, **one)
            for other in (alone, shared):
                assert torch.equal(got.tokens[b], other.tokens[0])
                assert exact(got.lse[b], other.lse[0]) and exact(got.logits[b], other.logits[0])
            assert exact(got.all_logits[b][known], alone.all_logits[0])
            assert bool((got.all_logits[b][~known] == -INF).all())
            if b == groups[b]:
                assert torch.equal(own.tokens[b], got.tokens[b]) and exact(own.all_logits[b], got.all_logits[b])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_rows_go_by_their_ids(backend, format):
    hidden, head = case(4, 30, 200, format=format)
    copies = torch.arange(600) % 30
    many = sk.QuantizedHead(head.values[copies], head.scales[copies], 200)
    names = torch.randperm(5000, generator=torch.Generator().manual_seed(5))[:600].to(torch.int32)
    for named in (None, names):
        ids = torch.arange(600) if named is None else named
        got = sk.head_topk(hidden, many, 40, token_ids=named, return_logits=True, backend=backend)
        for b in range(4):
            order = sorted(range(600), key=lambda i, b=b: (-float(got.all_logits[b, i]), int(ids[i])))[:40]
            assert got.tokens[b].tolist() == ids[order].tolist()
            assert bool((got.all_logits[b].view(20, 30) == got.all_logits[b, :30]).all())


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_broken_request_leaves_its_neighbours_alone(backend, format, poison):
    hidden, head = case(9, 300, 200, format=format)
    options = {"return_logits": True, "backend": backend}
    for op, rest in ((sk.head_topk, {}), (sk.head_sample, {"rng": stream(9)})):
        clean = op(hidden, head, 3, **options, **rest)
        dirty = hidden.clone()
        dirty[2, 17] = poison
        got = op(dirty, head, 3, **options, **rest)
        assert got.tokens[2].tolist() == [-1] * 3 and got.lse[2].isnan() and got.entropy[2].isnan()
        others = [b for b in range(9) if b != 2]
        assert all(torch.equal(a[others], b[others]) for a, b in zip(got, clean, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_codes_of_nan_in_fp8_stay_nan(backend):
    hidden, head = case(3, 40, 70, format="fp8")
    raw = head.values.view(torch.uint8)
    raw[7, 3], raw[30, 69] = 0x7F, 0xFF
    got = sk.head_topk(hidden, head, 2, return_logits=True, backend=backend)
    assert got.all_logits.isnan().any(0).nonzero()[:, 0].tolist() == [7, 30] and bool(got.lse.isnan().all())
    rest = torch.tensor([i for i in range(40) if i not in (7, 30)], dtype=torch.int32)
    assert bool(sk.head_topk(hidden, head, 2, rows=rest, backend=backend).lse.isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_code_of_fp8(backend):
    codes = torch.arange(256, dtype=torch.uint8).view(256, 1).view(torch.float8_e4m3fn)
    head = sk.QuantizedHead(codes, torch.ones(256), 1)
    got = sk.head_topk(torch.ones(1, 1), head, 1, return_logits=True, backend=backend).all_logits[0]
    assert torch.equal(got.nan_to_num(nan=1e9), codes[:, 0].float().nan_to_num(nan=1e9))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_results_do_not_depend_on_threads_or_neighbours(backend, format):
    hidden, head = case(21, 3000, 200, torch.bfloat16, format)
    rng = stream(21)

    def both(part=slice(None)):
        own = sk.Philox(*(value[part] for value in rng))
        top = sk.head_topk(hidden[part], head, 9, return_logits=True, backend=backend)
        return *top, *sk.head_sample(hidden[part], head, 9, rng=own, backend=backend)[:4]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        want = both()
        torch.set_num_threads(3)
        assert all(map(torch.equal, both(), want))
        for part in (slice(0, 1), slice(1, 3), slice(1, 4), slice(3, 20)):
            assert all(torch.equal(a, b[part]) for a, b in zip(both(part), want, strict=True)), part
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_draws_follow_what_the_head_says(backend, format):
    """Plackett-Luce over softmax of the returned logits, which are q: what verification needs to be lossless."""
    generator = torch.Generator().manual_seed(11)
    head = sk.quantize_head(torch.randn(16, 130, generator=generator) * 0.3, format)
    hidden = torch.randn(130, generator=generator) * 0.3
    bias = torch.zeros(16)
    bias[3] = -INF
    index = torch.arange(TRIALS // 4)
    rng = sk.Philox(index, index % 7, index.to(torch.int32) % 3)
    got = sk.head_sample(
        hidden.expand(len(index), -1), head, 2, rng=rng, bias=bias, temperature=0.5, return_logits=True, backend=backend
    )
    assert bool((got.all_logits == got.all_logits[0]).all())
    check_pairs(torch.softmax(got.all_logits[0].double() / 0.5, 0), got.tokens.long())


def digest() -> str:
    """Of all bits of int8 and int4 logits and draws, over shapes, batches and dtypes."""
    seen = hashlib.sha256()
    for batch, height, dim in [*SHAPES, LONG]:
        for format in ("int8", "int4"):
            for dtype in DTYPES[:2]:
                hidden, head = case(batch, height, dim, dtype, format)
                got = sk.head_sample(hidden, head, 4, rng=stream(batch), return_logits=True, backend="cpu")
                seen.update(got.all_logits.numpy().tobytes() + got.logits.numpy().tobytes())
                seen.update(got.tokens.numpy().tobytes())
    return seen.hexdigest()


@pytest.mark.skipif("SPECDEC_CPU_ISA" in os.environ, reason="this process is for one tier already")
@pytest.mark.parametrize("isa", TIERS[:-1])
def test_every_tier_gives_the_same_bits(isa):
    code = f"import torch; torch.set_num_threads(2); import {__name__} as t; print(t.digest())"
    environment = {**os.environ, "SPECDEC_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == digest()


BAD = {
    "scale beside it": ({"scale": torch.ones(20)}, ValueError, "scale: expected None beside a QuantizedHead"),
    "dim": ({"dim": 7}, ValueError, "weight.dim: expected D=8, what hidden has, got 7"),
    "values dtype": ({"values": torch.zeros(20, 8)}, TypeError, "weight.values: expected dtype int8 or .*float32"),
    "values shape": (
        {"values": torch.zeros(20, 9, dtype=torch.int8)}, ValueError, r"weight.values: expected shape \[V=?.*D=8\]",
    ),
    "int4 shape": (
        {"values": torch.zeros(20, 8, dtype=torch.uint8)}, ValueError, r"weight.values: expected shape \[.*64\], got",
    ),
    "int4 scales": (
        {"values": torch.zeros(20, 64, dtype=torch.uint8)}, ValueError, r"weight.scales: expected shape \[V, 1\], got",
    ),
    "scales length": ({"scales": torch.ones(19)}, ValueError, r"weight.scales: expected shape \[V=20\], got \[19\]"),
    "scales dtype": ({"scales": torch.ones(20).double()}, TypeError, "weight.scales: expected dtype float32, got"),
    "no tensor": ({"values": [1]}, TypeError, "weight.values: expected a tensor, got list"),
    "bias dtype": ({"bias": torch.zeros(20).half()}, TypeError, "bias: expected dtype float32, got float16"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name):
    changed, error, message = BAD[name]
    hidden, head = case(2, 20, 8)
    parts = {field: changed.get(field, value) for field, value in head._asdict().items()}
    options = {key: value for key, value in changed.items() if key not in parts}
    for op, rest in ((sk.head_topk, {}), (sk.head_sample, {"rng": stream(2)}), (sk.head_part, {})):
        with pytest.raises(error, match=message):
            op(hidden, sk.QuantizedHead(**parts), 2, **options, **rest)


def test_a_bare_quantised_tensor_is_no_weight():
    hidden, head = case(2, 20, 8)
    with pytest.raises(TypeError, match="weight: expected dtype float32, got int8"):
        sk.head_topk(hidden, head.values, scale=head.scales)


@pytest.mark.skipif(backends.MISSING["cpu"] is not None, reason=str(backends.MISSING["cpu"]))
def test_the_op_itself_checks_what_would_lead_out_of_bounds():
    hidden, head = case(2, 20, 200, format="int4")
    op = torch.ops.specdec_kernels.head_topk.default
    rest = (None, 1.0, None, False)
    for weight, scale, message in [
        (head.values, None, "scale: expected the scales of a quantised weight, got none"),
        (head.values, head.scales[:, :1], "scale: expected"),
        (head.values, head.scales[:, 0], "scale: expected"),
        (head.values[:, :127], head.scales, "weight: expected"),
        (head.values.view(torch.int8), head.scales[:, 0].contiguous(), "weight: expected"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            op(hidden, weight, 2, None, None, None, None, scale, *rest[1:])


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("overload", ["default", "reference"])
def test_opcheck(overload, format):
    hidden, head = case(3, 20, 130, format=format)
    rows = torch.arange(3, 17, dtype=torch.int32)
    # The other tests compare arguments before and after, which torch cannot do in fp8.
    tests = ("test_faketensor",) if format == "fp8" else ("test_schema", "test_faketensor")
    for arguments in (
        (hidden, head.values, 4, None, None, None, torch.randn(20), head.scales, 0.5, None, True),
        (hidden, head.values, 4, rows, None, None, None, head.scales, 1.0, torch.rand(3) + 0.1, False),
    ):
        op = getattr(torch.ops.specdec_kernels.head_topk, overload)
        torch.library.opcheck(op, arguments, test_utils=tests)
