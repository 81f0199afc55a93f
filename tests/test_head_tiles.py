"""Tiles of the CPU head: any batch, grouping and number of threads gives each request the bits that it gets alone."""

from __future__ import annotations

import os
import sys

import pytest
import torch

import specdec_kernels as sk
from head_cases import check_ranking, inputs, logits64
from specdec_kernels import backends
from verify_backends import in_another_process

MISSING = backends.MISSING["cpu"]
TIERS = [] if MISSING else sys.modules["specdec_kernels._C"].tiers()
pytestmark = [pytest.mark.native, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# V, D: less than a tile, remainders of rows and of columns, whole blocks and stretches, several of each.
SHAPES = [(1, 1), (5, 33), (111, 60), (731, 64), (245, 1100)]


def same_bits(got, want):
    for name, a, b in zip(got._fields, got, want, strict=True):
        if a is not None:
            kind = torch.int64 if a.dtype == torch.float64 else torch.int32
            assert torch.equal(a.view(kind), b.view(kind)), f"{name}:\n{a}\nexpected\n{b}"


def of(answer, requests):
    return type(answer)(*(x if x is None else x[requests] for x in answer))


def stream(batch: int) -> sk.Philox:
    return sk.Philox(torch.arange(batch) + 3, torch.arange(batch) * 7)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_batch_gives_the_bits_of_one(shape, dtype):
    most = 64
    hidden, weight = inputs(most, *shape, dtype)
    alone = [sk.head_topk(hidden[b : b + 1], weight, 4, return_logits=True, backend="cpu") for b in range(most)]
    alone = sk.HeadTopK(*(torch.cat(parts) for parts in zip(*alone, strict=True)))
    torch.testing.assert_close(alone.all_logits.double(), logits64(hidden, weight), rtol=1e-5, atol=1e-4)
    for batch in range(2, most + 1):
        first = (7 * batch) % (most - batch + 1)
        part = slice(first, first + batch)
        same_bits(sk.head_topk(hidden[part], weight, 4, return_logits=True, backend="cpu"), of(alone, part))


def test_batches_beyond_a_run():
    hidden, weight = inputs(150, 500, 60)
    want = sk.head_sample(hidden[64:], weight, 3, rng=sk.Philox(*(x[64:] for x in stream(150)[:2])), backend="cpu")
    same_bits(of(sk.head_sample(hidden, weight, 3, rng=stream(150), backend="cpu"), slice(64, None)), want)


@DTYPES
@pytest.mark.parametrize("sizes", [[1], [5, 1, 1, 9], [70, 3], [1] * 20, [16, 17]], ids=str)
def test_groups_are_requests_with_rows_of_their_own(sizes, dtype):
    """Runs of every kind of tile, lines that come back later, and ones that do not exist."""
    height, count = 611, 260
    generator = torch.Generator().manual_seed(len(sizes))
    lines = torch.stack([torch.randperm(height, generator=generator)[:count] for _ in range(3)]).to(torch.int32)
    lines[1, 200:] = -1
    names = [[0, 1, 2, 0, 3, -1, 2**31 - 1][i % 7] for i in range(len(sizes))]
    groups = torch.tensor([name for name, size in zip(names, sizes, strict=True) for _ in range(size)]).to(torch.int32)
    hidden, weight = inputs(len(groups), height, 60, dtype)
    bias, rng = torch.randn(height, generator=generator), stream(len(groups))
    there = (groups >= 0) & (groups < 3)
    rows = torch.where(there[:, None], lines[groups.clamp(0, 2).long()], -1)
    for op, rest in ((sk.head_topk, {"return_logits": True}), (sk.head_sample, {"rng": rng}), (sk.head_part, {})):
        rest = {"bias": bias, "temperature": 0.6, "backend": "cpu"} | rest
        got = op(hidden, weight, 6, rows=lines, row_groups=groups, **rest)
        same_bits(got, op(hidden, weight, 6, rows=rows, **rest))
        assert (got.tokens[~there] == -1).all() and (got.tokens[there] >= 0).all()
    keys = logits64(hidden[there], weight, rows[there].clamp(min=0), bias=bias).masked_fill(rows[there] < 0, -1e9)
    ids = torch.where(rows[there] < 0, height + torch.arange(count), rows[there])
    check_ranking(sk.head_topk(hidden, weight, 6, rows=lines, row_groups=groups, bias=bias).tokens[there], keys, ids)


def test_threads_share_requests_with_rows_of_their_own():
    hidden, weight = inputs(40, 900, 200)
    lines = torch.randint(0, 900, (9, 500), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    groups = (torch.arange(40) // 5).to(torch.int32)
    threads, answers = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3, 16):
            torch.set_num_threads(number)
            answers.append(
                sk.head_part(hidden, weight, 9, rows=lines, row_groups=groups, rng=stream(40), backend="cpu")
            )
    finally:
        torch.set_num_threads(threads)
    for answer in answers[1:]:
        same_bits(answer, answers[0])


@DTYPES
@pytest.mark.parametrize("batch", [1, 3, 4, 7, 16, 21])
def test_a_broken_neighbour_changes_no_bit(batch, dtype):
    hidden, weight = inputs(batch + 1, 300, 1100, dtype)
    want = sk.head_topk(hidden, weight, 5, return_logits=True, backend="cpu")
    for place in {0, batch // 2, batch}:
        dirty = hidden.clone()
        dirty[place, -1] = float("nan")
        others = [b for b in range(batch + 1) if b != place]
        got = sk.head_topk(dirty, weight, 5, return_logits=True, backend="cpu")
        same_bits(of(got, others), of(want, others))
        assert got.lse[place].isnan() and (got.tokens[place] == -1).all()


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_rows_that_are_not_named_are_not_read(batch):
    hidden, weight = inputs(batch, 700, 1100, torch.bfloat16)
    rows = torch.arange(0, 700, 3, dtype=torch.int32)
    want = sk.head_topk(hidden, weight, 5, rows=rows, return_logits=True, backend="cpu")
    weight[1::3] = weight[2::3][: len(weight[1::3])] = float("nan")
    same_bits(sk.head_topk(hidden, weight, 5, rows=rows, return_logits=True, backend="cpu"), want)


@pytest.mark.skipif("SPECDEC_CPU_ISA" in os.environ, reason="this process is for one instruction set already")
@pytest.mark.parametrize("isa", TIERS[:-1])
def test_in_every_other_tier(isa):
    only = "every_batch or (groups and (5 or 70)) or beyond_a_run"
    assert in_another_process(__file__, "-k", only, SPECDEC_CPU_ISA=isa) >= 20
