"""Quantised weights in the head's CUDA code, to the last code of each format: on the host, and on a GPU."""

from __future__ import annotations

import pytest
import torch

import cuda_head
import specdec_kernels as sk
from cuda_head import quantised
from head_cases import TOLERANCE, inputs, logits64, lse_and_entropy
from test_head import DTYPES

pytestmark = pytest.mark.skipif(cuda_head.compiler() is None, reason="no C++ compiler on this machine")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_quantised_weights(head_ops, kind, dtype):
    for batch, height, dim in ((1, 300, 60), (7, 111, 512), (16, 64, 300), (3, 40, 4096), (2, 33, 1)):
        hidden, weight = inputs(batch, height, dim, dtype)
        values, scales, exact = quantised(weight, kind)
        rows = torch.randperm(height, generator=torch.Generator().manual_seed(dim))[: height - 5].to(torch.int32)
        bias = torch.randn(height, generator=torch.Generator().manual_seed(2))
        # fp32 is cut to 16 bits of its fraction, others are exact; sums are fp32.
        bound = 2.0**-15 if dtype == torch.float32 else 2.0**-19
        lengths = hidden.double().norm(dim=1)[:, None] * exact.norm(dim=1)
        for list_of_rows in (None, rows):
            got = head_ops.head_topk(hidden, values, 6, list_of_rows, None, None, bias, scales, 0.7, None, True)
            picked = torch.arange(height) if list_of_rows is None else rows.long()
            logits = logits64(hidden, exact, picked, bias)
            error = (got[4].double() - logits).abs()
            assert (error <= bound * lengths[:, picked] + 1e-6).all()
            best = got[4].topk(6, dim=1)
            assert torch.equal(got[0], best.values) and torch.equal(got[1], picked[best.indices].to(torch.int32))
            torch.testing.assert_close(got[2].double(), lse_and_entropy(got[4].double(), 0.7)[0], **TOLERANCE)


@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_what_quantize_head_makes(head_ops, kind):
    hidden, weight = inputs(5, 700, 300, torch.bfloat16)
    head = sk.quantize_head(weight, kind)
    got, want = (sk.head_topk(hidden, head, 8, backend=backend) for backend in ("cuda", "reference"))
    assert torch.equal(got.tokens, want.tokens)
    torch.testing.assert_close(got.lse, want.lse, **TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code_of_quantised_weights(head_ops, dtype):
    """One column at a time: the logit is the code's value itself. Every code stands in every byte of a load."""
    codes = torch.arange(256, dtype=torch.int16)
    dim = 160
    spread = ((codes[:, None] + torch.arange(dim) * 37) % 256).to(torch.uint8)
    hidden = torch.eye(dim, dtype=dtype)
    one = torch.ones(256)
    rest = (1.0, None, True)
    signed = spread.view(torch.int8)
    got = head_ops.head_topk(hidden, signed, 1, None, None, None, None, one, *rest)[4]
    assert torch.equal(got, signed.float().T)

    floats = torch.where((spread & 127) == 127, spread - 1, spread).view(torch.float8_e4m3fn)
    got = head_ops.head_topk(hidden, floats, 1, None, None, None, None, one, *rest)[4]
    assert torch.equal(got, floats.float().T)

    padded = spread[:, :128].contiguous()
    got = head_ops.head_topk(torch.eye(256, dtype=dtype), padded, 1, None, None, None, None, torch.ones(256, 2), *rest)[
        4
    ]
    halves = padded.view(256, 2, 64)
    values = torch.cat([(halves & 15).int() - 8, (halves >> 4).int() - 8], 2).view(256, 256)
    assert torch.equal(got, values.float().T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("column", [0, 100, 299])
def test_a_nan_of_fp8_breaks_who_reads_it(head_ops, column, dtype):
    hidden, weight = inputs(2, 40, 300, dtype)
    values, scales, _ = quantised(weight, "fp8")
    for code in (127, -1):
        values.view(torch.int8)[7, column] = code
        got = head_ops.head_topk(hidden, values, 3, None, None, None, None, scales, 1.0, None, True)
        assert got[4][:, 7].isnan().all() and got[4].isnan().sum() == 2
        assert (got[1] == -1).all() and got[2].isnan().all()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_unaligned_rows_of_bytes(head_ops, kind):
    """Rows that start anywhere are read byte by byte."""
    hidden, weight = inputs(3, 50, 61)
    values, scales, exact = quantised(weight, kind)
    wide = torch.zeros(50, 67, dtype=torch.int8)
    for start in (0, 1, 2, 6):
        wide[:, start : start + 61] = values.view(torch.int8)
        view = wide[:, start : start + 61].view(values.dtype)
        got = head_ops.head_topk(hidden, view, 3, None, None, None, None, scales, 1.0, None, True)
        torch.testing.assert_close(got[4].double(), logits64(hidden, exact), rtol=1e-3, atol=1e-4)


def test_large_hidden_values_stay_finite(head_ops):
    """fp32 beside a quantised weight is cut, not rounded, to two parts, so the largest numbers do not overflow."""
    hidden = torch.tensor([[3.4e38, 0.0], [-3.4e38, 1e-30]])
    values = torch.tensor([[1, 0], [0, 1]], dtype=torch.int8)
    got = head_ops.head_topk(hidden, values, 1, None, None, None, None, torch.ones(2), 1.0, None, True)
    torch.testing.assert_close(got[4], hidden, rtol=2**-15, atol=0)
