"""Traversal verification (arXiv 2505.12398); on a chain it is block verification (Sun et al., 2403.10444).

Leaves come in depth-first order. A node's weight is fixed when the walk enters it and changes only when a child of it
is rejected, so all state is one frame for each node between the root and the current one: vectors over depth.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .coins import accept_coin
from .rejection import odds, reject, remove
from .rows import Lse, is_sound, no_lse, row_at
from .tree import next_child
from .walks import Walk, at, token_logprob
from .weights import Left, open_row, untouched


class Frames(NamedTuple):
    """[WIDTH] vectors over depth: what is known of each node above the current one."""

    p: Lse
    q: Lse
    left: Left  # d is always 1
    kept: tl.tensor  # see rules.remove
    w: tl.tensor  # fp32, the share of the node's probability that its draft can still claim


@triton.jit
def pushed(vector, here, value):
    """`vector` with `value` in the lanes `here`."""
    return tl.where(here, value, vector)


@triton.jit
def push(frames, here, p, q, left, kept, w):
    """The frames with the current node's in the lanes `here`."""
    f = frames
    return Frames(
        p=Lse(
            top=pushed(f.p.top, here, p.top), best=pushed(f.p.best, here, p.best),
            mass=pushed(f.p.mass, here, p.mass), cut=pushed(f.p.cut, here, p.cut),
        ),
        q=Lse(
            top=pushed(f.q.top, here, q.top), best=pushed(f.q.best, here, q.best),
            mass=pushed(f.q.mass, here, q.mass), cut=pushed(f.q.cut, here, q.cut),
        ),
        left=Left(
            c=pushed(f.left.c, here, left.c), d=f.left.d, m=pushed(f.left.m, here, left.m),
            since=pushed(f.left.since, here, left.since), until=pushed(f.left.until, here, left.until),
        ),
        kept=pushed(f.kept, here, kept), w=pushed(f.w, here, w),
    )  # fmt: skip


@triton.jit
def claim(w, p, q):
    """min(1, w p / q): a token that q never draws claims all that p can give."""
    ratio = tl.where(q > 0, p / tl.where(q > 0, q, 1.0), tl.where(p > 0, 1e38, 0.0))
    return tl.minimum(w * ratio, 1.0)


@triton.jit
def hold(surplus, w):
    """S / (S + 1 - w), what remains of a weight when all below it was rejected; 0/0 has probability 0."""
    whole = surplus + 1.0 - w
    return tl.where(whole > 0, surplus / tl.where(whole > 0, whole, 1.0), 0.0).to(tl.float32)


@triton.jit
def walk_traversal(
    r, sound, REPLACEMENT: tl.constexpr, EXCLUDE: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Leaves first, each rejection handing its share back to the parent."""
    lane = tl.arange(0, WIDTH)
    path = tl.zeros([WIDTH], tl.int32)
    values = tl.full([WIDTH], float("nan"), tl.float32)
    real, whole, wide = tl.zeros([WIDTH], tl.float32), path, tl.zeros([WIDTH], tl.float64)
    frames = Frames(
        p=Lse(top=real, best=whole, mass=real, cut=real), q=Lse(top=real, best=whole, mass=real, cut=real),
        left=Left(c=wide, d=untouched(tl.full((), 0, tl.int32)).d, m=wide, since=whole, until=whole),
        kept=wide, w=real,
    )  # fmt: skip
    node = tl.full((), 0, tl.int32)
    depth, after = node, node
    p, q, left = no_lse(), no_lse(), untouched(node)
    kept = left.m
    w = (left.m).to(tl.float32)
    read = node > 0  # whether p is that of `node`
    ended = read
    walking = sound
    while walking:
        child = tl.where(~ended & (depth < r.tree.depth), next_child(r.tree, node, after), -1)
        rejected = node * 0 - 1
        if ((child >= 0) | (depth == 0) | ended) & ~read:
            p = open_row(r.target, r.first + node, r.tree.vocabulary, BLOCK)
            sound = is_sound(p)
            if r.draft.data is not None:  # noqa: SIM102 (decided when compiling; the next at run time)
                if sound & (child >= 0):
                    q = open_row(r.draft, r.first + node, r.tree.vocabulary, BLOCK)
                    sound = is_sound(q)
            left = untouched(node)
            kept = left.m
            read = sound
        walking = sound & ~ended & ((child >= 0) | (depth > 0))
        if walking:
            if child >= 0:
                target, draft = row_at(r.target, r.first + node, p.cut), row_at(r.draft, r.first + node, q.cut)
                token = tl.load(r.tree.tokens + child)
                p_x, q_x = odds(r, node, token, left, target, p, draft, q, EXCLUDE)
                claimed = claim(w, p_x, q_x)
                if claimed > 0:  # else nothing below it is read
                    here = lane == depth
                    frames = push(frames, here, p, q, left, kept, w)
                    values = tl.where(here, token_logprob(r.target, r.first + node, p, token), values)
                    path = tl.where(here, child, path)
                    depth += 1
                    node, after, w = child, child, claimed
                    read = read & False
                else:
                    rejected = child
            elif accept_coin(r.coins, node, 0) < w:
                ended = depth > 0
                walking = ~read
            else:
                rejected = node
                depth -= 1
                node = at(path, lane, depth - 1)  # 0 at depth 0: the root
                f = frames
                p = Lse(
                    top=at(f.p.top, lane, depth), best=at(f.p.best, lane, depth), mass=at(f.p.mass, lane, depth),
                    cut=at(f.p.cut, lane, depth),
                )  # fmt: skip
                q = Lse(
                    top=at(f.q.top, lane, depth), best=at(f.q.best, lane, depth), mass=at(f.q.mass, lane, depth),
                    cut=at(f.q.cut, lane, depth),
                )  # fmt: skip
                left = Left(
                    c=at(f.left.c, lane, depth), d=f.left.d, m=at(f.left.m, lane, depth),
                    since=at(f.left.since, lane, depth), until=at(f.left.until, lane, depth),
                )  # fmt: skip
                kept, w = at(f.kept, lane, depth), at(f.w, lane, depth)
                read = sound
            if rejected >= 0:
                target, draft = row_at(r.target, r.first + node, p.cut), row_at(r.draft, r.first + node, q.cut)
                token = tl.load(r.tree.tokens + rejected)
                _, q_x = odds(r, node, token, left, target, p, draft, q, EXCLUDE)
                left, share = reject(r, node, rejected, w.to(tl.float64), left, target, p, draft, q, EXCLUDE, BLOCK)
                w = tl.where(depth > 0, hold(share * w, w), w)
                after = tl.where(w > 0, rejected, 2147483647)  # without weight no further child is accepted
                if not REPLACEMENT and r.draft.data is not None:  # noqa: SIM102 (decided when compiling; the next at run time)
                    if (share > 0) & (next_child(r.tree, node, rejected) >= 0):
                        left, q, kept = remove(r, node, rejected, q_x, left, draft, q, kept, BLOCK)
    return Walk(node=node, depth=depth, p=p, q=q, left=left, sound=sound, path=path, logprobs=values)
