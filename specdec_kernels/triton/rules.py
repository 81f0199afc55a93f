"""What happens among the children of one node: which is accepted, and what is left to draw from if none is.

The rules are those of `specdec_kernels.reference.rules`. Each is asked at a node that has children, takes the Lse of
its rows and returns (the accepted child or -1, what is left of p, the draft's Lse as the rule leaves it).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .coins import accept_coin
from .rejection import chance, contains, odds, reject, remove, target_prob, without
from .request import accepts, draws_of, first_draw, judged, next_draw
from .rows import row_at
from .tree import children_tokens, last_child, next_child
from .weights import NOT_SUMMED, Left, mass, overlap, untouched

PRECISION = tl.constexpr(1e-8)  # of K-SEQ's scale, relative


@triton.jit
def multi_round(r, node, p, q, REPLACEMENT: tl.constexpr, EXCLUDE: tl.constexpr, BLOCK: tl.constexpr):
    """Draw after draw, subtracting what was tried from what is left (SpecInfer; without replacement: RSD)."""
    target, draft = row_at(r.target, r.first + node, p.cut), row_at(r.draft, r.first + node, q.cut)
    left = untouched(node)
    kept = left.m
    accepted = node * 0 - 1
    draw = first_draw(r, node)
    while (draw.child >= 0) & (accepted < 0):
        child = draw.child
        token = tl.load(r.tree.tokens + child)
        p_x, q_x = odds(r, node, token, left, target, p, draft, q, EXCLUDE)
        hit = accepts(r, child, accept_coin(r.coins, child, draw.repeat), q_x, p_x)
        accepted = tl.where(hit, child, accepted)
        draw = next_draw(r, node, draw)
        if ~(hit | target.greedy):  # of a greedy target nothing but its peak is ever left
            left, share = reject(r, node, child, left.d, left, target, p, draft, q, EXCLUDE, BLOCK)
            if not REPLACEMENT and draft.data is not None:  # noqa: SIM102 (decided when compiling; the next at run time)
                if (draw.child >= 0) & (share > 0):
                    left, q, kept = remove(r, node, child, q_x, left, draft, q, kept, BLOCK)
    return accepted, left, q


@triton.jit
def new_prob(r, node, child, gone, target, p):
    """Probability of the token of `child`; 0 where an earlier sibling had the token, or it is `gone`."""
    token = tl.load(r.tree.tokens + child)
    known = contains(children_tokens(r.tree, node, node + 1, child - 1), token) | (token == gone)
    return tl.where(known, 0.0, target_prob(target, p, token))


@triton.jit
def target_only(r, node, p, q, BLOCK: tl.constexpr):
    """One coin for all siblings: it falls into the running sum of their p, or past it (EAGLE-2)."""
    target = row_at(r.target, r.first + node, p.cut)
    u = accept_coin(r.coins, node, 0)
    running = u * 0.0
    accepted = node * 0 - 1
    until = node
    child = next_child(r.tree, node, node)
    while child >= 0:
        running += new_prob(r, node, child, -1, target, p)
        hit = (u < running) | judged(r, child)
        accepted = tl.where(hit, child, accepted)
        until = child
        child = tl.where(hit, -1, next_child(r.tree, node, child))
    left = untouched(node)
    return accepted, Left(c=left.c, d=left.d, m=NOT_SUMMED * left.m, since=left.since, until=until), q


@triton.jit
def reached(both, k):
    """The probability that one of k draws is accepted, each with probability `both`."""
    none = both * 0.0 + 1.0
    for _ in range(k):
        none *= 1.0 - both
    return 1.0 - none


@triton.jit
def scale(k, target, p, draft, q, BLOCK: tl.constexpr):
    """(rho, overlap there) of K-SEQ: the rho in [1, k] at which reached() = rho * overlap.

    Newton's method; a step that leaves the bracket halves it. Then rho rises until it lies on the side on which the
    residual cannot be negative.
    """
    rho = tl.full((), 1.0, tl.float64)
    low, high, margin = rho, rho * k, rho * PRECISION
    both = rho
    rounds = 0
    searching = k > 0
    refining = k > 1
    while searching:
        both, capped = overlap(rho, target, p, draft, q, BLOCK)
        hit = reached(both, k)
        excess = hit - rho * both
        refining = refining & (both > 0)
        if refining:
            low, high = tl.where(excess > 0, rho, low), tl.where(excess > 0, high, rho)
            fall = -capped / rho  # of the overlap
            slope = k * (1.0 - hit) / (1.0 - both) * fall - both - rho * fall
            step = rho - excess / slope
            step = tl.where((step > low) & (step < high), step, 0.5 * (low + high))
            rounds += 1
            refining = (tl.abs(step - rho) >= PRECISION * rho) & (high - low >= PRECISION) & (rounds < 64)
            rho = tl.where(refining, step, rho)
        if ~refining:
            searching = (excess > 0) & (rho < k)
            rho = tl.where(searching, tl.minimum(rho * (1.0 + margin), k), rho)
            margin *= 4.0
    return rho, both


@triton.jit
def k_seq(r, node, p, q, BLOCK: tl.constexpr):
    """Each draw against q scaled by rho, the scale at which k draws lose no mass (SpecTr, section 5)."""
    target, draft = row_at(r.target, r.first + node, p.cut), row_at(r.draft, r.first + node, q.cut)
    k, _ = draws_of(r.tree, node)
    left = untouched(node)
    rho, both = left.m, left.m
    if ~target.greedy:
        rho, both = scale(k, target, p, draft, q, BLOCK)
    accepted = node * 0 - 1
    draw = first_draw(r, node)
    while (draw.child >= 0) & (accepted < 0):
        child = draw.child
        token = tl.load(r.tree.tokens + child)
        scaled = (rho * chance(draft, q, token)).to(tl.float32)
        hit = accepts(r, child, accept_coin(r.coins, child, draw.repeat), scaled, target_prob(target, p, token))
        accepted = tl.where(hit, child, accepted)
        draw = next_draw(r, node, draw)
    taken = tl.where(both > 0, reached(both, k) / both, 0.0)
    left = Left(c=taken, d=taken / rho, m=NOT_SUMMED * left.m, since=left.since, until=left.until)
    return accepted, left, q


@triton.jit
def greedy_multi(r, node, p, q, BLOCK: tl.constexpr):
    """The top k-1 tokens of q and one draw of the rest of q (Hu et al.): optimal for that draft.

    The draw is tested against the rest of q. What that leaves may still give a top token: the first sibling's coin
    picks among them, and what is outside them is left for the final draw.
    """
    target, draft = row_at(r.target, r.first + node, p.cut), row_at(r.draft, r.first + node, q.cut)
    left = untouched(node)
    accepted = node * 0 - 1
    first, last = next_child(r.tree, node, node), last_child(r.tree, node)
    tops = children_tokens(r.tree, node, node + 1, last - 1)
    if first < last:
        q = without(draft, q, tops, r.tree.vocabulary, BLOCK)
    token = tl.load(r.tree.tokens + last)
    point = ~(q.mass > 0)
    q_x = tl.where(contains(tops, token) & ~point, 0.0, chance(draft, q, token))
    if accepts(r, last, accept_coin(r.coins, last, 0), q_x, target_prob(target, p, token)):
        accepted = last
    else:
        # The tops, of which the rest of q has nothing, keep their p; but they are out of what is left to draw from.
        gone = tl.where(point, token, -1)
        until = tl.where(point, last, last - 1)
        left = Left(c=tl.where(point, left.c, 1.0), d=left.d, m=left.m, since=left.since, until=until)
        outside, total = left.m, left.m
        if ~target.greedy:
            out = children_tokens(r.tree, node, left.since, until)
            outside = mass(left, target, p, draft, q, out, BLOCK)
            total = outside
            child = first
            while child < last:
                total += new_prob(r, node, child, gone, target, p).to(tl.float64)
                child = next_child(r.tree, node, child)
        nothing = ~(total > 0)  # of probability 0, but rounding may reach it; then p stands in
        gone = tl.where(nothing, -1, gone)
        left = Left(
            c=tl.where(nothing, 0.0, left.c), d=left.d, m=tl.where(nothing, NOT_SUMMED, outside), since=left.since,
            until=tl.where(nothing, last - 1, until),
        )  # fmt: skip
        total = tl.where(nothing, 1.0, total).to(tl.float32)
        u = accept_coin(r.coins, first, 0)
        running = u * 0.0
        child = first
        while child < last:
            running += new_prob(r, node, child, gone, target, p) / total
            hit = (u < running) | judged(r, child)
            accepted = tl.where(hit, child, accepted)
            child = tl.where(hit, last, next_child(r.tree, node, child))
    return accepted, left, q
