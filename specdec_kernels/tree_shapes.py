"""Tree shapes that are fixed before drafting: lists of choices, constant branching, Sequoia's dynamic program.

Part of the `trees` family; import these names from `specdec_kernels.trees`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import INT32, check_int, check_tensor
from .types import DraftTree


class Level(NamedTuple):
    """What one draft step adds to every tree of one shape."""

    expand: Tensor  # [m] int64, nodes that get children in this step
    nodes: Tensor  # [c] int64, the children, which follow one another in the tree
    slots: Tensor  # [c] int64, index in `expand` of each child's parent
    ranks: Tensor  # [c] int64, which of its parent's draws each child takes
    draws: int  # draws that a parent needs: the largest rank + 1


@dataclass(frozen=True)
class TreeShape:
    """Nodes of a tree without tokens, level after level; the root is node 0.

    A drafter that walks the levels:

    >>> tokens = roots.new_empty(B, shape.nodes)
    >>> tokens[:, 0] = roots
    >>> for level in shape.levels(device):
    ...     drawn = ...  # [B, len(level.expand), level.draws] tokens, e.g. from gumbel_top_k with row = level.expand
    ...     tokens[:, level.nodes] = drawn[:, level.slots, level.ranks]
    >>> tree = shape.tree(tokens)
    """

    parents: tuple[int, ...]  # -1 at the root
    ranks: tuple[int, ...]  # which of its parent's draws a node takes, from 0; -1 at the root

    def __post_init__(self):
        depths = self.depths
        if not self.parents or self.parents[0] != -1 or len(self.ranks) != len(self.parents):
            raise ValueError("parents: expected a root (-1) first and one rank for each node")
        if any(a > b for a, b in pairwise(depths)) or depths.count(0) != 1:
            raise ValueError("parents: expected one root and nodes in order of depth")

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Edges between each node and the root."""
        depths: list[int] = []
        for node, parent in enumerate(self.parents):
            if not -1 <= parent < node:
                raise ValueError(f"parents: expected parents before children, got {parent} at node {node}")
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return tuple(depths)

    @property
    def nodes(self) -> int:
        """Nodes of the tree, the root included."""
        return len(self.parents)

    @property
    def max_depth(self) -> int:
        """Depth of the deepest node."""
        return self.depths[-1]

    def up_to(self, depth: int) -> TreeShape:
        """The first levels only, 0 = the root alone."""
        kept = sum(d <= depth for d in self.depths)
        return TreeShape(self.parents[:kept], self.ranks[:kept])

    def levels(self, device=None) -> tuple[Level, ...]:
        """One `Level` for each depth from 1 on; kept for the next call."""
        return _levels(self, torch.device(device or "cpu"))

    def tree(self, tokens: Tensor) -> DraftTree:
        """A batch of trees of this shape.

        Args:
            tokens: [B, nodes] int32, the last committed token first.
        """
        check_tensor("tokens", tokens, {"nodes": self.nodes}, "B nodes", INT32)
        return rectangular(tokens, _tensor(self.parents, tokens.device).expand_as(tokens), self.max_depth)

    def from_ranked(self, roots: Tensor, ranked: Tensor) -> DraftTree:
        """Trees whose tokens depend on depth and rank alone, as with Medusa's heads (arXiv 2401.10774).

        Args:
            roots: [B] int32, last committed tokens.
            ranked: [B, depths, k] int32, the best tokens for each depth from 1 on, best first.
        """
        sizes: dict[str, int] = {}
        check_tensor("roots", roots, sizes, "B", INT32)
        check_tensor("ranked", ranked, sizes, "B depths k", INT32, roots.device)
        if ranked.shape[1] < self.max_depth or ranked.shape[2] <= max(self.ranks):
            expected = f"[B, >= {self.max_depth}, >= {max(self.ranks) + 1}]"
            raise ValueError(f"ranked: expected shape {expected}, got {list(ranked.shape)}")
        depth = _tensor(self.depths, roots.device)[1:].long() - 1
        rank = _tensor(self.ranks, roots.device)[1:].long()
        return self.tree(torch.cat([roots[:, None], ranked[:, depth, rank]], 1))

    def expected_tokens(self, acceptance: Sequence[float]) -> float:
        """Expected tokens of a round, the extra one included.

        Args:
            acceptance: probability that the child of rank 0, 1, ... is the one accepted, given its parent was.
        """
        reach: list[float] = []
        for parent, rank in zip(self.parents, self.ranks, strict=True):
            chance = acceptance[rank] if 0 <= rank < len(acceptance) else 0.0
            reach.append(1.0 if parent < 0 else reach[parent] * chance)
        return sum(reach)


def rectangular(tokens: Tensor, parents: Tensor, max_depth: int) -> DraftTree:
    """DraftTree of tokens and parents [B, n] int32, in which all trees have n nodes."""
    batch, nodes = tokens.shape
    cu_nodes = torch.arange(batch + 1, dtype=torch.int32, device=tokens.device) * nodes
    return DraftTree(tokens.reshape(-1), parents.reshape(-1), cu_nodes, nodes, max_depth)


