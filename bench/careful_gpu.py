"""Verification in plain PyTorch as a GPU wants it: no synchronisation, no shape that depends on data.

So a request that has come to its end computes on, and `torch.where` throws the result away. All functions can be
captured in a CUDA graph and compiled as one graph; they run on a CPU, too, where the tests compare them with the ops.
"""

from __future__ import annotations

import torch
from problems import Problem
from torch import Tensor


def inverse_cdf(mass: Tensor, u: Tensor) -> Tensor:
    """[B] token at `u` [B] of unnormalised `mass` [B, V]."""
    cdf = mass.cumsum(-1)
    return torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0].clamp(max=mass.shape[1] - 1)


def chain(case: Problem) -> Tensor:
    """[B, K+1] tokens, then -1, of chains: softmax of all rows at once, since no row's fate is known before."""
    batch, width = case.tokens.shape
    p = case.target.float().softmax(-1).view(batch, width, -1)
    q = case.draft.float().softmax(-1).view(batch, width, -1)
    drafted = case.tokens[:, 1:, None].long()
    coins = case.accept.view(batch, width)[:, 1:]
    accepted = coins * q[:, :-1].gather(2, drafted)[..., 0] < p[:, :-1].gather(2, drafted)[..., 0]
    count = accepted.int().cumprod(1).sum(1)
    row = count[:, None, None].expand(-1, 1, p.shape[2])
    rest = p.gather(1, row)[:, 0] - torch.where((count < width - 1)[:, None], q.gather(1, row)[:, 0], 0.0)
    last = inverse_cdf(rest.clamp(min=0), case.final)
    step = torch.arange(width, device=count.device)
    shifted = torch.nn.functional.pad(drafted[..., 0], (0, 1), value=-1)
    return torch.where(step == count[:, None], last[:, None], torch.where(step < count[:, None], shifted, -1))


def tree(case: Problem, children: Tensor, *, replacement: bool) -> Tensor:
    """[B, max_depth+1] tokens, then -1, of trees: level after level, softmax of the rows that the walks are at."""
    batch, nodes = case.tokens.shape
    tokens, coins = case.tokens.long(), case.accept.view(batch, nodes)
    request = torch.arange(batch, device=tokens.device)
    here, walking = torch.zeros_like(request), torch.ones_like(request, dtype=torch.bool)
    out, rest = [], None
    for depth in range(case.shape.max_depth + 1):
        row = request * nodes + here
        P = case.target[row].float().softmax(-1)
        accepted = torch.full_like(here, -1)
        kids = children[here]
        if depth < case.shape.max_depth:
            Q = case.draft[row].float().softmax(-1)
            for j in range(children.shape[1]):
                node = kids[:, j].clamp(min=0)
                token = tokens.gather(1, node[:, None])
                trying = (kids[:, j] >= 0) & (accepted < 0)
                coin = coins.gather(1, node[:, None])
                hit = trying & (coin * Q.gather(1, token) < P.gather(1, token))[:, 0]
                accepted = torch.where(hit, j, accepted)
                rejected = (trying & ~hit)[:, None]
                left = (P - Q).clamp(min=0)
                P = torch.where(rejected, left / left.sum(1, keepdim=True), P)
                if not replacement:
                    others = Q.scatter(1, token, 0.0)
                    Q = torch.where(rejected, others / others.sum(1, keepdim=True), Q)
        rest = P if rest is None else torch.where(walking[:, None], P, rest)
        go = walking & (accepted >= 0)
        here = torch.where(go, kids.gather(1, accepted.clamp(min=0)[:, None])[:, 0], here)
        out.append(torch.where(go, tokens.gather(1, here[:, None])[:, 0], -1))
        walking = go
    path = torch.stack(out, 1)
    count = (path >= 0).sum(1)
    return path.scatter(1, count[:, None], inverse_cdf(rest, case.final)[:, None])
