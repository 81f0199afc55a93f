"""The best acceptance any lossless verifier can reach with k draft tokens: an oracle for tests and reports."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .checks import check_int

_DOUBLES = (torch.float32, torch.float64)
_LARGEST_EXACT_SEARCH = 8


def optimal_acceptance(p: Tensor, q: Tensor, k: int, *, replacement: bool = True) -> Tensor:
    """The optimal-transport bound on the probability that one of k drafts from q is accepted (Hu et al., 2502.18779).

    `alpha* = 1 + min over sets H of [p(H) - Pr(all drafts lie in H)]`. For i.i.d. drafts that probability is q(H)^k and
    the minimum is reached by a prefix of the tokens in descending order of q/p: O(V log V). Without replacement it is
    the Plackett-Luce probability, for which the prefixes are not enough, so every set is tried and V is at most 8.

    Args:
        p: [..., V] fp32 or fp64, target distributions.
        q: [..., V] of the same shape and dtype, draft distributions.
        k: number of drafts, >= 1.
        replacement: whether drafts are i.i.d.; else they are drawn without replacement.

    Returns:
        [...] fp64 acceptance probabilities.

    Raises:
        TypeError, ValueError: an argument that does not fit.
    """
    check_int("k", k, 1)
    for name, value in (("p", p), ("q", q)):
        if not isinstance(value, Tensor) or value.dtype not in _DOUBLES:
            raise TypeError(f"{name}: expected a float32 or float64 tensor, got {getattr(value, 'dtype', type(value))}")
    if p.ndim < 1 or p.shape != q.shape:
        raise ValueError(f"q: expected the shape of p {list(p.shape)}, got {list(q.shape)}")
    p, q = p.double(), q.double()
    if replacement:
        order = torch.where(p > 0, q / p, torch.inf).argsort(-1, descending=True)
        gap = p.gather(-1, order).cumsum(-1) - q.gather(-1, order).cumsum(-1).clamp(max=1.0) ** k
        return 1 + gap.amin(-1).clamp(max=0.0)
    V = p.shape[-1]
    if V > _LARGEST_EXACT_SEARCH or k > V:
        raise ValueError(f"q: without replacement expected k <= V <= {_LARGEST_EXACT_SEARCH}, got k={k}, V={V}")
    best = torch.zeros_like(p[..., 0])
    for subset in itertools.chain.from_iterable(itertools.combinations(range(V), n) for n in range(1, V + 1)):
        inside = torch.zeros_like(best)
        for draws in itertools.permutations(subset, k):
            chance, left = torch.ones_like(best), torch.ones_like(best)
            for x in draws:
                chance = chance * torch.where(left > 0, q[..., x] / left.clamp(min=1e-300), 0.0)
                left = left - q[..., x]
            inside = inside + chance
        best = torch.minimum(best, p[..., list(subset)].sum(-1) - inside)
    return 1 + best
