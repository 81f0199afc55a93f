"""Walks over one request's tree: from the root down, and along the target's argmax, given rates or typical tokens.

Every walk returns where it ended and what is left of p there. Paths are vectors over depth, so a walk keeps all its
state in registers.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .coins import accept_coin
from .request import judged
from .rows import Lse, entropy, is_sound, logits_at, logprob, no_lse, prob, row_at
from .rules import greedy_multi, k_seq, multi_round, target_only
from .tree import next_child
from .weights import Left, open_row, untouched

EPSILON = tl.constexpr(0.09)  # Medusa, arXiv 2401.10774, section 2.3.1
DELTA = tl.constexpr(0.3)


class Walk(NamedTuple):
    """Where a walk ended."""

    node: tl.tensor  # int32 local node whose row the last token comes from
    depth: tl.tensor  # int32, accepted tokens
    p: Lse  # of that node's rows
    q: Lse
    left: Left
    sound: tl.tensor  # int1, whether every row that was read holds a distribution
    path: tl.tensor  # [WIDTH] int32 node that follows each depth; from `depth` on anything
    logprobs: tl.tensor  # [WIDTH] fp32 their log-probabilities


@triton.jit
def token_logprob(rows, i, found, token):
    """Log-probability of `token` in row i, whose Lse is `found`."""
    row = row_at(rows, i, found.cut)
    return logprob(row, found, logits_at(row, token, token >= 0, token), token)


@triton.jit
def at(vector, lane, index):
    """The element of `vector` at `index`."""
    return tl.sum(tl.where(lane == index, vector, 0), 0)


@triton.jit
def walk_down(r, sound, METHOD: tl.constexpr, EXCLUDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """From the root, let a rule decide among the children until it accepts none of them."""
    lane = tl.arange(0, WIDTH)
    path = tl.zeros([WIDTH], tl.int32)
    values = tl.full([WIDTH], float("nan"), tl.float32)
    node = tl.full((), 0, tl.int32)
    depth = node
    p, q, left = no_lse(), no_lse(), untouched(node)
    walking = sound
    while walking:
        below = next_child(r.tree, node, node)
        inner = (below >= 0) & (depth < r.tree.depth)
        p = open_row(r.target, r.first + node, r.tree.vocabulary, BLOCK)
        sound = is_sound(p)
        if r.draft.data is not None:  # noqa: SIM102 (decided when compiling; the next at run time)
            if sound & inner:
                q = open_row(r.draft, r.first + node, r.tree.vocabulary, BLOCK)
                sound = is_sound(q)
        left = untouched(node)
        accepted = node * 0 - 1
        if sound & inner:
            if METHOD == "k_seq":
                accepted, left, q = k_seq(r, node, p, q, BLOCK)
            elif METHOD == "target_only":
                accepted, left, q = target_only(r, node, p, q, BLOCK)
            elif METHOD == "greedy_multi":
                accepted, left, q = greedy_multi(r, node, p, q, BLOCK)
            else:
                accepted, left, q = multi_round(r, node, p, q, METHOD == "multi_round", EXCLUDE, BLOCK)
        walking = sound & (accepted >= 0)
        if walking:
            token = tl.load(r.tree.tokens + accepted)
            values = tl.where(lane == depth, token_logprob(r.target, r.first + node, p, token), values)
            path = tl.where(lane == depth, accepted, path)
            node = accepted
            depth += 1
    return Walk(node=node, depth=depth, p=p, q=q, left=left, sound=sound, path=path, logprobs=values)


@triton.jit
def walk_greedy(r, sound, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Follow the target's argmax; log-probabilities are those of the point mass."""
    lane = tl.arange(0, WIDTH)
    path = tl.zeros([WIDTH], tl.int32)
    values = tl.full([WIDTH], float("nan"), tl.float32)
    node = tl.full((), 0, tl.int32)
    depth = node
    p = no_lse()
    walking = sound
    while walking:
        p = open_row(r.target, r.first + node, r.tree.vocabulary, BLOCK)
        sound = is_sound(p)
        accepted = node * 0 - 1
        child = tl.where(sound & (depth < r.tree.depth), next_child(r.tree, node, node), -1)
        while child >= 0:
            token = tl.load(r.tree.tokens + child)
            if (token == p.best) | judged(r, child):
                accepted = child
                values = tl.where(lane == depth, tl.where(token == p.best, 0.0, -float("inf")), values)
                child = node * 0 - 1
            else:
                child = next_child(r.tree, node, child)
        walking = accepted >= 0
        if walking:
            path = tl.where(lane == depth, accepted, path)
            node = accepted
            depth += 1
    return Walk(
        node=node, depth=depth, p=p, q=no_lse(), left=untouched(node), sound=sound, path=path, logprobs=values
    )  # fmt: skip


