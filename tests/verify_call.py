"""One call of verification, as data: run it anywhere, on any of its requests."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

import specdec_kernels as sk
from specdec_kernels.reference.rows import Rows

_PER_NODE = ("accept_uniforms",)
_PER_REQUEST = ("final_uniforms",)


@dataclass
class Case:
    """The arguments of one call of `verify_chain` (parents None) or `verify_tree`."""

    method: str
    tokens: Tensor
    parents: Tensor | None
    cu_nodes: Tensor
    target: Tensor
    draft: Tensor | None
    max_nodes: int
    max_depth: int
    counts: Tensor | None = None
    options: dict = field(default_factory=dict)

    def run(self, backend: str, device: str = "cpu", **changes) -> sk.Verified:
        """The result, on the CPU."""
        options = {"method": self.method, "logprobs": True, "backend": backend, **self.options, **changes}
        options = {name: _to(value, device) for name, value in options.items()}
        tensors = [_to(x, device) for x in (self.tokens, self.parents, self.cu_nodes, self.target, self.draft)]
        tokens, parents, cu_nodes, target, draft = tensors
        if parents is None:
            found = sk.verify_chain(tokens, cu_nodes, target, draft, max_depth=self.max_depth, **options)
        else:
            counts = _to(self.counts, device)
            tree = sk.DraftTree(tokens, parents, cu_nodes, self.max_nodes, self.max_depth, counts)
            found = sk.verify_tree(tree, target, draft, **options)
        return _to(found, "cpu")

    def requests(self) -> list[range]:
        return [range(first, end) for first, end in pairwise(self.cu_nodes.tolist())]

    def owners(self) -> Tensor:
        """[N] int64, the request of each node."""
        return torch.arange(len(self.cu_nodes) - 1).repeat_interleave(self.cu_nodes.diff().long())

    def with_options(self, **changes) -> Case:
        return replace(self, options={**self.options, **changes})

    def select(self, order: list[int]) -> Case:
        """The same requests in another order, some of them, or some of them several times."""
        requests = self.requests()
        nodes = torch.tensor([i for b in order for i in requests[b]], dtype=torch.int64)
        sizes = torch.tensor([0, *(len(requests[b]) for b in order)], dtype=torch.int32)

        def of_nodes(x):
            return None if x is None else x[nodes]

        def of_requests(x):
            return x[order] if isinstance(x, Tensor) else x

        options = dict(self.options)
        for name in ("params", "draft_params"):
            if options.get(name) is not None:
                numbers = (of_requests(x) for x in options[name][:4])
                options[name] = sk.SamplingParams(*numbers, allowed=of_nodes(options[name].allowed))
        if options.get("rng") is not None:
            options["rng"] = sk.Philox(*map(of_requests, options["rng"][:2]))
        if options.get("lossy") is not None:
            lossy = options["lossy"]
            options["lossy"] = lossy._replace(
                judge=of_nodes(lossy.judge), reflect_logits=of_nodes(lossy.reflect_logits)
            )
        options |= {name: of_nodes(options[name]) for name in _PER_NODE if name in options}
        options |= {name: of_requests(options[name]) for name in _PER_REQUEST if name in options}
        return replace(
            self, tokens=self.tokens[nodes], parents=of_nodes(self.parents), counts=of_nodes(self.counts),
            cu_nodes=sizes.cumsum(0, dtype=torch.int32), target=self.target[nodes], draft=of_nodes(self.draft),
            options=options,
        )  # fmt: skip

    def parents_of(self, request: range) -> list[int]:
        return list(range(-1, len(request) - 1)) if self.parents is None else self.parents[list(request)].tolist()

    def children_of(self, request: range) -> list[list[int]]:
        """The drafts below each node, in node order."""
        children: list[list[int]] = [[] for _ in request]
        there = [True]
        for node, parent in enumerate(self.parents_of(request)[1:], start=1):
            there.append(there[parent] and 0 <= int(self.tokens[request.start + node]) < self.target.shape[1])
            if there[-1]:
                children[parent].append(node)
        return children

    def target_probs(self) -> Tensor:
        """[N, V] float64, without what lossy rules do to logits."""
        return self._probs(self.target, self.options["params"], None)

    def draft_probs(self) -> Tensor:
        """[N, V] float64, what the children of each node are drawn from."""
        if self.draft is None:  # point masses, somewhere near the top
            return (2 * self.target.double()).nan_to_num(neginf=-1e9).softmax(1)
        return self._probs(self.draft, self.options["draft_params"], self.options.get("draft_vocab"))

    def _probs(self, logits: Tensor, params: sk.SamplingParams, vocab: Tensor | None) -> Tensor:
        numbers = [off if x is None else x for x, off in zip(params[:4], (1.0, 0, 1.0, 0.0), strict=True)]
        batch = len(self.cu_nodes) - 1
        packed = torch.stack([torch.as_tensor(x, dtype=torch.float32).expand(batch) for x in numbers], 1)
        rows = Rows(logits, self.target.shape[1], vocab=vocab, params=packed, allowed=params.allowed)
        return rows.log_weights(torch.arange(len(logits)), self.owners())[0].double().softmax(1)


def _to(value, device):
    if isinstance(value, Tensor):
        return value.to(device)
    return type(value)(*(_to(x, device) for x in value)) if isinstance(value, tuple) else value
