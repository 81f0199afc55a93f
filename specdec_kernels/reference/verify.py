"""Verification of drafted chains and trees, in the order of the maths.

A walk decides which path is accepted and leaves the distribution of the one token that follows it; the entry points
draw that token. Chains are trees of one child a node.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import rules
from .bottom_up import block, traversal
from .coins import Coins, Draws, NoCoins
from .rows import Rows, draw
from .tree_view import TreeView

# Methods that read no draft logits: their rules compare with the target alone.
TARGET_METHODS = ("greedy", "target_only", "typical")
TYPICAL_EPSILON, TYPICAL_DELTA = 0.09, 0.3  # Medusa, arXiv 2401.10774, section 2.3.1


class Walk(NamedTuple):
    """Where each request's walk ended."""

    path: Tensor  # [B, max_depth+1] int64 accepted nodes, root first, then -1
    rest: Tensor  # [B, V] distribution of the token that follows the path
    sound: Tensor  # [B] whether every row that was read holds a distribution


def top_down(tree: TreeView, target: Rows, draft: Rows | None, rule, coins: Coins) -> Walk:
    """From the root, let `rule` decide among the children until it accepts none of them."""
    batch = len(tree.starts)
    requests = torch.arange(batch, device=tree.starts.device)
    here = torch.zeros_like(requests)
    path = torch.full((batch, tree.max_depth + 1), -1, device=here.device)
    path[:, 0] = 0
    walking = torch.ones(batch, dtype=torch.bool, device=here.device)
    sound, rest = walking.clone(), None
    for depth in range(tree.max_depth + 1):
        p, p_sound = target.probs(tree.row(here), requests)
        nodes, mask = tree.children(here)
        mask &= walking[:, None] & (depth < tree.max_depth)
        q, q_sound = (None, walking) if draft is None else draft.log_weights(tree.row(here), requests)
        sound &= ~walking | (p_sound & (q_sound | ~mask.any(1)))
        draws, x, mask = _draws(tree, here, nodes, mask, coins)
        accepted, last = rule(p, q, x, mask, draws, coins)
        rest = last if rest is None else torch.where(walking[:, None], last, rest)
        walking = walking & (accepted >= 0) & sound
        if not bool(walking.any()):
            break
        here = torch.where(walking, draws.nodes.gather(1, accepted.clamp(min=0)[:, None])[:, 0], here)
        path[:, depth + 1] = torch.where(walking, here, -1)
    return Walk(path, rest, sound)


def _draws(tree: TreeView, parent: Tensor, nodes: Tensor, mask: Tensor, coins: Coins) -> tuple[Draws, Tensor, Tensor]:
    """One column for each draw: the children, or where equal draws were merged a random order of all draws."""
    repeat = None
    if tree.counts is not None and nodes.shape[1]:
        counts = torch.where(mask, tree.counts.gather(1, nodes).clamp(min=1), 0)
        columns = coins.order(parent, counts)
        mask, columns = columns >= 0, columns.clamp(min=0)
        nodes = nodes.gather(1, columns)
        same = columns[:, :, None] == columns[:, None, :]
        repeat = same.tril(-1).sum(2)
    return Draws(parent, nodes, repeat), tree.tokens.gather(1, nodes), mask


def typical(tree: TreeView, target: Rows, coins: Coins) -> Walk:
    """Lossy: the longest path on which every token has p(x) > min(eps, delta * exp(-H(p))), first among equals."""
    batch, width = tree.tokens.shape
    requests = torch.arange(batch, device=tree.starts.device)
    kept = torch.zeros_like(tree.valid)
    kept[:, :1] = True
    sound = torch.ones(batch, dtype=torch.bool, device=tree.starts.device)
    judged = coins.judged(torch.arange(width, device=tree.starts.device).expand(batch, -1))
    inner = tree.has_children()
    parent = tree.parents.clamp(min=0)
    for node in range(width):  # parents first: node order is enough
        p, p_sound = target.probs(tree.row(requests * 0 + node), requests)
        sound &= p_sound | ~(kept[:, node] & inner[:, node])
        bar = (TYPICAL_DELTA * (-torch.special.entr(p).sum(1)).exp()).clamp(max=TYPICAL_EPSILON)
        likely = p.gather(1, tree.tokens) > bar[:, None]
        is_child = tree.valid & (parent == node) & (tree.parents >= 0)
        kept |= is_child & (likely | judged) & kept[:, node : node + 1]
    depth = torch.where(kept, tree.depths, -1)
    end = depth.argmax(1)
    path = tree.path_to(end)
    p, p_sound = target.probs(tree.row(end), requests)
    return Walk(path, p, sound & p_sound)


