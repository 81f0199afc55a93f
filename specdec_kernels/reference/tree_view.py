"""A ragged batch of trees as padded tables, which is how the references look at it."""

from __future__ import annotations

import torch
from torch import Tensor


class TreeView:
    """Padded [B, n] tables of packed trees; node indices are local to a tree.

    A node whose token is outside [0, V) is no draft: neither it nor what hangs below it is there. Nor is what lies
    deeper than max_depth.
    """

    def __init__(self, tokens, parents, cu_nodes, counts, max_nodes, max_depth, vocabulary):
        """The arguments of the op `verify_tree`; `parents` None makes every tree a chain."""
        cu = cu_nodes.to(torch.int64)
        self.starts, self.max_depth = cu[:-1], max_depth
        column = torch.arange(max_nodes, device=cu.device)
        exists = column < (cu[1:] - cu[:-1])[:, None]
        self._packed = (self.starts[:, None] + column).clamp(0, max(len(tokens) - 1, 0))
        if parents is None:
            self.parents = (column - 1).expand_as(self._packed)
        else:
            self.parents = torch.where(exists, self._take(parents).to(torch.int64), -1)
            self.parents = torch.minimum(self.parents, column - 1)  # parents come before children
        token = torch.where(exists, self._take(tokens).to(torch.int64), -1)
        self.valid = exists & (((token >= 0) & (token < vocabulary)) | (column == 0))
        self.tokens = token.clamp(0, vocabulary - 1)
        self.counts = None if counts is None else self._take(counts).to(torch.int64)
        self.depths = (self.parents >= 0).to(torch.int64)
        above = self.parents.clamp(min=0)
        for _ in range(max_depth):
            self.valid = self.valid & self.valid.gather(1, above)
            self.depths = torch.where(self.parents >= 0, self.depths.gather(1, above) + 1, 0)
        self.valid &= ((self.parents >= 0) & (self.depths <= max_depth)) | (column == 0)

    def _take(self, packed: Tensor) -> Tensor:
        return packed[self._packed] if len(packed) else packed.new_zeros(self._packed.shape)

    def row(self, node: Tensor) -> Tensor:
        """[B] int64 packed index of one node of each tree."""
        return self._packed.gather(1, node[:, None])[:, 0]

    def children(self, node: Tensor) -> tuple[Tensor, Tensor]:
        """([B, C] int64 children of one node of each tree in draw order, [B, C] which of them exist)."""
        mask = self.valid & (self.parents == node[:, None])
        most = int(mask.sum(1).max()) if len(mask) else 0
        nodes = (~mask).to(torch.int8).argsort(dim=1, stable=True)[:, :most]
        return nodes, mask.gather(1, nodes)

    def has_children(self) -> Tensor:
        """[B, n] bool."""
        hits = torch.zeros_like(self.parents)
        return hits.scatter_add(1, self.parents.clamp(min=0), (self.valid & (self.parents >= 0)).long()) > 0

    def path_to(self, node: Tensor) -> Tensor:
        """[B, max_depth+1] int64 nodes from the root to `node` [B], then -1."""
        depth = self.depths.gather(1, node[:, None])[:, 0]
        path = torch.full((len(node), self.max_depth + 1), -1, device=node.device)
        for _ in range(self.max_depth + 1):
            path.scatter_(1, depth.clamp(min=0)[:, None], node[:, None])
            up = depth > 0
            node = torch.where(up, self.parents.gather(1, node[:, None])[:, 0], node)
            depth = depth - up.long()
        return path
