"""Drafts that continue the text as it continued before (prompt lookup, SAM decoding): no model at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from transformers import PreTrainedModel

from specdec_kernels import Philox, SamplingParams
from specdec_kernels.host import SuffixIndex, propose_trees

from ..requests import Request
from ..statistics import Statistics
from .base import Draft, Drafter, Plan, chains
from .growth import RANKED


class NgramDrafter(Drafter):
    """Looks the end of prompt + output up in itself (arXiv 2411.10666) and proposes what followed there.

    Chains follow the most frequent continuation of the longest match; trees are a trie of the continuations of the
    longest match and of shorter ones. A draft token is a point mass, a function of the text alone.

    Args:
        min_match: shortest match, in tokens, that is worth a draft.
        max_occurrences: most occurrences looked at for one draft.
        branches: most children of a tree's node.
        backend: of `specdec_kernels.host.SuffixIndex`; default: the compiled one where it was built.
    """

    def __init__(self, *, min_match: int = 1, max_occurrences: int = 64, branches: int = 4, backend: str | None = None):
        self.limits = {"min_match": min_match, "max_occurrences": max_occurrences}
        self.branches, self.backend = branches, backend
        self.indices: list[SuffixIndex] = []
        self.requests: list[Request] = []
        self.plan: Plan | None = None

    def check(self, target: PreTrainedModel, plan: Plan) -> None:
        """See Drafter."""
        if plan.tree is not None and plan.method not in RANKED:
            raise ValueError(
                f"method: expected one of {', '.join(map(repr, RANKED))} for trees of point masses, got {plan.method!r}"
            )

    def max_nodes(self, plan: Plan) -> int:
        """See Drafter."""
        return plan.draft_length + 1 if plan.tree is None else plan.tree.nodes

    @contextmanager
    def session(
        self, requests: list[Request], max_new_tokens: int, plan: Plan, statistics: Statistics
    ) -> Iterator[None]:
        """See Drafter."""
        self.requests, self.plan = list(requests), plan
        try:
            yield
        finally:
            self.requests, self.indices = [], []

    def prefill(self) -> None:
        """See Drafter."""
        self.indices = [SuffixIndex(request.prompt.cpu(), backend=self.backend) for request in self.requests]

    def propose(self, requests: list[Request], rng: Philox, params: SamplingParams) -> Draft:
        """See Drafter."""
        device, tree = rng.seed.device, self.plan.tree
        if tree is not None:
            shape = {"branches": self.branches, "max_depth": tree.depth}
            return Draft(propose_trees(self.indices, tree.nodes, device=device, **shape, **self.limits))
        drafts = [index.propose_chain(self.plan.draft_length, **self.limits).tolist() for index in self.indices]
        return Draft(chains([[r.root, *draft] for r, draft in zip(requests, drafts, strict=True)], device))

    def commit(self, nodes: Tensor, new_tokens: list[list[int]]) -> None:
        """See Drafter."""
        for index, tokens in zip(self.indices, new_tokens, strict=True):
            index.extend(tokens)

    def drop(self, row: int, last: int) -> None:
        """See Drafter."""
        self.indices[row] = self.indices[last]
        self.indices.pop()
