"""The drafter's head against what a user has today: F.linear on a weight that is already trimmed, topk, logsumexp.

V = 128256, the head of Llama-3, with D = 2048 and 4096; k = 8. Run with pinned threads:
OMP_PROC_BIND=true OMP_PLACES=cores python -m pytest bench/bench_head.py -s
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from common import compare

import specdec_kernels as sk

DIM, VOCABULARY, TRIMMED, K = 4096, 128256, 32000, 8
BF16, FP32 = torch.bfloat16, torch.float32


@functools.lru_cache(maxsize=1)
def weight(dtype: torch.dtype, dim: int = DIM) -> torch.Tensor:
    """[V, D] with logits of standard deviation about 3: slices of the first one's numbers, moved along by columns."""
    first = torch.randn(4096, dim, generator=torch.Generator().manual_seed(0)).mul_(3 / dim**0.5).to(dtype)
    full = torch.empty(VOCABULARY, dim, dtype=dtype)
    for i, part in enumerate(full.split(len(first))):
        part.copy_(first.roll(i, 1)[: len(part)])
    return full


@functools.lru_cache(maxsize=1)
def trimmed(dtype: torch.dtype, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of a trimmed vocabulary, ascending and scattered over all of it, and the weight's rows of them."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randperm(VOCABULARY, generator=generator)[:TRIMMED].sort().values.to(torch.int32)
    return rows, weight(dtype, dim).index_select(0, rows)


def hidden(batch: int, dtype: torch.dtype, dim: int = DIM) -> torch.Tensor:
    return torch.randn(batch, dim, generator=torch.Generator().manual_seed(2)).to(dtype)


def torch_topk(x, w):
    logits = F.linear(x, w).float()
    return torch.topk(logits, K), torch.logsumexp(logits, -1)


def torch_draw(x, w, uniforms):
    """One draw by inverse CDF, which is several times faster than multinomial."""
    logits = F.linear(x, w).float()
    cumulative = torch.softmax(logits, -1).cumsum_(-1)
    return torch.searchsorted(cumulative, uniforms * cumulative[:, -1:]), torch.logsumexp(logits, -1)


def cases(*listed: tuple[torch.dtype, int, tuple[int, ...]]):
    """Parametrises dtype, dim and batch; the weights are made in the order of the list."""
    every = [(dtype, dim, batch) for dtype, dim, batches in listed for batch in batches]
    names = [f"{str(dtype).removeprefix('torch.')}-D{dim}-B{batch}" for dtype, dim, batch in every]
    return pytest.mark.parametrize(("dtype", "dim", "batch"), every, ids=names)


@cases(
    (BF16, 4096, (1, 2, 3, 4, 6, 8, 12, 16, 64)),
    (BF16, 2048, (1, 2, 4, 8, 16)),
    (FP32, 2048, (1, 4, 16)),
    (FP32, 4096, (1, 2, 4, 8, 16)),
)
def test_topk_of_the_whole_vocabulary(benchmark, dtype, dim, batch):
    x, w = hidden(batch, dtype, dim), weight(dtype, dim)
    # Beyond a few hidden vectors arithmetic is the limit, and reading for its own sake only takes time.
    limit = {"memory": w, "bytes_read": w.nbytes} if batch <= 4 else {}
    # What memory gives a shared machine changes by half within seconds, and with it what is measured: rounds go on for
    # long enough to meet both kinds of them, so that each candidate has its best.
    rounds = 100 if batch == 1 else 20 if dtype == BF16 else 5
    compare(
        benchmark,
        lambda: sk.head_topk(x, w, K),
        {"linear_topk_lse": lambda: torch_topk(x, w)},
        rounds=rounds,
        **limit,
    )


@cases((FP32, 4096, (1, 4)), (BF16, 4096, (1, 4, 16)), (BF16, 2048, (1, 4, 16)))
def test_topk_of_gathered_rows(benchmark, dtype, dim, batch):
    x, w = hidden(batch, dtype, dim), weight(dtype, dim)
    rows, copy = trimmed(dtype, dim)
    gathered = torch.empty_like(copy)

    def gather_and_linear():
        torch.index_select(w, 0, rows, out=gathered)
        return torch_topk(x, gathered)

    compare(
        benchmark,
        lambda: sk.head_topk(x, w, K, rows=rows),
        {"linear_on_a_trimmed_copy": lambda: torch_topk(x, copy), "index_select_and_linear": gather_and_linear},
        memory=copy,
        bytes_read=copy.nbytes,
        rounds=12,
    )


@cases((BF16, 2048, (1, 16)), (BF16, 4096, (1, 4, 16)))
def test_topk_of_a_trimmed_copy(benchmark, dtype, dim, batch):
    x = hidden(batch, dtype, dim)
    rows, copy = trimmed(dtype, dim)
    compare(
        benchmark,
        lambda: sk.head_topk(x, copy, K, token_ids=rows),
        {"linear_topk_lse": lambda: torch_topk(x, copy)},
        memory=copy,
        bytes_read=copy.nbytes,
        rounds=12,
    )


@cases((BF16, 4096, (1, 4, 16)))
def test_draws_of_the_whole_vocabulary(benchmark, dtype, dim, batch):
    x, w = hidden(batch, dtype, dim), weight(dtype, dim)
    rng = sk.Philox(torch.arange(batch), torch.arange(batch))
    uniforms = torch.rand(batch, 1, generator=torch.Generator().manual_seed(3))
    compare(
        benchmark,
        lambda: sk.head_sample(x, w, 1, rng=rng),
        {"linear_inverse_cdf": lambda: torch_draw(x, w, uniforms), "head_topk": lambda: sk.head_topk(x, w, K)},
        rounds=5,
    )
