"""The drafter's head against what a user has today: F.linear on a weight that is already trimmed, topk, logsumexp.

D = 4096 and V = 128256, the head of Llama-3; k = 8. Run with pinned threads:
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


@functools.lru_cache(maxsize=1)
def weight(dtype: torch.dtype) -> torch.Tensor:
    """[V, D] with logits of standard deviation about 3, filled in slices so that no fp32 copy exists."""
    generator = torch.Generator().manual_seed(0)
    full = torch.empty(VOCABULARY, DIM, dtype=dtype)
    for part in full.split(4096):
        part.copy_(torch.randn(part.shape, generator=generator).mul_(3 / DIM**0.5))
    return full


@functools.lru_cache(maxsize=1)
def trimmed(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of a trimmed vocabulary, ascending and scattered over all of it, and the weight's rows of them."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randperm(VOCABULARY, generator=generator)[:TRIMMED].sort().values.to(torch.int32)
    return rows, weight(dtype).index_select(0, rows)


def hidden(batch: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(batch, DIM, generator=torch.Generator().manual_seed(2)).to(dtype)


def torch_topk(x, w):
    logits = F.linear(x, w).float()
    return torch.topk(logits, K), torch.logsumexp(logits, -1)


def torch_draw(x, w, uniforms):
    """One draw by inverse CDF, which is several times faster than multinomial."""
    logits = F.linear(x, w).float()
    cumulative = torch.softmax(logits, -1).cumsum_(-1)
    return torch.searchsorted(cumulative, uniforms * cumulative[:, -1:]), torch.logsumexp(logits, -1)


CASES = [(torch.bfloat16, 1), (torch.bfloat16, 4), (torch.bfloat16, 16), (torch.float32, 1), (torch.float32, 4)]
IDS = [f"{str(dtype).removeprefix('torch.')}-B{batch}" for dtype, batch in CASES]


@pytest.mark.parametrize(("dtype", "batch"), CASES, ids=IDS)
def test_topk_of_the_whole_vocabulary(benchmark, dtype, batch):
    x, w = hidden(batch, dtype), weight(dtype)
    compare(
        benchmark,
        lambda: sk.head_topk(x, w, K),
        {"linear_topk_lse": lambda: torch_topk(x, w)},
        memory=w,
        bytes_read=w.nbytes,
    )


@pytest.mark.parametrize(("dtype", "batch"), CASES, ids=IDS)
def test_topk_of_gathered_rows(benchmark, dtype, batch):
    x, w = hidden(batch, dtype), weight(dtype)
    rows, copy = trimmed(dtype)
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
        rounds=20,
    )


@pytest.mark.parametrize(("dtype", "batch"), CASES[:3], ids=IDS[:3])
def test_topk_of_a_trimmed_copy(benchmark, dtype, batch):
    x = hidden(batch, dtype)
    rows, copy = trimmed(dtype)
    compare(
        benchmark,
        lambda: sk.head_topk(x, copy, K, token_ids=rows),
        {"linear_topk_lse": lambda: torch_topk(x, copy)},
        memory=copy,
        bytes_read=copy.nbytes,
        rounds=20,
    )


@pytest.mark.parametrize(("dtype", "batch"), CASES[:3], ids=IDS[:3])
def test_draws_of_the_whole_vocabulary(benchmark, dtype, batch):
    x, w = hidden(batch, dtype), weight(dtype)
    rng = sk.Philox(torch.arange(batch), torch.arange(batch))
    uniforms = torch.rand(batch, 1, generator=torch.Generator().manual_seed(3))
    compare(
        benchmark,
        lambda: sk.head_sample(x, w, 1, rng=rng),
        {"linear_inverse_cdf": lambda: torch_draw(x, w, uniforms), "head_topk": lambda: sk.head_topk(x, w, K)},
        memory=w,
        bytes_read=w.nbytes,
    )
