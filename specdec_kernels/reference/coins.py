"""The decisions of a walk. The law tests put an enumeration of both outcomes in this place."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import philox


class Draws(NamedTuple):
    """Names the draws of one level: which node each is, whose children they are, how often a node came before."""

    parent: Tensor  # [B] int64, node whose children are tried
    nodes: Tensor  # [B, C] int64
    repeat: Tensor | None = None  # [B, C] int64, earlier draws that hit the same node (merged draws only)


class Coins:
    """Every decision: uniform numbers from explicit tensors or from Philox, and the lossy hooks that bend them."""

    def __init__(
        self, starts, seed=None, offset=None, accept_uniforms=None, final_uniforms=None, judge=None, lenience=1.0
    ):
        """Explicit uniforms where they are given, else the stream.

        Args:
            starts: [B] int64, first packed node of each request.
            seed, offset: [B] int64, Philox key and counter.
            accept_uniforms: [N] fp32 in [0, 1), indexed by packed node.
            final_uniforms: [B] fp32 in [0, 1).
            judge: [N] bool, packed nodes that are accepted whatever their coin says.
            lenience: factor of q in every test of a coin.
        """
        self.starts, self.seed, self.offset = starts, seed, offset
        self.accept_uniforms, self.final_uniforms = accept_uniforms, final_uniforms
        self.judge, self.lenience = judge, lenience

    def _of_node(self, node: Tensor, repeat: Tensor | None = None) -> Tensor:
        if self.accept_uniforms is None:
            return philox.coins(self.seed, self.offset, philox.ACCEPT, node, repeat)
        given = self.accept_uniforms[(self.starts + node).clamp(0, len(self.accept_uniforms) - 1)]
        if repeat is None:
            return given
        return torch.where(repeat > 0, philox.coins(self.seed, self.offset, philox.ACCEPT, node, repeat), given)

    def accept(self, draws: Draws, j: int, q: Tensor, p: Tensor, active: Tensor) -> Tensor:
        """[B] bool: `u * q < p` for draw j of each request. Strict, so that p = 0 is accepted by a judge only."""
        u = self._of_node(draws.nodes[:, j], None if draws.repeat is None else draws.repeat[:, j])
        return (u.to(p.dtype) * (q * self.lenience) < p) | self.judged(draws.nodes[:, j : j + 1])[:, 0]

    def pick(self, draws: Draws, node: Tensor, weights: Tensor, mask: Tensor) -> Tensor:
        """[B] int64: first column whose running sum of `weights` [B, C] exceeds the coin of `node`, -1 if none does.

        A judged column needs no coin.
        """
        under = self._of_node(node).to(weights.dtype)[:, None] < weights.cumsum(1)
        under = mask & (under | self.judged(draws.nodes))
        return torch.where(under.any(1), under.to(torch.int8).argmax(1), -1)

    def judged(self, nodes: Tensor) -> Tensor:
        """[B, C] bool: which of `nodes` [B, C] the judge accepts."""
        if self.judge is None or not len(self.judge):
            return torch.zeros_like(nodes, dtype=torch.bool)
        return self.judge[(self.starts[:, None] + nodes).clamp(0, len(self.judge) - 1)]

    def order(self, parent: Tensor, counts: Tensor) -> Tensor:
        """[B, D] columns of a uniformly random order of merged draws, -1 past the last; `counts` is [B, C] int64.

        i.i.d. draws are exchangeable, so a random order of the merged draws has the law of the order that merging
        forgot; taking equal draws together does not.
        """
        left, picks = counts.clone(), []
        for step in range(int(counts.sum(1).max()) if counts.numel() else 0):
            total = left.sum(1)
            coin = philox.coins(self.seed, self.offset, philox.ORDER, parent, torch.full_like(parent, step))
            ticket = torch.minimum((coin * total.to(torch.float32)).long(), total - 1)
            column = (left.cumsum(1) <= ticket[:, None]).sum(1).clamp(max=counts.shape[1] - 1)
            alive = total > 0
            picks.append(torch.where(alive, column, -1))
            left.scatter_add_(1, column[:, None], -alive.long()[:, None])
        return torch.stack(picks, 1) if picks else counts.new_empty(len(counts), 0)

    def final(self) -> Tensor:
        """[B] fp32: the coin of each request's drawn token."""
        if self.final_uniforms is not None:
            return self.final_uniforms
        return philox.coins(self.seed, self.offset, philox.FINAL, torch.zeros_like(self.seed))


class NoCoins(Coins):
    """Greedy verification: every coin is 0, so a token is accepted iff it has positive probability, or is judged."""

    def __init__(self, starts, judge=None):
        zeros = torch.zeros(max(len(starts), 1), dtype=torch.float32, device=starts.device)
        super().__init__(starts, accept_uniforms=zeros, final_uniforms=zeros[: len(starts)], judge=judge)
