"""Quantised heads against the same head in bf16, and int4 against int8: all read the rows once, of fewer bytes.

V = 128256 rows, or 32000 gathered ones; k = 8. Weights are random bytes, which cost what any other do. Run with pinned
threads: OMP_PROC_BIND=true OMP_PLACES=cores python -m pytest bench/bench_head_quant.py -s
"""

from __future__ import annotations

import functools

import pytest
import torch
from common import compare

import specdec_kernels as sk

VOCABULARY, TRIMMED, K, GROUP = 128256, 32000, 8, 128
DIMS, BATCHES = [2048, 4096], [1, 2, 3, 4, 16]
# What each format is held against.
BASELINES = {"int8": ["bf16"], "int4": ["int8", "bf16"], "fp8": ["bf16"]}


@functools.lru_cache(maxsize=1)
def heads(dim: int) -> dict[str, torch.Tensor | sk.QuantizedHead]:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(-127, 128, (VOCABULARY, dim), dtype=torch.int8, generator=generator)
    scales = torch.rand(VOCABULARY, generator=generator) / (30 * dim**0.5)
    groups = torch.rand(VOCABULARY, dim // GROUP, generator=generator) / (2 * dim**0.5)
    bf16 = torch.empty(VOCABULARY, dim, dtype=torch.bfloat16)
    torch.mul(raw, 1 / (30 * dim**0.5), out=bf16)
    packed = torch.randint(0, 256, (VOCABULARY, dim // 2), dtype=torch.uint8, generator=generator)
    fp8 = raw.view(torch.uint8).bitwise_and(0xF7).view(torch.float8_e4m3fn)  # without codes of NaN
    return {
        "bf16": bf16,
        "int8": sk.QuantizedHead(raw.clone(), scales, dim),
        "int4": sk.QuantizedHead(packed, groups, dim),
        "fp8": sk.QuantizedHead(fp8, scales / 4, dim),
    }


@functools.lru_cache(maxsize=1)
def trimmed() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randperm(VOCABULARY, generator=generator)[:TRIMMED].sort().values.to(torch.int32)


def nbytes(head) -> int:
    return head.nbytes if isinstance(head, torch.Tensor) else head.values.nbytes + head.scales.nbytes


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("format", BASELINES)
@pytest.mark.parametrize("which", ["whole", "gathered"])
@pytest.mark.parametrize("dim", DIMS)
def test_topk(benchmark, dim, which, format, batch):
    x = torch.randn(batch, dim, generator=torch.Generator().manual_seed(2)).bfloat16()
    rows = trimmed() if which == "gathered" else None
    head = heads(dim)[format]
    share = 1.0 if rows is None else TRIMMED / VOCABULARY
    compare(
        benchmark,
        lambda: sk.head_topk(x, head, K, rows=rows),
        {name: lambda name=name: sk.head_topk(x, heads(dim)[name], K, rows=rows) for name in BASELINES[format]},
        memory=head.values,
        bytes_read=int(nbytes(head) * share),
        rounds=10 if rows is None else 20,
    )
