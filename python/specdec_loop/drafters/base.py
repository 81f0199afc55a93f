"""What every drafter offers the loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec_kernels import DraftTree, Philox, SamplingParams

from ..requests import Request
from ..statistics import Statistics


class Tree(NamedTuple):
    """The shape of draft trees; the verification method decides which part applies."""

    nodes: int = 32  # of a ranked tree, its root included (greedy, target_only, typical; n-gram tries)
    depth: int = 6  # of a ranked tree
    width: int = 8  # nodes of a ranked tree that are expanded at each level, and children considered of each
    branching: tuple[int, ...] = (4, 2, 1, 1, 1)  # children of every node of a level, where siblings are drawn

    def check(self) -> None:
        """Raise ValueError where a number does not fit."""
        for name, least in (("nodes", 2), ("depth", 1), ("width", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"tree.{name}: expected >= {least}, got {getattr(self, name)}")
        if not self.branching or min(self.branching) < 1:
            raise ValueError(f"tree.branching: expected one or more numbers >= 1, got {self.branching}")


class Plan(NamedTuple):
    """What holds for a whole call of the loop."""

    draft_length: int  # K of a chain
    tree: Tree | None  # None: chains
    method: str  # verification method
    backend: str | None  # forced on every op that takes one


class Draft(NamedTuple):
    """A round's proposal: one tree for each request in flight."""

    tree: DraftTree
    logits: Tensor | None = None  # [N, V] or [N, R]: row i is what the children of node i were drawn from
    vocab: Tensor | None = None  # [R] int32, ascending target ids of a trimmed head


class Drafter(ABC):
    """Proposes continuations. Row b of everything is the b-th request in flight, whose order is the loop's."""

    tree_method = "target_only"  # how sampled trees of this drafter are verified unless the caller says otherwise

    def check(self, target: PreTrainedModel, plan: Plan) -> None:  # noqa: B027 (nothing to check is a fine default)
        """Raise ValueError where this drafter cannot serve `target` or `plan`."""

    @abstractmethod
    def max_nodes(self, plan: Plan) -> int:
        """Most cache slots that one request's draft takes behind its prefix."""

    def bytes_read(self) -> int:
        """Bytes of parameters that one draft step reads."""
        return 0

    @contextmanager
    def session(
        self, requests: list[Request], max_new_tokens: int, plan: Plan, statistics: Statistics
    ) -> Iterator[None]:
        """Hold a call's state inside the block, for at most `max_new_tokens` of each request."""
        yield

    @abstractmethod
    def prefill(self) -> None:
        """Take in the prompts."""

    @abstractmethod
    def propose(self, requests: list[Request], rng: Philox, params: SamplingParams) -> Draft:
        """Draft from each request's root. Draws depend on `rng` and the request only."""

    @abstractmethod
    def commit(self, nodes: Tensor, new_tokens: list[list[int]]) -> None:
        """Learn the accepted paths ([B, depth+1] int32 nodes, then -1) and the tokens that each request gained."""

    @abstractmethod
    def drop(self, row: int, last: int) -> None:
        """Request `row` left; the one at `last`, the last row, takes its place."""


class NoDrafter(Drafter):
    """Trees of a root alone: plain autoregressive decoding."""

    def max_nodes(self, plan: Plan) -> int:
        """The root."""
        return 1

    def prefill(self) -> None:
        """Nothing to take in."""

    def propose(self, requests: list[Request], rng: Philox, params: SamplingParams) -> Draft:
        """The roots."""
        return Draft(chains([[request.root] for request in requests], rng.seed.device))

    def commit(self, nodes: Tensor, new_tokens: list[list[int]]) -> None:
        """Nothing to learn."""

    def drop(self, row: int, last: int) -> None:
        """Nothing to move."""


def chains(tokens: list[list[int]], device: torch.device) -> DraftTree:
    """Packed chains of tokens that the host knows, so that no bound has to be read back."""
    lengths = [len(chain) for chain in tokens]
    cu_nodes = [0]
    for length in lengths:
        cu_nodes.append(cu_nodes[-1] + length)

    def ints(values) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    flat = [token for chain in tokens for token in chain]
    parents = [place - 1 for length in lengths for place in range(length)]
    longest = max(lengths, default=1)
    return DraftTree(ints(flat), ints(parents), ints(cu_nodes), longest, longest - 1)
