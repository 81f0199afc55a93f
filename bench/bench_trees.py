"""Retrieval drafts against prompt lookup as it is usually written: compare every window of the text with its end.

`lookup` is that in plain torch, at its best: the text stays in one preallocated int32 tensor, longest n-gram first, the
most recent match wins (transformers' `PromptLookupCandidateGenerator` makes the same comparisons). Both draft ten
tokens after one new token; the index also takes that token in. Run with pinned threads:
OMP_PROC_BIND=true OMP_PLACES=cores python -m pytest bench/bench_trees.py -s
"""

from __future__ import annotations

import pytest
import torch
from common import compare

from specdec_kernels.host import SuffixIndex

DRAFTS, LONGEST, STEPS = 10, 3, 20


def text_of(length: int) -> torch.Tensor:
    """Tokens with a natural text's frequencies, in which pieces come back."""
    generator = torch.Generator().manual_seed(0)
    ranks = torch.arange(1, 30_001, dtype=torch.float64)
    text = torch.multinomial(1 / ranks, length, replacement=True, generator=generator).to(torch.int32)
    for start in range(200, length - 100, 400):
        source = int(torch.randint(0, start - 60, (), generator=generator))
        text[start : start + 60] = text[source : source + 60].clone()
    return text


def lookup(text: torch.Tensor) -> torch.Tensor:
    for size in range(LONGEST, 0, -1):
        windows = text[:-1].unfold(0, size, 1)
        found = (windows == text[-size:]).all(1).nonzero()
        if len(found):
            end = int(found[-1]) + size
            return text[end : end + DRAFTS]
    return text[:0]


@pytest.mark.parametrize("length", [1_000, 8_000, 64_000])
def test_draft_after_each_token(benchmark, length):
    text = text_of(length + 100 * STEPS)
    index, upcoming = SuffixIndex(text[:length]), iter(text[length:].split(1))

    def candidate():
        for _ in range(STEPS):
            index.extend(next(upcoming))
            index.propose_chain(DRAFTS)

    def baseline():
        for end in range(length - STEPS, length):
            lookup(text[: end + 1])

    compare(benchmark, candidate, {"prompt_lookup": baseline})
