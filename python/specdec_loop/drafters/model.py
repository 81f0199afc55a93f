"""A smaller model of the same vocabulary as the drafter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec_kernels import DraftTree, Philox, SamplingParams, compact_kv_
from specdec_kernels.trees import branching_tree

from .. import attend
from ..policies import Fixed, Policy
from ..requests import Request, last_positions
from ..statistics import Statistics, parameter_bytes
from .base import Draft, Drafter, Plan, chains
from .growth import RANKED, Grown, grow_chain, grow_drawn, grow_ranked
from .head import Head, make_head


class ModelDrafter(Drafter):
    """Drafts chains and trees with a model of its own.

    The body of the model runs on the same kind of cache as the target; its head goes through `head_topk` and
    `head_sample`. Chains are drawn (the argmax at temperature 0). Trees are grown as the verification method supposes:
    by rank for `greedy`, `target_only` and `typical`, else drawn.

    Args:
        model: a causal LM whose vocabulary is the target's.
        rows: [R] ascending ids to which drafts are limited (see `vocab.select_rows`); the weight is not copied.
        head: which head drafts: `full`, `trimmed` (to `rows`), `int8`, `int4` or `fp8` (a quantised copy, of which
            `rows` may be read alone), or a Head, e.g. LowRankHead or ShortlistHead. Default: by `rows`.
        policy: when a chain stops before the draft length.
    """

    tree_method = "without_replacement"

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        rows: Tensor | None = None,
        head: str | Head | None = None,
        policy: Policy | None = None,
    ):
        self.model, self.head, self.policy = model, make_head(model, head, rows), policy or Fixed()
        self.cache: attend.SlotCache | None = None
        self.plan: Plan | None = None
        self.statistics: Statistics | None = None
        self.requests: list[Request] = []
        self.cached: list[int] = []  # slots of each row that hold committed tokens
        self.grown: Grown | None = None
        self.prefix_lens: Tensor | None = None

    def check(self, target: PreTrainedModel, plan: Plan) -> None:
        """See Drafter."""
        ours, theirs = (model.config.get_text_config().vocab_size for model in (self.model, target))
        if ours != theirs:
            raise ValueError(
                f"drafter: {_name(self.model)} has a vocabulary of {ours} ids and the target {_name(target)} one of "
                f"{theirs}; expected the same tokenizer"
            )
        if self.model.device != target.device:
            raise ValueError(f"drafter: expected the target's device {target.device}, got {self.model.device}")

    def max_nodes(self, plan: Plan) -> int:
        """See Drafter."""
        tree = plan.tree
        if tree is None:
            return plan.draft_length + 1
        if plan.method in RANKED:
            return max(tree.nodes, 1 + tree.width * (tree.depth - 1))
        return branching_tree(tree.branching).nodes

    def bytes_read(self) -> int:
        """See Drafter."""
        return parameter_bytes(self.model) - self.head.bytes_replaced + self.head.bytes_read

    @contextmanager
    def session(
        self, requests: list[Request], max_new_tokens: int, plan: Plan, statistics: Statistics
    ) -> Iterator[None]:
        """See Drafter."""
        self.requests, self.plan, self.statistics = list(requests), plan, statistics
        room = max((len(request.prompt) for request in requests), default=0) + max_new_tokens
        self.cache = attend.SlotCache(
            room + self.max_nodes(plan), last_positions(requests, max_new_tokens, self.model.device)
        )
        self.cached = [request.prefix_len for request in requests]
        self.head.backend = plan.backend
        self.policy.start(len(requests), plan.draft_length)
        try:
            with attend.attending(self.model):
                yield
        finally:
            self.cache = self.grown = self.statistics = None
            self.requests = []

    def prefill(self) -> None:
        """See Drafter."""
        attend.prefill(self.model.base_model, self.cache, [request.prompt for request in self.requests])

    def propose(self, requests: list[Request], rng: Philox, params: SamplingParams) -> Draft:
        """See Drafter."""
        plan = self.plan
        self.prefix_lens = rng.offset.to(torch.int32)
        # The last round left out what was not drafted or never fed: usually the root alone, at times its parent too.
        pending = chains([r.since(n) for r, n in zip(requests, self.cached, strict=True)], rng.seed.device)
        ends = pending.cu_nodes[1:] - 1
        starts = self.prefix_lens - pending.cu_nodes.diff() + 1
        hidden = self._feed_at(pending, None, starts)[ends]
        roots = pending.tokens[ends]
        if plan.tree is None:
            sampled = None if plan.method in RANKED else (rng, params.temperature)
            self.grown = grow_chain(self._feed, self.head, hidden, roots, plan.draft_length, self.policy, sampled)
        elif plan.method in RANKED:
            self.grown = grow_ranked(self._feed, self.head, hidden, roots, plan.tree)
        else:
            shape = branching_tree(plan.tree.branching)
            self.grown = grow_drawn(self._feed, self.head, hidden, roots, shape, plan.method, rng, params.temperature)
        return self.grown.draft

    def commit(self, nodes: Tensor, new_tokens: list[list[int]]) -> None:
        """See Drafter."""
        slots, tree = self.grown.slots, self.grown.draft.tree
        paths = torch.where(nodes < 0, -1, slots.gather(1, nodes.clamp(min=0).long())).to(torch.int32)
        if self.plan.tree is not None:
            compact_kv_(self.cache.buffers(len(paths)), paths, self.prefix_lens, backend=self.plan.backend)
        kept = (paths >= 0).sum(1)
        accepted = (nodes >= 0).sum(1) - 1
        self.cached = (self.prefix_lens + kept).tolist()
        if self.plan.tree is None:
            self.policy.update((tree.cu_nodes.diff() - 1).tolist(), accepted.tolist())

    def drop(self, row: int, last: int) -> None:
        """See Drafter."""
        if row != last:
            self.cache.move_row(last, row, self.cached[last])
            self.cached[row] = self.cached[last]
        self.cached.pop()
        self.policy.drop(row, last)

    def _feed(self, tree: DraftTree, nodes: Tensor | None, behind: int = 0) -> Tensor:
        return self._feed_at(tree, nodes, self.prefix_lens + behind)

    def _feed_at(self, tree: DraftTree, nodes: Tensor | None, prefix_lens: Tensor) -> Tensor:
        """[n, D]: what the body makes of the nodes."""
        self.statistics.draft_calls += 1
        positions, step = attend.tree_step(tree, prefix_lens, nodes)
        tokens = tree.tokens if nodes is None else tree.tokens[nodes]
        return attend.forward(self.model.base_model, self.cache, tokens, positions, step).last_hidden_state[0]


def _name(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} {model.config.name_or_path or '(unnamed)'}"