def by_rate(tree: TreeView, target: Rows, rates: Tensor, coins: Coins, *, every_row: bool) -> Walk:
    """Lossy, for load tests: at depth d the first child is accepted where its coin is below rates[d].

    Rows on the way matter only where log-probabilities are asked for (`every_row`).
    """
    batch = len(tree.starts)
    requests = torch.arange(batch, device=tree.starts.device)
    here = torch.zeros_like(requests)
    path = torch.full((batch, tree.max_depth + 1), -1, device=here.device)
    path[:, 0] = 0
    walking = torch.ones(batch, dtype=torch.bool, device=here.device)
    sound = walking.clone()
    for depth in range(tree.max_depth):
        nodes, mask = tree.children(here)
        if not nodes.shape[1]:
            break
        rate = rates[depth].expand(batch)
        walking = walking & mask[:, 0] & coins.accept(Draws(here, nodes), 0, torch.ones_like(rate), rate, walking)
        if every_row:
            sound &= ~walking | target.probs(tree.row(here), requests)[1]
        here = torch.where(walking, nodes[:, 0], here)
        path[:, depth + 1] = torch.where(walking, here, -1)
    p, p_sound = target.probs(tree.row(here), requests)
    return Walk(path, p, sound & p_sound)


def _verify(tree, target, draft, method, coins, rates, logprobs):
    if rates is not None:
        walk = by_rate(tree, target, rates, coins, every_row=logprobs)
    elif method == "typical":
        walk = typical(tree, target, coins)
    elif method == "block":
        walk = Walk(*block(tree, target, draft, coins))
    elif method.startswith("traversal"):
        walk = Walk(*traversal(tree, target, draft, coins, replacement=method == "traversal_iid"))
    else:
        rule = getattr(rules, {"token": "multi_round", "greedy": "multi_round"}.get(method, method))
        walk = top_down(tree, target, draft, rule, coins)
    there = tree.valid[:, :1].any(1)  # a request of no nodes emits nothing
    return _results(tree, target, walk._replace(sound=walk.sound & there), coins, logprobs)


def _results(tree: TreeView, target: Rows, walk: Walk, coins: Coins, logprobs: bool):
    """Draw the last token and lay out what is committed."""
    on_path = (walk.path >= 0) & walk.sound[:, None]
    number = on_path.sum(1)
    token = torch.where(on_path, tree.tokens.gather(1, walk.path.clamp(min=0)), -1)
    tokens = torch.cat([token[:, 1:], torch.full_like(token[:, :1], -1)], 1)
    if len(token):
        last = draw(torch.where(walk.sound[:, None], walk.rest, 1.0), coins.final())
        tokens.scatter_(1, (number - 1).clamp(min=0)[:, None], torch.where(walk.sound, last, -1)[:, None])
    values = torch.empty(len(token), tokens.shape[1] if logprobs else 0, device=token.device)
    requests = torch.arange(len(token), device=token.device)
    for j in range(values.shape[1]):
        z, _ = target.log_weights(tree.row(walk.path[:, j].clamp(min=0)), requests)
        chosen = z.log_softmax(1).gather(1, tokens[:, j : j + 1].clamp(min=0))[:, 0]
        values[:, j] = torch.where(tokens[:, j] >= 0, chosen.float(), torch.nan)
    nodes = torch.where(on_path, walk.path, -1)
    return tokens.to(torch.int32), nodes.to(torch.int32), number.to(torch.int32), values


def verify_tree(
    tokens, parents, cu_nodes, counts, target_logits, draft_logits, draft_vocab, max_nodes, max_depth, method,
    params, scalars, allowed, draft_params, draft_scalars, draft_allowed,
    judge, reflect_logits, reflect_weight, synthetic, lenience,
    seed, offset, accept_uniforms, final_uniforms, logprobs,
):  # fmt: skip
    """Reference of the op `verify_tree`; see `specdec_kernels.verify_tree` for its arguments."""
    vocabulary = target_logits.shape[1]
    if method == "greedy":  # the argmax, whatever the temperature
        params, scalars = None, (0.0, 0.0, 1.0, 0.0)
    if method in TARGET_METHODS or synthetic is not None:
        draft_logits = None
    tree = TreeView(tokens, parents, cu_nodes, counts, max_nodes, max_depth, vocabulary)
    target = Rows(
        target_logits, vocabulary, params=params, scalars=scalars, allowed=allowed,
        mixed=reflect_logits, mix=reflect_weight,
    )  # fmt: skip
    draft = None
    if draft_logits is not None:
        draft = Rows(
            draft_logits, vocabulary, vocab=draft_vocab, params=draft_params, scalars=draft_scalars,
            allowed=draft_allowed,
        )  # fmt: skip
        draft.dtype = target.dtype
    coins = Coins(tree.starts, seed, offset, accept_uniforms, final_uniforms, judge, lenience)
    if method == "greedy" and synthetic is None:
        coins = NoCoins(tree.starts, judge)
    return _verify(tree, target, draft, method, coins, synthetic, logprobs)


def verify_chain(tokens, cu_nodes, target_logits, draft_logits, draft_vocab, max_depth, method, *sampling):
    """Reference of the op `verify_chain`: a tree in which every node has one child."""
    return verify_tree(
        tokens, None, cu_nodes, None, target_logits, draft_logits, draft_vocab, max_depth + 1, max_depth, method,
        *sampling,
    )  # fmt: skip
