"""Residual weights: what the rejections at a node leave of the target's distribution there.

They are p - min(c q, d p), 0 at tokens that are out. c and d are two numbers of the node; d is 1 but for K-SEQ, and
then the weight is (p - c q)+. So nothing of the vocabulary's size is kept of a residual.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .cut import cut
from .rows import Lse, block_columns, is_sound, logits_at, lse, prob, row_at, struck

LARGEST = tl.constexpr(1e30)  # of c: finite, so that c * 0 is 0
NOT_SUMMED = tl.constexpr(-1.0)  # m of a residual that is summed only if something is drawn from it


class Left(NamedTuple):
    """What is left of p at a node: the weights of (c, d) without the children `since`..`until`, divided by m."""

    c: tl.tensor  # fp64
    d: tl.tensor  # fp64
    m: tl.tensor  # fp64, sum of the weights, or NOT_SUMMED
    since: tl.tensor  # int32 local nodes: the tokens of this node's children among them are out
    until: tl.tensor


@triton.jit
def untouched(node):
    """Left of a node of which nothing was tried."""
    one = tl.full((), 1.0, tl.float64)
    return Left(c=one - one, d=one, m=one, since=node + 1, until=node)


@triton.jit
def open_row(rows, i, V, BLOCK: tl.constexpr):
    """Lse of row i after its filters."""
    row = row_at(rows, i, -float("inf"))
    found = lse(row, V, None, BLOCK)
    if rows.top_k is not None:
        filters = (rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0)
        if filters & ~row.greedy & is_sound(found):
            at, mass = cut(row, found, rows.temperature, rows.top_k, rows.top_p, rows.min_p, V, BLOCK)
            if mass > 0:
                found = Lse(top=found.top, best=found.best, mass=mass, cut=at)
            elif at > -float("inf"):
                found = lse(row_at(rows, i, at), V, None, BLOCK)
    return found


@triton.jit
def weight(p, q, c, d):
    """The weight p - min(c q, d p); products are rounded before the difference."""
    return p - tl.minimum(c * q, d * p)


@triton.jit
def weights_block(start, cursor, c, d, target, p_found, draft, q_found, out, BLOCK: tl.constexpr):
    """(weights of the tokens start .. start+BLOCK-1, the next block's cursor).

    `out` are tokens without weight, None for none. The target is not greedy: then its token is known.
    """
    v = start + tl.arange(0, BLOCK)
    inside = v < target.size
    weights = prob(target, p_found, logits_at(target, v, inside, v), v)
    if draft.data is not None:  # noqa: SIM102 (decided when compiling; the next at run time)
        if c > 0:
            column, present, cursor = block_columns(draft, start, cursor, v, inside, BLOCK)
            q = tl.where(present, prob(draft, q_found, logits_at(draft, column, present, v), column), 0.0)
            weights = weight(weights, q, c, d)
    if out is not None:
        weights = struck(weights, out, start, 0.0, BLOCK)
    return weights, cursor


@triton.jit
def factors(left):
    """The factors c and d as fp32."""
    return tl.minimum(left.c, LARGEST).to(tl.float32), left.d.to(tl.float32)


@triton.jit
def mass(left, target, p_found, draft, q_found, out, BLOCK: tl.constexpr):
    """Sum of the weights, in fp64 over block sums."""
    c, d = factors(left)
    total = tl.full((), 0.0, tl.float64)
    cursor = 0
    for start in range(0, target.size, BLOCK):
        weights, cursor = weights_block(start, cursor, c, d, target, p_found, draft, q_found, out, BLOCK)
        total += tl.sum(weights, 0).to(tl.float64)
    return total


@triton.jit
def draw(ticket, left, target, p_found, draft, q_found, out, BLOCK: tl.constexpr):
    """The first token at which the running sum of the weights exceeds `ticket`, fp64 in [0, mass).

    Block sums find the block, a scan of that block finds the token. Where rounding leaves the scan at or under the
    ticket, the last token with weight is drawn, never one without.
    """
    c, d = factors(left)
    lane = tl.arange(0, BLOCK)
    before = tl.full((), 0.0, tl.float64)
    token = p_found.best
    cursor = 0
    start = 0
    while start < target.size:
        weights, cursor = weights_block(start, cursor, c, d, target, p_found, draft, q_found, out, BLOCK)
        last = tl.max(tl.where(weights > 0, lane, -1), 0)
        token = tl.where(last >= 0, start + last, token)
        after = before + tl.sum(weights, 0).to(tl.float64)
        if after > ticket:
            above = (tl.cumsum(weights, 0) > (ticket - before).to(tl.float32)) & (weights > 0)
            token = start + tl.min(tl.where(above, lane, last), 0)
            start = target.size
        else:
            before = after
            start += BLOCK
    return token


@triton.jit
def overlap(rho, target, p_found, draft, q_found, BLOCK: tl.constexpr):
    """(sum of min(q, p / rho), the part of it where p / rho is the smaller), in fp64 over block sums."""
    both = tl.full((), 0.0, tl.float64)
    capped = tl.full((), 0.0, tl.float64)
    cursor = 0
    for start in range(0, target.size, BLOCK):
        v = start + tl.arange(0, BLOCK)
        inside = v < target.size
        p = prob(target, p_found, logits_at(target, v, inside, v), v).to(tl.float64) / rho
        column, present, cursor = block_columns(draft, start, cursor, v, inside, BLOCK)
        q = tl.where(present, prob(draft, q_found, logits_at(draft, column, present, v), column), 0.0).to(tl.float64)
        both += tl.sum(tl.minimum(q, p), 0)
        capped += tl.sum(tl.where(p < q, p, 0.0), 0)
    return both, capped
