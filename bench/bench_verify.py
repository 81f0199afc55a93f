"""Chain verification against plain torch, at the vocabulary of Llama-3.

`plain` is what engines do: softmax of all rows, gather, residual, multinomial, vectorised over the batch. `careful` is
the best that torch gives: the same in preallocated buffers, and one uniform and an inverse CDF instead of multinomial.
With filters `careful` sorts each row once, and `careful_topk` takes `torch.topk`, which serves while top_k is small.
They take the residual of only the one row per request that is drawn from, and leave out what the op also does: ragged
chains, checks of broken rows. Run with pinned threads:
OMP_PROC_BIND=true OMP_PLACES=cores python -m pytest bench/bench_verify.py -s
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from common import compare
from filters import keep_by_sort, keep_by_topk
from torch import Tensor

import specdec_kernels as sk

VOCABULARY, DRAFTS, TRIMMED = 128256, 4, 32000
NOISE = 0.75  # between the logits of drafter and target: 0.7 of the drafts are accepted
FILTERED = sk.SamplingParams(top_k=50, top_p=0.9)


class Problem(NamedTuple):
    tokens: Tensor  # [B, K+1] int32
    target: Tensor  # [N, V]
    draft: Tensor  # [N, V]
    accept: Tensor  # [N]
    final: Tensor  # [B]
    vocab: Tensor | None = None  # [R], then draft is [N, R]

    def arguments(self):
        batch, width = self.tokens.shape
        return self.tokens.view(-1), torch.arange(batch + 1, dtype=torch.int32) * width, self.target, self.draft

    def options(self):
        uniforms = {"accept_uniforms": self.accept, "final_uniforms": self.final}
        return {"max_depth": self.tokens.shape[1] - 1, "draft_vocab": self.vocab, **uniforms}


def problem(batch: int, dtype: torch.dtype, params: sk.SamplingParams | None = None) -> Problem:
    generator = torch.Generator().manual_seed(3)  # of few requests, too, a typical number of drafts is accepted
    nodes = batch * (DRAFTS + 1)
    target = torch.randn(nodes, VOCABULARY, generator=generator).mul_(3)
    draft = torch.randn(nodes, VOCABULARY, generator=generator).mul_(NOISE).add_(target).to(dtype)
    tokens = torch.zeros(nodes, dtype=torch.int32)
    for i in range(nodes - 1):
        row = draft[i : i + 1].float()
        if params is not None:
            row = keep_by_topk(row.clone(), row, params)
        tokens[i + 1] = inverse_cdf(row.softmax(1), torch.rand(1, 1, generator=generator))[0, 0]
    uniforms = torch.rand(nodes + batch, generator=generator)
    return Problem(tokens.view(batch, -1), target.to(dtype), draft, uniforms[:nodes], uniforms[nodes:])


def inverse_cdf(mass: Tensor, u: Tensor) -> Tensor:
    cdf = mass.cumsum(1)
    return torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp_(max=mass.shape[1] - 1)


def multinomial(mass: Tensor, u: Tensor) -> Tensor:
    return torch.multinomial(mass, 1)


def finish(p: Tensor, q: Tensor, case: Problem, draw) -> Tensor:
    """[B, K+1] tokens from probabilities [B, K+1, V] of both models."""
    batch, width = case.tokens.shape
    drafts = case.tokens[:, 1:].long()
    px = p[:, :-1].gather(2, drafts[:, :, None])[:, :, 0]
    qx = q[:, :-1].gather(2, drafts[:, :, None])[:, :, 0]
    accepted = (case.accept.view(batch, width)[:, 1:] * qx < px).cumprod(1).sum(1)
    rows = torch.arange(batch)
    mass = p[rows, accepted]
    rejected = accepted < width - 1
    mass[rejected] = mass[rejected].sub_(q[rows[rejected], accepted[rejected]]).clamp_(min=0)
    tokens = torch.cat([drafts, torch.full((batch, 1), -1)], 1)
    tokens[torch.arange(width) >= accepted[:, None]] = -1
    return tokens.scatter_(1, accepted[:, None], draw(mass, case.final[:, None]))


def plain(case: Problem) -> Tensor:
    shape = (*case.tokens.shape, VOCABULARY)
    p = torch.softmax(case.target, 1, dtype=torch.float32).view(shape)
    q = torch.softmax(case.draft, 1, dtype=torch.float32).view(shape)
    return finish(p, q, case, multinomial)


def careful(case: Problem, p: Tensor, q: Tensor) -> Tensor:
    torch.softmax(case.target, 1, dtype=torch.float32, out=p)
    torch.softmax(case.draft, 1, dtype=torch.float32, out=q)
    shape = (*case.tokens.shape, VOCABULARY)
    return finish(p.view(shape), q.view(shape), case, inverse_cdf)


def scattered(case: Problem, p: Tensor, q: Tensor) -> Tensor:
    """`careful` for a drafter with a trimmed vocabulary: its probabilities are scattered back to V."""
    torch.softmax(case.target, 1, dtype=torch.float32, out=p)
    q.zero_().index_copy_(1, case.vocab.long(), torch.softmax(case.draft, 1, dtype=torch.float32))
    shape = (*case.tokens.shape, VOCABULARY)
    return finish(p.view(shape), q.view(shape), case, inverse_cdf)


def filtered(case: Problem, p: Tensor, q: Tensor, keep) -> Tensor:
    """`careful` with the filters of `FILTERED` on both models."""
    for rows, logits in ((p, case.target), (q, case.draft)):
        torch.softmax(keep(rows.copy_(logits), logits, FILTERED), 1, out=rows)
    shape = (*case.tokens.shape, VOCABULARY)
    return finish(p.view(shape), q.view(shape), case, inverse_cdf)


def bytes_of_rows(case: Problem, number: Tensor) -> int:
    """Bytes of the rows that the walks read, once each."""
    drafted = number.clamp(max=DRAFTS).sum() * case.draft.shape[1] * case.draft.element_size()
    return int(number.sum() * VOCABULARY * case.target.element_size() + drafted)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


CASES = [(dtype, batch) for dtype in (torch.float32, torch.bfloat16) for batch in (1, 8, 32)]
FEW = [(dtype, batch) for dtype, batch in CASES if batch < 32]  # sorting is slow
IDS, FEW_IDS = ([f"{name(dtype)}-B{batch}" for dtype, batch in cases] for cases in (CASES, FEW))


def measure(benchmark, case: Problem, baselines: dict, rounds: int = 15, **options) -> None:
    arguments, options = case.arguments(), case.options() | options

    def candidate():
        return sk.verify_chain(*arguments, **options)

    result = candidate()
    benchmark.extra_info["tokens_per_request"] = result.num_tokens.float().mean().item()
    # Read elsewhere, the limit leaves the caches as it finds them for everyone.
    memory = torch.zeros_like(case.target)
    read = bytes_of_rows(case, result.num_tokens) if options.get("method") != "greedy" else 0
    compare(benchmark, candidate, baselines, memory=memory if read else None, bytes_read=read, rounds=rounds)


@pytest.mark.parametrize(("dtype", "batch"), CASES, ids=IDS)
def test_token(benchmark, dtype, batch):
    case = problem(batch, dtype)
    p, q = torch.empty(case.target.shape), torch.empty(case.target.shape)
    found = sk.verify_chain(*case.arguments(), **case.options())
    assert torch.equal(careful(case, p, q)[:, :DRAFTS] >= 0, found.tokens[:, :DRAFTS] >= 0)  # the same work
    baselines = {"plain": lambda: plain(case), "careful": lambda: careful(case, p, q)}
    measure(benchmark, case, baselines)


@pytest.mark.parametrize(("dtype", "batch"), CASES, ids=IDS)
def test_token_with_a_trimmed_draft(benchmark, dtype, batch):
    case = problem(batch, dtype)
    generator = torch.Generator().manual_seed(1)
    drafted = case.tokens.reshape(-1).unique().int()
    others = torch.randperm(VOCABULARY, generator=generator)[: TRIMMED - len(drafted)].int()
    vocab = torch.cat([drafted, others]).unique()
    case = case._replace(draft=case.draft[:, vocab.long()], vocab=vocab)
    p, q = torch.empty(case.target.shape), torch.empty(case.target.shape)
    measure(benchmark, case, {"careful_scattered": lambda: scattered(case, p, q)})


@pytest.mark.parametrize(("dtype", "batch"), FEW, ids=FEW_IDS)
def test_token_with_top_k_and_top_p(benchmark, dtype, batch):
    case = problem(batch, dtype, FILTERED)
    p, q = torch.empty(case.target.shape), torch.empty(case.target.shape)
    baselines = {
        "careful": lambda: filtered(case, p, q, keep_by_sort),
        "careful_topk": lambda: filtered(case, p, q, keep_by_topk),
    }
    options = {"params": FILTERED, "draft_params": FILTERED}
    found = sk.verify_chain(*case.arguments(), **case.options(), **options)
    for other in baselines.values():
        assert torch.equal(other(), found.tokens.long())
    measure(benchmark, case, baselines, rounds=15 if batch == 1 else 5, **options)


@pytest.mark.parametrize(("dtype", "batch"), CASES, ids=IDS)
def test_greedy(benchmark, dtype, batch):
    case = problem(batch, dtype)
    width = case.tokens.shape[1]
    case = case._replace(tokens=case.draft.argmax(1).roll(1).int().view(-1, width))

    def finish_greedy(top: Tensor) -> Tensor:
        top = top.view(-1, width)
        accepted = (top[:, :-1] == case.tokens[:, 1:]).cumprod(1).sum(1)
        return top.masked_fill(torch.arange(width) > accepted[:, None], -1)

    baselines = {
        "argmax": lambda: finish_greedy(case.target.argmax(1)),
        "max": lambda: finish_greedy(case.target.max(1).indices),  # several times faster than argmax in bf16
    }
    found = sk.verify_chain(*case.arguments(), max_depth=DRAFTS, method="greedy")
    assert torch.equal(baselines["argmax"]().int(), found.tokens)
    measure(benchmark, case, baselines, method="greedy")
