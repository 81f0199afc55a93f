"""What happens among the siblings of one node: which is accepted, and what is drawn from if none is.

Each rule takes one level of the walk for a batch of requests:
    p      [B, V] target distribution at the node
    q      [B, V] log weights of the draft distribution at the node, None where every draft token was a point mass
    x      [B, C] int64 tokens of the draws, in the order in which they are tried
    mask   [B, C] which draws exist
    draws  names each draw for `coins`
and returns
    accepted  [B] int64 column of the accepted draw, -1 if none
    rest      [B, V] the distribution of the token that is emitted if the walk ends here
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rows import draft_of, normalised, without

_BISECTIONS = 60


def _at(distribution: Tensor, token: Tensor) -> Tensor:
    return distribution.gather(1, token[:, None])[:, 0]


def multi_round(p, q, x, mask, draws, coins, *, replacement: bool = True):
    """Draw after draw, subtracting what was tried from what is left (SpecInfer; without replacement: RSD).

    One draw is the chain rule of Leviathan et al.; point masses make it the rule for any deterministic siblings.
    """
    rest = p
    accepted = torch.full_like(x[:, 0], -1) if x.shape[1] else torch.full((len(p),), -1, device=p.device)
    for j in range(x.shape[1]):
        token = x[:, j]
        trying = mask[:, j] & (accepted < 0)
        drafted = draft_of(q, token, like=p)
        hit = coins.accept(draws, j, _at(drafted, token), _at(rest, token), trying)
        accepted = torch.where(trying & hit, j, accepted)
        rejected = trying & ~hit
        rest = torch.where(rejected[:, None], normalised((rest - drafted).clamp(min=0), p), rest)
        if q is not None and not replacement:
            q = without(q, token, rejected)
    return accepted, rest


def without_replacement(p, q, x, mask, draws, coins):
    """Recursive rejection (RSD): q loses each rejected token, so draws must be tried in the order drawn."""
    return multi_round(p, q, x, mask, draws, coins, replacement=False)


def target_only(p, q, x, mask, draws, coins):
    """One coin for all siblings: it falls into the running sum of their p, or past it (EAGLE-2)."""
    return _pick(p, p, x, mask, draws, draws.parent, coins)


def _pick(weights, fallback, x, mask, draws, node, coins):
    """Accept draw j with probability weights[x_j] (a repeated token adds nothing); else what is outside the draws.

    One coin decides, that of `node`.
    """
    outside, gains = weights, []
    for j in range(x.shape[1]):
        token = x[:, j]
        gains.append(torch.where(mask[:, j], _at(outside, token), 0.0))
        outside = torch.where(mask[:, j : j + 1], outside.scatter(1, token[:, None], 0.0), outside)
    if not gains:
        return torch.full((len(weights),), -1, device=weights.device), weights
    accepted = coins.pick(draws, node, torch.stack(gains, 1), mask)
    return accepted, normalised(outside, fallback)


def k_seq(p, q, x, mask, draws, coins):
    """Each draw against q scaled by rho, the scale at which k draws lose no mass (SpecTr, section 5)."""
    k = mask.sum(1, keepdim=True).to(torch.float64)
    P, Q = p.double(), q.softmax(1).double()

    def overlap(rho):
        return torch.minimum(Q, P / rho).sum(1, keepdim=True)

    low, high = torch.ones_like(k), k.clamp(min=1.0)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        beta = overlap(middle)
        above = 1 - (1 - beta) ** k > middle * beta
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    rho, beta = high, overlap(high)  # the upper end: there the residual cannot be negative
    reached = 1 - (1 - beta) ** k
    accepted = torch.full((len(p),), -1, device=p.device)
    for j in range(x.shape[1]):
        token = x[:, j]
        trying = mask[:, j] & (accepted < 0)
        scaled = (rho[:, 0] * _at(Q, token)).to(p.dtype)
        hit = coins.accept(draws, j, scaled, _at(p, token), trying)
        accepted = torch.where(trying & hit, j, accepted)
    taken = torch.where(beta > 0, torch.minimum(Q, P / rho) * (reached / beta), 0.0)
    return accepted, normalised((P - taken).clamp(min=0), P).to(p.dtype)


def greedy_multi(p, q, x, mask, draws, coins):
    """The top k-1 tokens of q and one draw of the rest of q (Hu et al.): optimal for that draft.

    The draw is tested against the rest of q. The residual may still give a top token: one coin picks among them, and
    what is outside them is left for the final draw.
    """
    if not x.shape[1]:
        return torch.full((len(p),), -1, device=p.device), p
    last = mask.sum(1) - 1
    column = torch.arange(x.shape[1], device=x.device)
    is_draw, is_top = mask & (column == last[:, None]), mask & (column < last[:, None])
    tops = torch.zeros_like(p).scatter_add(1, x, is_top.to(p.dtype)) > 0
    accepted, residual = multi_round(p, q.masked_fill(tops, -torch.inf), x, is_draw, draws, coins)
    residual = torch.where((last >= 0)[:, None], residual, p)
    picked, outside = _pick(residual, p, x, is_top & (accepted < 0)[:, None], draws, draws.nodes[:, 0], coins)
    return torch.where(accepted >= 0, accepted, picked), outside
