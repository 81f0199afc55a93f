"""What one draft token claims at its parent, and what its rejection leaves there.

A draft row of mass 0, or none, stands for point masses: whatever token is asked for had all the mass, and its rejection
takes it out of p.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import Lse, column_of, logits_at, lse, prob
from .tree import children_tokens
from .weights import Left, factors, mass, untouched, weight


@triton.jit
def contains(out, token):
    """Whether `token` is among the tokens `out`."""
    return tl.max((out == token).to(tl.int32), 0) > 0


@triton.jit
def target_prob(target, p, token):
    """p(token)."""
    return prob(target, p, logits_at(target, token, token >= 0, token), token)


@triton.jit
def chance(draft, q, token):
    """The probability with which `token` was drafted."""
    if draft.data is None:
        return tl.full((), 1.0, tl.float32)
    else:
        column, present = column_of(draft, token)
        value = tl.where(present, prob(draft, q, logits_at(draft, column, present, token), column), 0.0)
        return tl.where(q.mass > 0, tl.minimum(value, 1.0), 1.0)


@triton.jit
def odds(r, node, token, left, target, p, draft, q, EXCLUDE: tl.constexpr):
    """(what is left of p at `token` as a probability, the probability with which `token` was drafted)."""
    q_x = chance(draft, q, token)
    c, d = factors(left)
    p_x = weight(target_prob(target, p, token), q_x, c, d) / left.m.to(tl.float32)
    if EXCLUDE:
        gone = contains(children_tokens(r.tree, node, left.since, left.until), token)
        p_x = tl.where(gone, 0.0, p_x)
        if draft.data is not None:
            q_x = tl.where(gone & (q.mass > 0), 0.0, q_x)
    return p_x, q_x


@triton.jit
def reject(r, node, child, w, left, target, p, draft, q, EXCLUDE: tl.constexpr, BLOCK: tl.constexpr):
    """(Left after the rejection of `child`, of path weight `w`; the share of the mass that is left).

    The share is 0 where nothing is: that has probability 0, but rounding may reach it, and then p stands in.
    """
    c, out = left.c, None
    if draft.data is not None:
        c = tl.where(q.mass > 0, c + left.m / w, c)
    if EXCLUDE:
        out = children_tokens(r.tree, node, left.since, child)
    after = Left(c=c, d=left.d, m=left.m, since=left.since, until=child)
    m = mass(after, target, p, draft, q, out, BLOCK)
    some = m > 0
    fresh = untouched(child)
    after = Left(
        c=tl.where(some, c, fresh.c), d=left.d, m=tl.where(some, m, fresh.m),
        since=tl.where(some, left.since, fresh.since), until=child,
    )  # fmt: skip
    return after, tl.where(some, m / left.m, fresh.c)


@triton.jit
def without(draft, q, out, V, BLOCK: tl.constexpr):
    """Lse of a draft row that has lost the tokens `out`; mass 0 where nothing is left."""
    column, present = column_of(draft, out)
    column = tl.where(present, column, -1)
    found = lse(draft, V, column, BLOCK)
    point = tl.where(contains(column, q.best), 0.0, q.mass)
    return Lse(
        top=tl.where(draft.greedy, q.top, found.top), best=q.best,
        mass=tl.where(draft.greedy, point, found.mass), cut=q.cut,
    )  # fmt: skip


@triton.jit
def remove(r, node, child, q_of_child, left, draft, q, kept, BLOCK: tl.constexpr):
    """(Left, Lse, kept) after the draft's distribution lost `child`, as draws without replacement do.

    `kept` is the share that is left of the mass that was last summed. While it is large the mass follows from it; later
    differences would lose their digits.
    """
    share = 1.0 - q_of_child.to(tl.float64)
    c, top, total = left.c, q.top, q.mass
    if total > 0:
        kept *= share
        if kept > 0.25:
            total = (total * share).to(tl.float32)
        else:
            out = children_tokens(r.tree, node, node + 1, child)
            found = without(draft, q, out, r.tree.vocabulary, BLOCK)
            share = (found.mass / total * tl.exp((found.top - top) * draft.inverse_temperature)).to(tl.float64)
            top, total = found.top, found.mass
            kept = kept * 0.0 + 1.0
        c *= share
    after = Left(c=c, d=left.d, m=left.m, since=left.since, until=left.until)
    return after, Lse(top=top, best=q.best, mass=total, cut=q.cut), kept
