"""Trees to verify: random rows of both models, and siblings that are really drawn from the drafter's."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from filters import keep_by_topk
from torch import Tensor

import specdec_kernels as sk
from specdec_kernels.trees import TreeShape, gumbel_top_k, iid_children

NOISE = 0.75  # between the logits of drafter and target, whose standard deviation is 3


class Problem(NamedTuple):
    """Trees of one shape over rows of logits."""

    shape: TreeShape
    tree: sk.DraftTree
    target: Tensor  # [B * n, V]
    draft: Tensor  # [B * n, V]
    accept: Tensor  # [B * n]
    final: Tensor  # [B]
    params: sk.SamplingParams  # of both models; numbers

    @property
    def tokens(self) -> Tensor:
        """[B, n] int32."""
        return self.tree.tokens.view(-1, self.shape.nodes)

    @property
    def used(self) -> int:
        """Nodes up to the last that has children: q of the others is never needed."""
        return max(self.shape.parents) + 1

    def children(self) -> Tensor:
        """[n, c] int64 children of each node, -1 where there is none."""
        table = torch.full((self.shape.nodes, max(self.shape.ranks) + 1), -1)
        for node, (parent, rank) in enumerate(zip(self.shape.parents, self.shape.ranks, strict=True)):
            if parent >= 0:
                table[parent, rank] = node
        return table.to(self.target.device)

    def op(self, method: str, backend: str | None = None) -> Callable[[], sk.Verified]:
        """A call of `verify_tree`."""
        draft = None if method == "target_only" else self.draft

        def call():
            return sk.verify_tree(
                self.tree, self.target, draft, method=method, params=self.params, draft_params=self.params,
                accept_uniforms=self.accept, final_uniforms=self.final, backend=backend,
            )  # fmt: skip

        return call

    def bytes_read(self, method: str) -> int:
        """Bytes of the rows that the walks read, each once.

        A request that reads a row with a NaN commits nothing, so one node's rows at a time are spoiled.
        """
        run, found = self.op(method), 0
        for logits in (self.target, self.draft):
            rows = logits.view(*self.tokens.shape, -1)
            for node in range(rows.shape[1]):
                kept = rows[:, node, 0].clone()
                rows[:, node, 0] = torch.nan
                found += int((run().num_tokens == 0).sum()) * logits.shape[1] * logits.element_size()
                rows[:, node, 0] = kept
        return found


def filled(nodes: int, width: int) -> TreeShape:
    """A tree that is filled level by level, `width` children a node."""
    return TreeShape(
        tuple((i - 1) // width for i in range(nodes)), tuple((i - 1) % width if i else -1 for i in range(nodes))
    )


def problem(
    method: str,
    shape: TreeShape,
    batch: int,
    vocabulary: int,
    dtype: torch.dtype,
    params: sk.SamplingParams = sk.SamplingParams(),
    *,
    seed: int = 0,
    device: str = "cpu",
) -> Problem:
    """Random logits, and siblings drawn as `method` expects them."""
    make = torch.Generator(device).manual_seed(seed)
    size = (batch * shape.nodes, vocabulary)
    target = torch.randn(size, generator=make, device=device).mul_(3)
    draft = torch.randn(size, generator=make, device=device).mul_(NOISE).add_(target).to(dtype)
    rows = draft.view(batch, shape.nodes, -1)
    tokens = torch.zeros(batch, shape.nodes, dtype=torch.int32, device=device)
    request = torch.arange(batch, device=device)
    for level in shape.levels(device):
        for node in level.expand.tolist():  # one at a time: noise takes more memory than logits
            logits = rows[:, node].float()
            if params.top_k:
                keep_by_topk(logits, logits, params)
            rng = sk.Philox(request, request + 1000, torch.full_like(request, node, dtype=torch.int32))
            here = [i for i, parent in enumerate(shape.parents) if parent == node]
            tokens[:, here] = draw(method, logits, len(here), rng)
    uniforms = torch.rand(batch * (shape.nodes + 1), generator=make, device=device)
    accept, final = uniforms[: len(target)], uniforms[len(target) :]
    return Problem(shape, shape.tree(tokens), target.to(dtype), draft, accept, final, params)


def draw(method: str, logits: Tensor, k: int, rng: sk.Philox) -> Tensor:
    """[M, k] int32 children of each row of `logits` [M, V]."""
    if method in ("multi_round", "k_seq", "traversal_iid"):
        return iid_children(logits, k, rng)[0]
    if method in ("without_replacement", "traversal"):
        return gumbel_top_k(logits, k, rng)
    if method in ("target_only", "greedy", "typical"):
        return logits.topk(k, dim=1).indices.int()
    top = logits.topk(k - 1, dim=1).indices
    return torch.cat([top.int(), gumbel_top_k(logits.scatter(1, top, -torch.inf), 1, rng)], 1)
