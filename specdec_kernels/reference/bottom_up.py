"""Verifiers that look at a whole path or tree before they decide: block and traversal verification.

Both carry a weight w <= 1 of each node, the share of its probability that its draft can still claim. A node of w = 0 is
rejected with all below it, so no row there is read; what such rows hold cannot make a request unsound.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .coins import Coins, Draws
from .rows import Rows, draft_of, normalised, without
from .tree_view import TreeView


def _ratio(p: Tensor, q: Tensor) -> Tensor:
    """P / q where q > 0; a token that q never draws has all the weight p can give."""
    return torch.where(q > 0, p / torch.where(q > 0, q, 1.0), torch.where(p > 0, torch.inf, 0.0))


def _hold(w: Tensor, surplus: Tensor) -> Tensor:
    """S / (S + 1 - w), the share that remains when everything below was rejected; 0/0 has probability 0."""
    whole = surplus + 1 - w
    return torch.where(whole > 0, surplus / torch.where(whole > 0, whole, 1.0), 0.0)


def block(tree: TreeView, target: Rows, draft: Rows | None, coins: Coins):
    """Block verification of chains (Sun et al., 2403.10444): keep the longest prefix whose own coin says so."""
    batch = len(tree.starts)
    requests = torch.arange(batch, device=tree.starts.device)
    length = tree.valid.sum(1) - 1  # drafts of each chain
    w = torch.ones(batch, dtype=target.dtype, device=tree.starts.device)
    end = torch.zeros_like(length)
    sound = last_sound = torch.ones(batch, dtype=torch.bool, device=tree.starts.device)
    rests = None
    for i in range(tree.max_depth + 1):
        inner, here = i < length, requests * 0 + min(i, tree.tokens.shape[1] - 1)
        p, p_sound = target.probs(tree.row(here), requests)
        token = tree.tokens[:, min(i + 1, tree.tokens.shape[1] - 1)]
        weights, q_sound = (None, inner) if draft is None else draft.log_weights(tree.row(here), requests)
        q = draft_of(weights, token, like=p)
        sound = sound & (~(inner & (w > 0)) | (p_sound & q_sound))
        left = (w[:, None] * p - q).clamp(min=0)
        share = torch.where(inner, _hold(w, left.sum(1)), w)
        holds = i <= length
        if i > 0:  # nothing accepted is always possible
            holds = holds & coins.accept(Draws(here, here[:, None]), 0, torch.ones_like(w), share, holds)
        rest = torch.where(inner[:, None], normalised(left, p), p)
        end = torch.where(holds, i, end)
        rests = rest if rests is None else torch.where(holds[:, None], rest, rests)
        p_x, q_x = p.gather(1, token[:, None])[:, 0], q.gather(1, token[:, None])[:, 0]
        w = torch.where(inner, (w * _ratio(p_x, q_x)).nan_to_num(0.0).clamp(max=1.0), w)
        last_sound = torch.where(holds, p_sound, last_sound)
    path = tree.path_to(end)
    return path, rests, sound & last_sound


def traversal(tree: TreeView, target: Rows, draft: Rows | None, coins: Coins, *, replacement: bool):
    """Traversal verification (2505.12398): leaves first, each rejection handing its share back to the parent."""
    batch, width = tree.tokens.shape
    device = tree.starts.device
    requests = torch.arange(batch, device=device)
    node = torch.arange(width, device=device)
    P, Q, p_sound, row_sound = [], [], [], []
    for j in range(width):
        p, ok = target.probs(tree.row(requests * 0 + j), requests)
        q, q_ok = (None, ok) if draft is None else draft.log_weights(tree.row(requests * 0 + j), requests)
        P.append(p)
        Q.append(q)
        p_sound.append(ok)
        row_sound.append(ok & q_ok)
    P, p_sound, row_sound = (torch.stack(x, 1) for x in (P, p_sound, row_sound))
    sound = torch.ones(batch, dtype=torch.bool, device=device)
    Q = None if draft is None else torch.stack(Q, 1)
    parent = tree.parents.clamp(min=0)
    alive = tree.valid.clone()
    w = torch.ones_like(P[:, :, 0])
    root_w = torch.ones(batch, dtype=P.dtype, device=device)
    held = torch.full_like(w, torch.nan)  # weight of a node once a child of it was rejected
    end = torch.full((batch,), -1, device=device)
    for _ in range(width):
        ratio = _ratio(P[requests[:, None], parent, tree.tokens], _chances(Q, parent, tree.tokens, like=w))
        w = torch.where(held.isnan(), 1.0, held)
        for _ in range(tree.max_depth):
            given = (w.gather(1, parent) * ratio).nan_to_num(0.0, posinf=1.0).clamp(max=1.0)
            w = torch.where(held.isnan() & (node > 0), given, w)
        leaf = _first_leaf(tree, alive)
        open_ = end < 0
        above = tree.path_to(leaf)
        read = (above >= 0) & (above != leaf[:, None]) & (w.gather(1, above.clamp(min=0)) > 0)
        sound &= ~(open_[:, None] & read & ~row_sound.gather(1, above.clamp(min=0))).any(1)
        share = torch.where(leaf == 0, root_w, w.gather(1, leaf[:, None])[:, 0])
        hit = coins.accept(Draws(leaf, leaf[:, None]), 0, torch.ones_like(share), share, open_ & (leaf > 0))
        end = torch.where(open_ & (hit | (leaf == 0)), leaf, end)
        gone = open_ & (end < 0)
        if not bool(gone.any()):
            break
        up, x = parent.gather(1, leaf[:, None])[:, 0], tree.tokens.gather(1, leaf[:, None])[:, 0]
        p_up, w_up = P[requests, up], w[requests, up]
        weights = None if Q is None else Q[requests, up]
        left = (w_up[:, None] * p_up - draft_of(weights, x, like=p_up)).clamp(min=0)
        whole, _ = target.probs(tree.row(up), requests)
        P[requests, up] = torch.where(gone[:, None], normalised(left, whole), p_up)
        new_w = torch.where(up == 0, 1.0, _hold(w_up, left.sum(1)))
        held[requests, up] = torch.where(gone, new_w, held[requests, up])
        if Q is not None and not replacement:
            Q[requests, up] = without(weights, x, gone)
        alive[requests, leaf] &= ~gone
    end = end.clamp(min=0)
    return tree.path_to(end), P[requests, end], sound & p_sound.gather(1, end[:, None])[:, 0]


def _chances(Q: Tensor | None, parent: Tensor, tokens: Tensor, like: Tensor) -> Tensor:
    """[B, n] probability with which each node's token was drawn, given log weights Q [B, n, V] of its parent."""
    if Q is None:
        return torch.ones_like(like)
    requests = torch.arange(len(parent), device=parent.device)[:, None]
    whole = Q.logsumexp(2).gather(1, parent)
    chance = (Q[requests, parent, tokens] - whole).exp()
    return torch.where(whole > -torch.inf, chance, 1.0).to(like.dtype)


def _first_leaf(tree: TreeView, alive: Tensor) -> Tensor:
    """[B] int64: the first leaf in depth-first order, which is reached by always taking the first child."""
    batch, width = alive.shape
    column = torch.arange(width, device=alive.device)
    leaf = torch.zeros(batch, dtype=torch.int64, device=alive.device)
    for _ in range(tree.max_depth):
        child = alive & (tree.parents == leaf[:, None])
        first = torch.where(child, column, width).amin(1)
        leaf = torch.where(first < width, first, leaf)
    return leaf
