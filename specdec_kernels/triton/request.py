"""One request, as a walk sees it, and the draws at one of its nodes."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .coins import ORDER, Coins, stream_coin
from .rows import Rows
from .tree import Tree, next_child


class Request(NamedTuple):
    """Everything of one request."""

    tree: Tree
    target: Rows
    draft: Rows
    coins: Coins
    judge: tl.tensor  # pointer to the root's uint8 verdict, or None: LOSSY, accepts whatever the rule says
    synthetic: tl.tensor  # pointer to [max_depth] fp32 rates, or None: LOSSY
    lenience: tl.tensor  # fp32 factor of q in every test: LOSSY below 1
    first: tl.tensor  # int64 packed index of the root


class Draw(NamedTuple):
    """One draw at a node: a child, or one of the draws that were merged in it."""

    child: tl.tensor  # int32, -1 past the last draw
    repeat: tl.tensor  # int32, earlier draws that hit the same child
    step: tl.tensor  # int32, earlier draws at the node
    coming: tl.tensor  # [NODES] int32, draws of each child still to come; None where nothing was merged


@triton.jit
def judged(r, node):
    """Whether the judge accepts `node`."""
    if r.judge is None:
        return False
    else:
        return tl.load(r.judge + node) != 0


@triton.jit
def accepts(r, node, u, q, p):
    """The acceptance rule. Strict, so that a coin of 0 never accepts a token of probability 0."""
    return (u * (r.lenience * q) < p) | judged(r, node)


@triton.jit
def draws_of(tree, node):
    """How many draws were made at `node`, and [NODES] of them by child (None of a chain)."""
    if tree.parent is None:
        return (next_child(tree, node, node) >= 0).to(tl.int32), None
    else:
        coming = (tree.parent == node).to(tl.int32)
        if tree.draws is not None:
            coming *= tree.draws
        return tl.sum(coming, 0), coming


@triton.jit
def picked(r, node, step, coming):
    """Draw number `step` of merged ones, which come in a uniformly random order.

    i.i.d. draws are exchangeable, so that has the law of the order which merging forgot.
    """
    lane = tl.arange(0, coming.shape[0])
    total = tl.sum(coming, 0)
    coin = stream_coin(r.coins, ORDER, node, step)
    ticket = tl.minimum((coin * total.to(tl.float32)).to(tl.int32), total - 1)
    child = tl.min(tl.where(tl.cumsum(coming, 0) > ticket, lane, 2147483647), 0)
    here = (lane == child) & (coming > 0)
    repeat = tl.sum(tl.where(here, r.tree.draws - coming, 0), 0)
    coming = tl.where(here, coming - 1, coming)
    return Draw(child=tl.where(total > 0, child, -1), repeat=repeat, step=step, coming=coming)


@triton.jit
def first_draw(r, node):
    """The draw that is tried first at `node`."""
    zero = node * 0
    if r.tree.draws is None:
        return Draw(child=next_child(r.tree, node, node), repeat=zero, step=zero, coming=None)
    else:
        return picked(r, node, zero, draws_of(r.tree, node)[1])


@triton.jit
def next_draw(r, node, draw):
    """The draw that is tried after `draw`."""
    if r.tree.draws is None:
        return Draw(child=next_child(r.tree, node, draw.child), repeat=draw.repeat, step=draw.step, coming=None)
    else:
        return picked(r, node, draw.step + 1, draw.coming)
