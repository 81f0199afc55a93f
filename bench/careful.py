"""Tree verification in plain PyTorch, written with care: what the CPU kernels are measured against.

Everything is vectorised over the batch; probabilities go to fp32 buffers that are allocated once; one uniform and an
inverse CDF draw the last token; rows of leaves, of which q is never needed, are left out. `AllRows` makes all
probabilities first, as the engines do, because a GPU cannot wait to see which rows a walk needs. `VisitedRows` makes
those of the next level when a walk gets there, which is as little work as whole tensor operations allow.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from problems import Problem
from torch import Tensor

from specdec_kernels import SamplingParams


class AllRows:
    """Probabilities of the first `used` nodes of all trees, made at once."""

    def __init__(self, logits: Tensor, batch: int, used: int, params: SamplingParams, keep=None):
        self.logits, self.used, self.params, self.keep = logits.view(batch, -1, logits.shape[1]), used, params, keep
        self.buffer = torch.empty(batch, used, logits.shape[1])

    def begin(self) -> None:
        """What is done before the walk."""
        logits = self.logits[:, : self.used]
        if self.keep is None:
            torch.softmax(logits, 2, dtype=torch.float32, out=self.buffer)
        else:
            rows = self.buffer.copy_(logits).view(-1, logits.shape[2])
            torch.softmax(self.keep(rows, logits.reshape(rows.shape), self.params), 1, out=rows)

    def __call__(self, requests: Tensor, nodes: Tensor) -> Tensor:
        """[A, V] of one node of each of A requests, which the caller may change."""
        if len(requests) == 1:
            return self.buffer[int(requests), int(nodes)][None]
        return self.buffer[requests, nodes]


class VisitedRows:
    """Probabilities of the rows that are asked for."""

    def __init__(self, logits: Tensor, batch: int, used: int, params: SamplingParams, keep=None):
        self.logits, self.params, self.keep = logits.view(batch, -1, logits.shape[1]), params, keep
        self.buffer = torch.empty(batch, logits.shape[1])

    def begin(self) -> None:
        """Nothing is done before the walk."""

    def __call__(self, requests: Tensor, nodes: Tensor) -> Tensor:
        """[A, V] of one node of each of A requests, which the caller may change."""
        rows = self.buffer[: len(requests)]
        one = len(requests) == 1
        logits = self.logits[int(requests), int(nodes)][None] if one else self.logits[requests, nodes]
        if self.keep is None:
            return torch.softmax(logits, 1, dtype=torch.float32, out=rows)
        return torch.softmax(self.keep(rows.copy_(logits), logits, self.params), 1, out=rows)


def inverse_cdf(mass: Tensor, u: Tensor) -> Tensor:
    """[A] token at `u` [A] of unnormalised `mass` [A, V]."""
    cdf = mass.cumsum(1)
    return torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).clamp_(max=mass.shape[1] - 1)[:, 0]


class Level(NamedTuple):
    """The children of one node of each of A requests."""

    tokens: Tensor  # [A, c] int64, -1 where there is none
    coins: Tensor  # [A, c]
    parent_coin: Tensor  # [A]


def siblings_in_order(P: Tensor, Q: Tensor, level: Level, *, replacement: bool) -> Tensor:
    """[A] column that is accepted, -1 if none; `P` [A, V] becomes what is left. Multi-round, or without replacement."""
    accepted = torch.full((len(P),), -1)
    width = level.tokens.shape[1]
    for j in range(width):
        token = level.tokens[:, j : j + 1].clamp(min=0)
        trying = (level.tokens[:, j] >= 0) & (accepted < 0)
        hit = trying & (level.coins[:, j] * Q.gather(1, token)[:, 0] < P.gather(1, token)[:, 0])
        accepted[hit] = j
        rejected = (trying & ~hit).nonzero()[:, 0]
        if not len(rejected):
            continue
        everyone = len(rejected) == len(P)  # then nothing is copied
        p, q = (P, Q) if everyone else (P[rejected], Q[rejected])
        p.sub_(q).clamp_(min=0)
        p.div_(p.sum(1, keepdim=True))
        if not replacement and j + 1 < width:
            q.scatter_(1, token[rejected], 0.0)
            q.div_(q.sum(1, keepdim=True))
        if not everyone:
            P[rejected], Q[rejected] = p, q
    return accepted


def children_by_target(P: Tensor, Q: Tensor | None, level: Level) -> Tensor:
    """The same for target_only: one coin falls among the children's p, or past them."""
    token = level.tokens.clamp(min=0)
    gains = torch.where(level.tokens >= 0, P.gather(1, token), 0.0)
    reached = level.parent_coin[:, None] < gains.cumsum(1)
    accepted = torch.where(reached.any(1), reached.int().argmax(1), -1)
    P.scatter_reduce_(1, token, torch.where(level.tokens >= 0, 0.0, torch.inf), "amin")
    return accepted


def walk(case: Problem, children: Tensor, p: AllRows | VisitedRows, q: AllRows | VisitedRows | None, rule) -> Tensor:
    """[B, max_depth+1] int64 tokens that are committed, then -1. `children` is that of the problem."""
    batch, nodes = case.tokens.shape
    tokens, coins = case.tokens.long(), case.accept.view(batch, nodes)
    out = torch.full((batch, case.shape.max_depth + 1), -1)
    requests, here = torch.arange(batch), torch.zeros(batch, dtype=torch.int64)
    for rows in (p, q):
        if rows is not None:
            rows.begin()
    for depth in range(case.shape.max_depth + 1):
        leaf = children[here, 0] < 0
        if bool(leaf.any()):
            done = requests[leaf]
            out[done, depth] = inverse_cdf(p(done, here[leaf]), case.final[done])
            requests, here = requests[~leaf], here[~leaf]
        if not len(requests):
            break
        P = p(requests, here)
        kids, each = children[here], requests[:, None]
        level = Level(torch.where(kids >= 0, tokens[each, kids], -1), coins[each, kids], coins[requests, here])
        accepted = rule(P, None if q is None else q(requests, here), level)
        stop = accepted < 0
        if bool(stop.any()):
            out[requests[stop], depth] = inverse_cdf(P if bool(stop.all()) else P[stop], case.final[requests[stop]])
        here = kids.gather(1, accepted.clamp(min=0)[:, None])[~stop, 0]
        requests = requests[~stop]
        out[requests, depth] = tokens[requests, here]
    return out


def walk_greedy(case: Problem, children: Tensor) -> Tensor:
    """The same along the target's argmax; `max` finds it several times faster than `argmax` in bf16."""
    batch, nodes = case.tokens.shape
    best = case.target.max(1).indices.view(batch, nodes)
    out = torch.full((batch, case.shape.max_depth + 1), -1)
    requests, here = torch.arange(batch), torch.zeros(batch, dtype=torch.int64)
    for depth in range(case.shape.max_depth + 1):
        out[requests, depth] = best[requests, here]
        kids = children[here]
        same = (kids >= 0) & (case.tokens[requests[:, None], kids] == best[requests, here][:, None])
        go = same.any(1)
        here = kids.gather(1, same.int().argmax(1, keepdim=True))[go, 0]
        requests = requests[go]
    return out
