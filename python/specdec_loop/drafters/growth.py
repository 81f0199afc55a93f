"""How a model drafter grows chains and trees, level by level; every level is one forward for the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from specdec_kernels import DraftTree, HeadTopK, Philox
from specdec_kernels.trees import Level, TreeShape, eagle2_expand, eagle2_select, iid_children

from ..policies import Policy
from .base import Draft, Tree
from .head import Head

# Which trees a verification method is exact for.
RANKED = ("greedy", "target_only", "typical")
WITHOUT_REPLACEMENT = ("without_replacement", "traversal")
INDEPENDENT = ("multi_round", "k_seq", "traversal_iid")

# feed(tree, nodes, behind=0) -> hidden [n, D]: run the drafter on some nodes (places in the packed tree; None: all) of
# trees whose other nodes it has seen; the trees' roots stand `behind` slots behind the committed prefix.
Feed = Callable[..., Tensor]


class Grown(NamedTuple):
    """A draft, and where the drafter keeps the keys of its nodes."""

    draft: Draft
    slots: Tensor  # [B, nodes] int64: slot of each node behind the prefix in the drafter's own cache, -1 if never fed


def grow_chain(
    feed: Feed, head: Head, hidden: Tensor, roots: Tensor, length: int, policy: Policy, sampled: tuple | None
) -> Grown:
    """K drafts one after the other. `sampled` is (rng, temperature), or None for the argmax as a point mass.

    A policy may end some chains early; the batch goes on until all have ended.
    """
    batch = len(roots)
    tokens, logits = [roots], []
    lengths = [1] * batch
    going = [True] * batch
    for depth in range(length):
        if depth:
            hidden = feed(DraftTree.chain(tokens[-1][:, None]), None, depth)
        if sampled is None:
            step = head.topk(hidden, 1)
        else:
            rng, temperature = sampled
            # The root's position and the node's number: no two draws of a request ever share their noise.
            step = head.sample(hidden, 1, rng._replace(row=torch.full_like(roots, depth)), temperature)
            logits.append(step.all_logits)
        going = [on and more for on, more in zip(going, policy.proceed(depth, step.entropy), strict=True)]
        if not any(going):
            break
        tokens.append(step.tokens[:, 0])
        lengths = [n + on for n, on in zip(lengths, going, strict=True)]
    table = torch.stack(tokens, 1)
    width = table.shape[1]
    # What no node was drawn from (the leaf's row) is never read.
    q = None if sampled is None else torch.stack([*logits, logits[-1]][:width], 1)
    vocab = None if sampled is None else head.rows
    slots = torch.arange(width, device=roots.device).expand(batch, width)
    slots = torch.where(slots < width - 1, slots, -1)
    if min(lengths) == width:
        return Grown(Draft(DraftTree.chain(table), None if q is None else q.flatten(0, 1), vocab), slots)
    keep = slots.new_tensor(lengths)[:, None] > torch.arange(width, device=roots.device)
    return Grown(Draft(DraftTree.chain(table, lengths), None if q is None else q[keep], vocab), slots)


def grow_ranked(feed: Feed, head: Head, hidden: Tensor, roots: Tensor, shape: Tree) -> Grown:
    """EAGLE-2 (2406.16858): expand the likeliest nodes of each level, then keep the likeliest nodes of all.

    The tree is a function of the context alone, and its siblings stand in descending probability.
    """
    batch, device = len(roots), roots.device
    candidates, fed = None, 0
    for depth in range(shape.depth):
        if depth:
            level = candidates.frontier.shape[1]
            known = candidates.frontier_tree(roots)
            fed = known.max_nodes - 1
            last = torch.arange(known.max_nodes - level, known.max_nodes, device=device)
            places = torch.arange(batch, device=device)[:, None] * known.max_nodes + last
            hidden = feed(known, places.flatten())
        top = head.topk(hidden, shape.width, requests=batch)
        tokens, logprobs = (each.view(batch, len(hidden) // batch, -1) for each in (top.tokens, _logprobs(top)))
        candidates = eagle2_expand(candidates, tokens, logprobs, shape.width)
    tree, picked = eagle2_select(candidates, roots, shape.nodes)
    # The drafter's keys stand in the order of expansion; what the last level picked was never fed.
    slot_of = torch.full_like(candidates.parents, -1)
    slot_of.scatter_(1, candidates.expanded[:, :fed], torch.arange(1, fed + 1, device=device).expand(batch, fed))
    slots = torch.cat([torch.zeros_like(picked[:, :1]), slot_of.gather(1, picked)], 1)
    return Grown(Draft(tree), slots)


def grow_drawn(
    feed: Feed, head: Head, hidden: Tensor, roots: Tensor, shape: TreeShape, method: str, rng: Philox, temperature
) -> Grown:
    """A fixed shape whose siblings are drawn as `method` supposes (RSD-C, 2402.14160; SpecInfer, 2305.09781)."""
    batch, device = len(roots), roots.device
    tokens = roots.new_full((batch, shape.nodes), -1)
    tokens[:, 0] = roots
    slots = torch.full((batch, shape.nodes), -1, device=device)
    logits = None
    for depth, level in enumerate(shape.levels(device)):
        if depth:
            above = _up_to(shape, depth)
            places = torch.arange(batch, device=device)[:, None] * above.nodes + level.expand
            hidden = feed(above.tree(tokens[:, : above.nodes]), places.flatten())
        slots[:, level.expand] = level.expand
        drawn, q = _draw(head, hidden, level, method, rng, temperature)
        if logits is None:
            logits = q.new_empty(batch, shape.nodes, q.shape[-1])  # rows of leaves stay unwritten: they are never read
        logits[:, level.expand] = q.view(batch, -1, q.shape[-1])
        tokens[:, level.nodes] = drawn.view(batch, -1, level.draws)[:, level.slots, level.ranks]
    return Grown(Draft(shape.tree(tokens), logits.flatten(0, 1), head.rows), slots)


@lru_cache(maxsize=64)
def _up_to(shape: TreeShape, depth: int) -> TreeShape:
    return shape.up_to(depth)


def _draw(head: Head, hidden: Tensor, level: Level, method: str, rng: Philox, temperature):
    """Tokens [B*m, draws] below m nodes of each request, and the logits [B*m, R] they were drawn from."""
    k, batch, width = level.draws, len(rng.seed), len(level.expand)

    def each(value):
        return value.repeat_interleave(width) if isinstance(value, Tensor) else value

    # Root position and node: no two draws of a request ever share their noise.
    stream = Philox(each(rng.seed), each(rng.offset), level.expand.to(torch.int32).repeat(batch))
    if method in INDEPENDENT:
        logits = head.topk(hidden, 1, requests=batch, return_logits=True).all_logits
        return iid_children(logits, k, stream, temperature=each(temperature), draft_vocab=head.rows)[0], logits
    step = head.sample(hidden, k, stream, each(temperature), requests=batch)
    if method in WITHOUT_REPLACEMENT or k == 1:
        return step.tokens, step.all_logits
    # greedy_multi (2502.18779): the top k-1, then one draw of the rest. Of k draws without replacement at least one is
    # not among the top k-1, and the first such is a draw of q outside them.
    top = head.topk(hidden, k - 1, requests=batch).tokens
    top = torch.nn.functional.pad(top, (0, k - 1 - top.shape[1]), value=-1)  # a trimmed head may have fewer rows
    outside = (step.tokens[:, :, None] != top[:, None, :]).all(2)
    rest = step.tokens.gather(1, outside.int().argmax(1, keepdim=True))
    rest = torch.where(outside.any(1, keepdim=True), rest, -1)  # a head of fewer than k rows has none left
    return torch.cat([top, rest], 1), step.all_logits


def _logprobs(top: HeadTopK) -> Tensor:
    return top.logits - top.lse[:, None]
