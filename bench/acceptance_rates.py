"""How often one node's k draft tokens are accepted: closed forms, what no verifier can exceed, and the ops themselves.

`p` and `q` are [V] fp64 distributions of target and drafter at one node. Every function returns [K] fp64, entry k - 1
for k siblings, so that one call gives a whole curve.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdec_kernels import optimal_acceptance

ACCURACY = 1e-7  # of all that is here, for comparisons
STEP = 0.5  # of the logarithm of time
_BISECTIONS = 60


def multi_round(p: Tensor, q: Tensor, most: int) -> Tensor:
    """1 - prod_i (1 - sum min(P_i, q)), P_1 = p and P_{i+1} = norm((P_i - q)+) (SpecInfer, arXiv 2305.09781)."""
    missed, rates, rest = 1.0, [], p
    for _ in range(most):
        missed *= 1 - float(torch.minimum(rest, q).sum())
        rates.append(1 - missed)
        left = (rest - q).clamp(min=0)
        rest = left / left.sum() if left.sum() > 0 else p
    return torch.tensor(rates, dtype=torch.float64)


def k_seq(p: Tensor, q: Tensor, most: int) -> Tensor:
    """1 - (1 - sum min(q, p / rho))^k at the rho at which k draws lose no mass (SpecTr, 2310.15141, section 5)."""
    k = torch.arange(1, most + 1, dtype=torch.float64)
    low, high = torch.ones_like(k), k.clone()

    def accepted(rho: Tensor) -> tuple[Tensor, Tensor]:
        beta = torch.stack([torch.minimum(q, p / r).sum() for r in rho])
        return 1 - (1 - beta) ** k, rho * beta

    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        reached, needed = accepted(middle)
        low, high = torch.where(reached > needed, middle, low), torch.where(reached > needed, high, middle)
    return accepted(high)[0]


def target_only(p: Tensor, q: Tensor, most: int) -> Tensor:
    """The p of the k best tokens of q, which stand for any siblings that are a function of the context."""
    return p[tops(q, most)].cumsum(0)


def greedy_multi(p: Tensor, q: Tensor, most: int) -> Tensor:
    """p(Top) + sum outside Top of min(p, q'), Top = the k - 1 best of q, q' = the rest of q (2502.18779)."""
    top, rest, rates = tops(q, most), q.clone(), []
    for k in range(most):
        rest[top[:k]] = 0
        total = rest.sum()
        drawn = torch.minimum(p, rest / total).sum() if total > 0 else 0.0
        rates.append(p[top[:k]].sum() + drawn)
    return torch.stack(rates)


def tops(q: Tensor, count: int) -> Tensor:
    """The `count` best tokens of q, the lower id first among equals."""
    return q.sort(descending=True, stable=True).indices[:count]


def optimum(p: Tensor, q: Tensor, most: int) -> Tensor:
    """The best that any lossless verifier can do with k i.i.d. draws (alpha*)."""
    return torch.stack([optimal_acceptance(p, q, k) for k in range(1, most + 1)])


def bound_without_replacement(p: Tensor, q: Tensor, most: int, block: int = 256) -> Tensor:
    """An upper bound on what any lossless verifier can do with k draws without replacement.

    Every set H of tokens bounds it: `p(H) + 1 - PL(H)`, with PL(H) the chance that all k draws lie in H. The least over
    all sets is the optimum; here H runs over the prefixes of the tokens in descending order of q/p, so the result may
    be above it. The sum that stands for the integral is right to about 1e-8.

    Draws without replacement are the order of exponential clocks of rates q. All k lie in H iff k clocks of H ring
    before the first of the others, whose rate is s = 1 - q(H): PL(H) = int s exp(-s t) P(k clocks of H by t) dt. The
    number of clocks that rang is a sum of independent coins; its law for all prefixes is two passes over the tokens,
    the first within blocks. The integral over log t is a sum of equal steps, whose error falls as exp(-pi^2 / step).
    Prefixes with s below 1e-6 are left out, for which t would have to run on (a bound needs no particular set), but for
    all that q can draw: PL = 1.
    """
    order = torch.where(p > 0, q / p, torch.inf).argsort(descending=True)
    p, q = p[order], q[order]
    # Zeros behind the end change no sum and no clock.
    size = -len(p) % block
    p, q = (torch.nn.functional.pad(x, (0, size)).view(-1, block) for x in (p, q))
    left = (1 - q.flatten().cumsum(0)).clamp(min=0).view_as(q)
    inside = p.flatten().cumsum(0).view_as(p)
    t = torch.arange(-9.5, 17.5, STEP, dtype=torch.float64).exp()

    def ring(counts: Tensor, column: int) -> None:
        """Add the clocks of one column to the laws [most, blocks, T] of how many rang (fewer than `most`)."""
        silent = torch.exp(-q[:, column, None] * t)
        rang = counts[:-1] * (1 - silent)
        counts.mul_(silent)
        counts[1:] += rang

    of_block = torch.zeros(most, len(q), len(t), dtype=torch.float64)
    of_block[0] = 1
    for column in range(block):
        ring(of_block, column)
    before = torch.zeros_like(of_block)
    before[0, 0] = 1
    for index in range(1, len(q)):
        for n in range(most):
            before[n, index] = (before[: n + 1, index - 1] * of_block[: n + 1, index - 1].flip(0)).sum(0)
    best = torch.full((most,), float(p[q > 0].sum()) - 1, dtype=torch.float64)  # H = all that can be drawn
    for column in range(block):
        ring(before, column)
        rate = left[:, column, None]
        weight = STEP * rate * t * torch.exp(-rate * t)  # dt = t d(log t)
        fewer = torch.einsum("nbt,bt->nb", before, weight).cumsum(0)
        all_inside = weight.sum(1) - fewer
        gap = torch.where(rate[:, 0] > 1e-6, inside[:, column] - all_inside, 0.0)
        best = torch.minimum(best, gap.amin(1))
    return 1 + best
