"""Exact output laws of the reference verifiers, by enumeration.

A case is a tree shape, a target and a draft distribution for every context, and a way to draw siblings. Every way in
which the draws can come out is one request of a batch, and every outcome of every coin is one more factor of that
batch: `Enumeration` stands where the coins stand, takes the outcome it was given and multiplies in its probability.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec_kernels.reference.coins import Coins
from specdec_kernels.reference.rows import Rows
from specdec_kernels.reference.tree_view import TreeView


class Enumeration(Coins):
    """Coins whose outcomes are given and whose probabilities are multiplied up."""

    def __init__(self, bits: Tensor, permutations: Tensor | None = None):
        """`bits` [B, n, R]: outcome of the test of node n, R-th draw of it; `permutations` [B, D]: order of draws."""
        super().__init__(torch.zeros(len(bits), dtype=torch.int64))
        self.bits, self.permutations = bits, permutations
        self.weight = torch.ones(len(bits), dtype=torch.float64)
        self.used = torch.zeros_like(bits)
        self.rows = torch.arange(len(bits))

    def _use(self, node, repeat, active, probability):
        bit = self.bits[self.rows, node, repeat]
        self.weight *= torch.where(active, torch.where(bit, probability, 1 - probability), 1.0)
        self.used[self.rows, node, repeat] |= active
        return bit

    def accept(self, draws, j, q, p, active):
        repeat = torch.zeros_like(self.rows) if draws.repeat is None else draws.repeat[:, j]
        ratio = torch.where(q > 0, p / torch.where(q > 0, q, 1.0), (p > 0).double()).clamp(max=1.0)
        return self._use(draws.nodes[:, j], repeat, active, ratio.double())

    def pick(self, draws, node, weights, mask):
        choice = torch.full_like(self.rows, -1)
        left = torch.ones_like(self.weight)
        for j in range(weights.shape[1]):
            active = mask[:, j] & (choice < 0)
            share = torch.where(left > 0, weights[:, j] / torch.where(left > 0, left, 1.0), 0.0).clamp(0.0, 1.0)
            bit = self._use(draws.nodes[:, j], torch.zeros_like(self.rows), active, share)
            choice = torch.where(active & bit, j, choice)
            left = torch.where(active, left - weights[:, j], left).clamp(min=0.0)
        return choice

    def order(self, parent, counts):
        total = counts.sum(1)
        assert bool(((total == 0) | (total == self.permutations.shape[1])).all()), "as many draws in every request"
        columns = (counts.cumsum(1)[:, None, :] <= self.permutations[:, :, None]).sum(2)
        return torch.where(total[:, None] > 0, columns, -1)

    def probability(self) -> Tensor:
        """[B] probability of each request's outcomes; both outcomes of a coin that nobody asked for are in the batch.

        The root is never tested.
        """
        return self.weight * 0.5 ** (~self.used[:, 1:]).sum((1, 2)).double()


@dataclass
class Case:
    """Distributions for every context of up to `depth` tokens: p[l] and q[l] are [V^l, V]."""

    vocabulary: int
    depth: int
    p: list[Tensor]
    q: list[Tensor]

    @classmethod
    def random(cls, vocabulary: int, depth: int, seed: int, *, zeros: bool = False) -> Case:
        generator = torch.Generator().manual_seed(seed)

        def table(level):
            t = torch.rand(vocabulary**level, vocabulary, dtype=torch.float64, generator=generator) ** 2 + 1e-3
            if zeros:  # some tokens impossible, never all
                gone = torch.rand(t.shape, generator=generator) < 0.3
                gone[:, level % vocabulary] = False
                t = t.masked_fill(gone, 0.0)
            return t / t.sum(1, keepdim=True)

        p, q = ([table(level) for level in range(depth + 1)] for _ in range(2))
        return cls(vocabulary, depth, p, q)

    def target_law(self) -> Tensor:
        """[V^(depth+1)] joint law of the first depth+1 tokens of the target alone."""
        law = torch.ones(1, dtype=torch.float64)
        for table in self.p:
            law = (law[:, None] * table).reshape(-1)
        return law


def siblings(scheme: str, q: Tensor, k: int) -> list[tuple[tuple[int, ...], float]]:
    """All ways in which k children of a node with draft distribution `q` [V] can come out, with probabilities."""
    values, vocabulary = q.tolist(), len(q)
    if scheme == "iid":
        ways = itertools.product(range(vocabulary), repeat=k)
        chances = [(w, float(torch.tensor([values[x] for x in w], dtype=torch.float64).prod())) for w in ways]
    elif scheme == "without_replacement":
        chances = []
        for way in itertools.permutations(range(vocabulary), k):
            chance, left = 1.0, 1.0
            for x in way:
                chance *= values[x] / left if left > 1e-300 else 0.0
                left -= values[x]
            chances.append((way, chance))
    elif scheme == "top_k":
        chances = [(tuple(q.argsort(descending=True, stable=True)[:k].tolist()), 1.0)]
    elif scheme == "greedy_multi":
        top = tuple(q.argsort(descending=True, stable=True)[: k - 1].tolist())
        rest = [x for x in range(vocabulary) if x not in top]
        mass = sum(values[x] for x in rest)
        chances = [((*top, x), values[x] / mass) for x in rest]
    else:
        raise ValueError(scheme)
    return [(way, chance) for way, chance in chances if chance > 0]


@dataclass
class Drawn:
    """One request for each way in which all draws of a tree can come out."""

    tokens: Tensor  # [B, n]
    parents: list[int]
    contexts: Tensor  # [B, n] flat context of each node
    levels: list[int]
    weight: Tensor  # [B]


def draw_all(case: Case, branching: list[int], scheme: str) -> Drawn:
    """Full trees with branching[d] children at depth d; nodes level by level."""
    parents, levels = [-1], [0]
    rows = [([0], [0], 1.0)]  # tokens, contexts, probability
    frontier = [0]
    for depth, k in enumerate(branching):
        following = []
        for parent in frontier:
            grown = []
            for tokens, contexts, weight in rows:
                for way, chance in siblings(scheme, case.q[depth][contexts[parent]], k):
                    below = [contexts[parent] * case.vocabulary + x for x in way]
                    grown.append((tokens + list(way), contexts + below, weight * chance))
            rows = grown
            for _ in range(k):
                following.append(len(parents))
                parents.append(parent)
                levels.append(depth + 1)
        frontier = following
    tokens, contexts, weight = zip(*rows, strict=True)
    return Drawn(
        torch.tensor(tokens), parents, torch.tensor(contexts), levels, torch.tensor(weight, dtype=torch.float64)
    )


def output_law(case: Case, drawn: Drawn, verifier, *, point_mass: bool = False, counts=None, draws: int = 0) -> Tensor:
    """[V^(depth+1)] joint law of the first depth+1 output tokens under `verifier(tree, target, draft, coins)`.

    `verifier` returns (path, rest, sound) as the walks of the reference do; what follows the extra token is completed
    with p. `counts` [B, n] merges draws, of which each request then has `draws`.
    """
    tokens, contexts, weight = drawn.tokens, drawn.contexts, drawn.weight
    batch, n = tokens.shape
    repeats = 1 if counts is None else int(counts.max())
    ways = list(itertools.product((False, True), repeat=(n - 1) * repeats))
    bits = torch.zeros(len(ways), n, repeats, dtype=torch.bool)
    bits[:, 1:] = torch.tensor(ways).reshape(len(ways), n - 1, repeats)
    orders = None
    if counts is not None:
        orders = torch.tensor(list(itertools.permutations(range(draws))))

    copies = len(ways) * (1 if orders is None else len(orders))

    def spread(x):
        return x.repeat_interleave(copies, 0)

    all_bits = bits.repeat(batch * (1 if orders is None else len(orders)), 1, 1)
    permutations = None if orders is None else orders.repeat_interleave(len(ways), 0).repeat(batch, 1)
    coins = Enumeration(all_bits, permutations)
    tokens, contexts, weight = spread(tokens), spread(contexts), spread(weight) / (1 if orders is None else len(orders))
    total, depth, V = len(tokens), case.depth, case.vocabulary
    p = torch.stack([case.p[level][contexts[:, j]] for j, level in enumerate(drawn.levels)], 1)
    q = torch.stack([case.q[level][contexts[:, j]] for j, level in enumerate(drawn.levels)], 1)
    cu = torch.arange(total + 1) * n
    flat_counts = None if counts is None else spread(counts).reshape(-1)
    parents = torch.tensor(drawn.parents).repeat(total)
    tree = TreeView(tokens.reshape(-1), parents, cu, flat_counts, n, depth, V)
    target = Rows(p.log().reshape(-1, V), V)
    draft = None if point_mass else Rows(q.log().reshape(-1, V), V)
    path, rest, sound = verifier(tree, target, draft, coins)
    assert bool(sound.all())
    chance = weight * coins.probability()
    accepted = (path >= 0).sum(1) - 1
    law = torch.zeros(V ** (depth + 1), dtype=torch.float64)
    for length in range(depth + 1):
        here = accepted == length
        context = contexts[here].gather(1, path[here, length : length + 1])[:, 0]
        mass = torch.zeros(V**length, V, dtype=torch.float64)
        mass.index_add_(0, context, chance[here][:, None] * rest[here])
        flat = mass.reshape(-1)
        for table in case.p[length + 1 :]:
            flat = (flat[:, None] * table).reshape(-1)
        law += flat
    return law


def expected_accepted(case, drawn, verifier, **options) -> float:
    """Expected number of accepted draft tokens."""
    found = []

    def spy(tree, target, draft, coins):
        walk = verifier(tree, target, draft, coins)
        found.append((walk, coins))
        return walk

    output_law(case, drawn, spy, **options)
    (path, _, _), coins = found[0]
    copies = len(path) // len(drawn.weight)
    chance = drawn.weight.repeat_interleave(copies) * coins.probability()
    return float((((path >= 0).sum(1) - 1).double() * chance).sum())
