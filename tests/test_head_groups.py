"""Rows by group, and the parts of a head whose rows are spread over several ranks."""

from __future__ import annotations

import math

import pytest
import torch

import specdec_kernels as sk
from head_cases import BACKENDS, inputs


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


LINES = torch.stack([torch.randperm(60, generator=torch.Generator().manual_seed(seed))[:37] for seed in range(3)]).int()
LINES[1, 30:] = -1
GROUPS = [(0, 0, 0, 1, 1, 2, 2), (2, 1, 0, 2, 1, 0, 0), (1,) * 7, (0, 0, 9, -1, 1, 1, 2)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_reads_its_line_of_rows(backend, groups, dtype):
    hidden, weight = inputs(7, 60, 24, dtype)
    known = [0 <= group < 3 for group in groups]
    rows = torch.stack([LINES[g] if ok else torch.full_like(LINES[0], -1) for g, ok in zip(groups, known, strict=True)])
    rng = sk.Philox(torch.arange(7), torch.arange(7) + 3)
    for op, options in ((sk.head_topk, {}), (sk.head_sample, {"rng": rng, "temperature": 0.7})):
        options |= {"bias": torch.randn(60, generator=torch.Generator().manual_seed(1)), "backend": backend}
        got = op(hidden, weight, 5, rows=LINES, row_groups=ints(*groups), return_logits=True, **options)
        want = op(hidden, weight, 5, rows=rows, return_logits=True, **options)
        assert got.tokens.equal(want.tokens)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
        assert ((got.tokens >= 0).any(1) == torch.tensor(known)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_lines_at_all(backend):
    hidden, weight = inputs(2, 10, 8)
    got = sk.head_topk(hidden, weight, 3, rows=LINES[:0], row_groups=ints(0, 1), backend=backend)
    assert (got.tokens == -1).all() and (got.lse == -math.inf).all() and (got.entropy == 0).all()


def test_groups_need_rows():
    hidden, weight = inputs(2, 10, 8)
    with pytest.raises(ValueError, match="row_groups: expected None without rows, got a tensor"):
        sk.head_topk(hidden, weight, row_groups=ints(0, 0))
    with pytest.raises(ValueError, match=r"rows: expected shape \[G, R\], got \[4\]"):
        sk.head_topk(hidden, weight, rows=ints(0, 1, 2, 3), row_groups=ints(0, 0))
    with pytest.raises(ValueError, match=r"row_groups: expected shape \[B=2\], got \[3\]"):
        sk.head_topk(hidden, weight, rows=LINES, row_groups=ints(0, 0, 0))


def merged(parts, k):
    """(tokens, lse, entropy) of parts, as head_part's docstring says."""
    keys, tokens = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("keys", "tokens"))
    by_token = tokens.argsort(dim=1, stable=True)
    order = by_token.gather(1, keys.gather(1, by_token).argsort(dim=1, descending=True, stable=True))[:, :k]
    sums = torch.stack([part.sums for part in parts])
    anchor = sums[..., 0].amax(0)
    shift = sums[..., 0] - torch.where(anchor > -math.inf, anchor, 0.0)
    factor = torch.exp2(shift)
    total = (factor * sums[..., 1]).sum(0)
    weighted = (factor * (sums[..., 2] + torch.where(factor > 0, shift, 0.0) * sums[..., 1])).sum(0)
    lse = math.log(2) * (anchor + torch.log2(total))
    entropy = math.log(2) * (torch.log2(total) - weighted / total)
    return tokens.gather(1, order), lse.float(), entropy.float()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("draws", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_parts_merge_to_the_whole(backend, draws, temperature):
    hidden, weight = inputs(4, 700, 24)
    rng = sk.Philox(torch.arange(4), torch.arange(4) + 3) if draws else None
    op = sk.head_sample if draws else sk.head_topk
    whole = op(
        hidden, weight, 6, temperature=temperature, backend=backend, **({"rng": rng} if draws else {})
    )  # fmt: skip
    parts = []
    for first, last in ((0, 100), (100, 100), (100, 613), (613, 700)):
        ids = torch.arange(first, last, dtype=torch.int32)
        parts.append(
            sk.head_part(
                hidden, weight[first:last], 6, rng=rng, token_ids=ids, temperature=temperature, backend=backend
            )
        )
        assert parts[-1].keys.dtype == parts[-1].sums.dtype == torch.float64
    tokens, lse, entropy = merged(parts, 6)
    assert tokens.equal(whole.tokens)
    torch.testing.assert_close((lse, entropy), (whole.lse, whole.entropy), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_without_a_distribution(backend):
    hidden, weight = inputs(3, 20, 8)
    hidden[1, 2] = math.nan
    bias = torch.full((20,), -math.inf)
    part = sk.head_part(hidden, weight, 2, backend=backend)
    assert part.sums[1, 1].isnan() and (part.tokens[1] == -1).all() and (part.tokens[[0, 2]] >= 0).all()
    part = sk.head_part(hidden[:1], weight, 2, bias=bias, backend=backend)
    assert part.sums[0].tolist() == [-math.inf, 0.0, 0.0] and (part.tokens == -1).all()
    assert (part.logits == -math.inf).all() and (part.keys == -math.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["int8", "int4", "fp8"])
def test_a_quantised_weight_without_columns(backend, form):
    head = sk.quantize_head(torch.zeros(5, 0), form)
    got = sk.head_topk(torch.zeros(2, 0), head, 2, backend=backend)
    assert got.tokens.tolist() == [[0, 1], [0, 1]] and (got.logits == 0).all()