@triton.jit
def walk_by_rate(r, sound, LOGPROBS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """LOSSY, for load tests: at depth d the first child is accepted where its coin is below synthetic[d].

    Rows on the way are read only where log-probabilities are asked for.
    """
    lane = tl.arange(0, WIDTH)
    path = tl.zeros([WIDTH], tl.int32)
    values = tl.full([WIDTH], float("nan"), tl.float32)
    node = tl.full((), 0, tl.int32)
    depth = node
    p = no_lse()
    walking = sound
    while walking:
        child = tl.where(depth < r.tree.depth, next_child(r.tree, node, node), -1)
        if child >= 0:
            accepted = accept_coin(r.coins, child, 0) < tl.load(r.synthetic + depth)
            child = tl.where(accepted, child, -1)
        if (child < 0) | LOGPROBS:
            p = open_row(r.target, r.first + node, r.tree.vocabulary, BLOCK)
            sound = is_sound(p)
        walking = sound & (child >= 0)
        if walking:
            if LOGPROBS:
                token = tl.load(r.tree.tokens + child)
                values = tl.where(lane == depth, token_logprob(r.target, r.first + node, p, token), values)
            path = tl.where(lane == depth, child, path)
            node = child
            depth += 1
    return Walk(
        node=node, depth=depth, p=p, q=no_lse(), left=untouched(node), sound=sound, path=path, logprobs=values
    )  # fmt: skip


@triton.jit
def walk_typical(r, sound, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """LOSSY (Medusa): the longest path on which every token has p(x) > min(eps, delta exp(-H(p))), first among equals.

    Depth first, so that what was found of the rows between the root and the current node are vectors over depth.
    """
    lane = tl.arange(0, WIDTH)
    path = tl.zeros([WIDTH], tl.int32)
    longest = path
    values = tl.full([WIDTH], float("nan"), tl.float32)
    kept_values = values
    bars, tops, masses, cuts = values, values, values, values
    bests = path
    node = tl.full((), 0, tl.int32)
    depth, end, end_depth, after = node, node, node, node
    bar = no_lse().top
    p = no_lse()
    read = node > 0
    finding = sound
    walking = sound
    while walking:
        child = tl.where(finding & (depth < r.tree.depth), next_child(r.tree, node, after), -1)
        if ((child >= 0) | ~finding) & ~read:
            p = open_row(r.target, r.first + node, r.tree.vocabulary, BLOCK)
            sound = is_sound(p)
            read = sound
            if finding & sound:
                spread = entropy(row_at(r.target, r.first + node, p.cut), p, r.tree.vocabulary, BLOCK)
                bar = tl.minimum(DELTA * tl.exp(-spread), EPSILON)
        walking = sound & finding
        if walking:
            if child >= 0:
                after = child
                token = tl.load(r.tree.tokens + child)
                target = row_at(r.target, r.first + node, p.cut)
                x = logits_at(target, token, token >= 0, token)
                if (prob(target, p, x, token) > bar) | judged(r, child):
                    here = lane == depth
                    bars, tops = tl.where(here, bar, bars), tl.where(here, p.top, tops)
                    masses, cuts = tl.where(here, p.mass, masses), tl.where(here, p.cut, cuts)
                    bests = tl.where(here, p.best, bests)
                    values = tl.where(here, logprob(target, p, x, token), values)
                    path = tl.where(here, child, path)
                    depth += 1
                    node = child
                    read = read & False
                    if (depth > end_depth) | ((depth == end_depth) & (node < end)):
                        end, end_depth = node, depth
                        longest, kept_values = path, values
            elif depth > 0:
                after = node
                depth -= 1
                node = at(path, lane, depth - 1)  # 0 at depth 0: the root
                p = Lse(
                    top=at(tops, lane, depth), best=at(bests, lane, depth), mass=at(masses, lane, depth),
                    cut=at(cuts, lane, depth),
                )  # fmt: skip
                bar = at(bars, lane, depth)
                read = sound
            else:  # all paths were seen
                finding = finding & False
                read = read & (end == node)
                node = end
    return Walk(
        node=end, depth=end_depth, p=p, q=no_lse(), left=untouched(end), sound=sound, path=longest, logprobs=kept_values
    )  # fmt: skip