@lru_cache(maxsize=256)
def _tensor(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


@lru_cache(maxsize=64)
def _levels(shape: TreeShape, device: torch.device) -> tuple[Level, ...]:
    def ints(values):
        return torch.tensor(values, dtype=torch.int64, device=device)

    levels = []
    for depth in range(1, shape.max_depth + 1):
        nodes = [node for node, d in enumerate(shape.depths) if d == depth]
        expand = sorted({shape.parents[node] for node in nodes})
        slots = [expand.index(shape.parents[node]) for node in nodes]
        ranks = [shape.ranks[node] for node in nodes]
        levels.append(Level(ints(expand), ints(nodes), ints(slots), ints(ranks), max(ranks) + 1))
    return tuple(levels)


def static_tree(choices: Sequence[Sequence[int]]) -> TreeShape:
    """The shape that a list of choices describes, as in Medusa (arXiv 2401.10774).

    Args:
        choices: one path of ranks for each node below the root: (0,) is the best child of the root, (0, 2) the third
            best child of that node. Every prefix of a path must be listed too. Verification without replacement
            also needs the ranks below each node to be 0, 1, 2, ...

    Raises:
        ValueError: an empty or negative or repeated path, or a missing prefix; names it.
    """
    paths = sorted((tuple(int(rank) for rank in path) for path in choices), key=lambda path: (len(path), path))
    index = {(): 0}
    for path in paths:
        if not path or min(path) < 0:
            raise ValueError(f"choices: expected paths of ranks >= 0, got {path}")
        if path in index:
            raise ValueError(f"choices: expected different paths, got {path} twice")
        if path[:-1] not in index:
            raise ValueError(f"choices: expected every prefix to be listed, got {path} without {path[:-1]}")
        index[path] = len(index)
    parents = tuple(index[path[:-1]] if path else -1 for path in index)
    return TreeShape(parents, tuple(path[-1] if path else -1 for path in index))


def branching_tree(branching: Sequence[int]) -> TreeShape:
    """Every node of depth d has branching[d] children: RSD-C (arXiv 2402.14160), SpecInfer (2305.09781).

    Raises:
        ValueError: a branching below 1.
    """
    parents, ranks, level = [-1], [-1], [0]
    for depth, width in enumerate(branching):
        check_int(f"branching[{depth}]", width, 1)
        first = len(parents)
        for node in level:
            parents += [node] * width
            ranks += range(width)
        level = range(first, len(parents))
    return TreeShape(tuple(parents), tuple(ranks))


def sequoia_tree(
    acceptance: Sequence[float],
    nodes: int,
    max_depth: int,
    *,
    draft_time: float | None = None,
    target_times: Sequence[float] | None = None,
) -> tuple[TreeShape, float]:
    """The shape with the most expected tokens: the dynamic program of Sequoia (Chen et al., arXiv 2402.12374).

    Args:
        acceptance: measured probability that the child of rank 0, 1, ... is the one accepted, given its parent was.
        nodes: most nodes, root included.
        max_depth: most levels below the root.
        draft_time: time of one draft step. With `target_times` size and depth are chosen too, to minimise
            (depth * draft_time + target_times[size - 1]) / expected tokens.
        target_times: [>= nodes] time of a target forward over 1, 2, ... nodes, in the unit of `draft_time`.

    Returns:
        The shape and its expected tokens a round, root (that is, the extra token) included.

    Raises:
        ValueError: a probability outside [0, 1], or times that do not fit.
    """
    check_int("nodes", nodes, 1)
    check_int("max_depth", max_depth, 0)
    if any(not 0 <= chance <= 1 for chance in acceptance):
        raise ValueError(f"acceptance: expected probabilities in [0, 1], got {list(acceptance)}")
    if (draft_time is None) != (target_times is None):
        raise ValueError("target_times: expected together with draft_time, got one of them")
    if target_times is not None and len(target_times) < nodes:
        raise ValueError(f"target_times: expected at least {nodes} values, got {len(target_times)}")

    # value[b, m]: most expected tokens of m nodes (m from 0) whose root has exactly b children; best[l][m] over b.
    size = torch.arange(nodes + 1)
    rest = size[:, None] - size  # nodes left for the last child when the others and the root take y
    fits = (rest >= 1) & (size >= 1)
    leaf = torch.full((nodes + 1,), -torch.inf, dtype=torch.float64)
    leaf[1] = 1.0
    best, children, splits = [leaf], [torch.zeros(nodes + 1, dtype=torch.int64)], [[]]
    for _ in range(max_depth):
        value, split = [leaf], [torch.zeros(nodes + 1, dtype=torch.int64)]
        for chance in acceptance:
            below = best[-1][rest.clamp(min=0)]
            gain = torch.where(fits & (below > 0), value[-1] + chance * below, -torch.inf)
            top = gain.max(1)
            value.append(top.values)
            split.append(top.indices)
        over = torch.stack(value).max(0)
        best.append(over.values)
        children.append(over.indices)
        splits.append(split)

    depth, count = max_depth, int(best[-1].argmax())
    if target_times is not None:
        work = torch.arange(max_depth + 1, dtype=torch.float64)[:, None] * draft_time
        cost = work + torch.tensor(list(target_times[:nodes]), dtype=torch.float64)
        table = torch.stack(best)[:, 1:]
        ratio = torch.where(table > 0, cost / table, torch.inf)
        depth, count = divmod(int(ratio.argmin()), nodes)
        count += 1

    parents, ranks = [-1], [-1]
    level = [(0, count)]
    for left in range(depth, 0, -1):
        following = []
        for node, total in level:
            shares = []
            for child in range(int(children[left][total]), 0, -1):
                kept = int(splits[left][child][total])
                shares.append(total - kept)
                total = kept
            for rank, share in enumerate(reversed(shares)):
                following.append((len(parents), share))
                parents.append(node)
                ranks.append(rank)
        level = following
    shape = TreeShape(tuple(parents), tuple(ranks))
    return shape, float(best[depth][count])
