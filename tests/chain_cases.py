"""Random ragged chains for the backends of `verify_chain`, and what any correct answer to them must satisfy."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor

import specdec_kernels as sk
from specdec_kernels import philox
from specdec_kernels.reference.rows import Rows

# fp32 decides as exact arithmetic does, but for what lies this close to a threshold.
BAND = 1e-6


@dataclass
class Case:
    """The arguments of one call of `verify_chain`."""

    tokens: Tensor
    cu_nodes: Tensor
    target: Tensor
    draft: Tensor | None
    max_depth: int
    options: dict = field(default_factory=dict)

    def run(self, backend: str, **changes) -> sk.Verified:
        options = {"logprobs": True, "max_depth": self.max_depth, **self.options, **changes}
        return sk.verify_chain(self.tokens, self.cu_nodes, self.target, self.draft, backend=backend, **options)

    def with_options(self, **changes) -> Case:
        return replace(self, options={**self.options, **changes})

    def requests(self) -> list[range]:
        return [range(first, end) for first, end in pairwise(self.cu_nodes.tolist())]

    def owners(self) -> Tensor:
        """[N] int64, the request of each node."""
        sizes = (self.cu_nodes[1:] - self.cu_nodes[:-1]).long()
        return torch.arange(len(sizes)).repeat_interleave(sizes)

    def is_draft(self, node: int, nodes: range) -> bool:
        return node in nodes and node > nodes.start and 0 <= int(self.tokens[node]) < self.target.shape[1]

    def select(self, order: list[int]) -> Case:
        """The same requests in another order, or some of them."""
        requests = self.requests()
        nodes = torch.tensor([i for b in order for i in requests[b]], dtype=torch.int64)
        sizes = torch.tensor([0, *(len(requests[b]) for b in order)], dtype=torch.int32)
        options = dict(self.options)
        options["rng"] = sk.Philox(options["rng"].seed[order], options["rng"].offset[order])
        for name in ("params", "draft_params"):
            temperature, allowed = options[name].temperature, options[name].allowed
            options[name] = sk.SamplingParams(
                temperature=temperature[order] if isinstance(temperature, Tensor) else temperature,
                allowed=None if allowed is None else allowed[nodes],
            )
        cu_nodes = sizes.cumsum(0, dtype=torch.int32)
        draft = None if self.draft is None else self.draft[nodes]
        return Case(self.tokens[nodes], cu_nodes, self.target[nodes], draft, self.max_depth, options)

    def target_probs(self) -> Tensor:
        """[N, V] float64."""
        return self._probs(self.target, self.options["params"], None)

    def draft_probs(self) -> Tensor:
        """[N, V] float64; a row that holds the distribution of the next node's token."""
        if self.draft is None:
            point = torch.zeros(self.target.shape, dtype=torch.float64)
            following = self.tokens.roll(-1).long().clamp(0, self.target.shape[1] - 1)
            return point.scatter(1, following[:, None], 1.0)
        return self._probs(self.draft, self.options["draft_params"], self.options.get("draft_vocab"))

    def _probs(self, logits: Tensor, params: sk.SamplingParams, vocab: Tensor | None) -> Tensor:
        packed, temperature = None, params.temperature
        if isinstance(temperature, Tensor):
            packed = torch.tensor([[t, 0.0, 1.0, 0.0] for t in temperature.tolist()]).reshape(-1, 4)
            temperature = 1.0
        scalars = (temperature, 0.0, 1.0, 0.0)
        vocabulary = self.target.shape[1]
        rows = Rows(logits.double(), vocabulary, vocab=vocab, params=packed, scalars=scalars, allowed=params.allowed)
        return rows.probs(torch.arange(len(logits)), self.owners())[0]


def bit_mask(allowed: Tensor) -> Tensor:
    """[N, V] bool as [N, ceil(V/32)] int32 words."""
    rows, size = allowed.shape
    padded = torch.zeros(rows, (size + 31) // 32 * 32, dtype=torch.int64)
    padded[:, :size] = allowed
    return (padded.view(rows, -1, 32) << torch.arange(32)).sum(2).to(torch.int32)


def random_case(
    seed: int, batch: int, vocabulary: int, dtype=torch.float32, *, longest: int = 8, trimmed: int | None = None,
    point_mass: bool = False, masked: bool = False, temperature=1.0, ties: bool = False, zeros: bool = False,
    gaps: bool = False, explicit: bool = False, strided: bool = False,
) -> Case:  # fmt: skip
    """Ragged chains of 0..longest drafts, drawn from a q that resembles p, so that some are accepted and some are not.

    Args:
        trimmed: size of the drafter's vocabulary.
        point_mass: no draft logits.
        masked: both sides have `allowed` masks.
        temperature: of p and q, a number or a [B] tensor.
        ties: few distinct logits. zeros: a third of them is -inf. gaps: some drafts are -1 or V.
        explicit: uniforms instead of Philox. strided: logits are a window of a wider and longer tensor.
    """
    g = torch.Generator().manual_seed(seed)
    cu_nodes = torch.zeros(batch + 1, dtype=torch.int32)
    cu_nodes[1:] = (torch.randint(0, longest + 1, (batch,), generator=g) + 1).cumsum(0)
    nodes = int(cu_nodes[-1])
    target = torch.randn(nodes, vocabulary, generator=g) * 2
    draft = target + 0.6 * torch.randn(nodes, vocabulary, generator=g)
    if ties:
        target, draft = target.round(), draft.round()
    if zeros:
        target[torch.rand(target.shape, generator=g) < 0.3] = -torch.inf
        draft[torch.rand(draft.shape, generator=g) < 0.3] = -torch.inf
        target[:, vocabulary // 2], draft[:, 0] = 1.0, 1.0
    options: dict = {}
    if trimmed is not None:
        options["draft_vocab"] = torch.randperm(vocabulary, generator=g)[:trimmed].sort().values.to(torch.int32)
        draft = draft[:, options["draft_vocab"].long()]
    masks = [None, None]
    if masked:
        keep = torch.rand(2, nodes, vocabulary, generator=g) < 0.7
        keep[:, :, vocabulary // 3] = True
        if trimmed is not None:
            keep[1, :, options["draft_vocab"][0].long()] = True
        masks = [bit_mask(keep[0]), bit_mask(keep[1])]
    target, draft = target.to(dtype), draft.to(dtype)
    if strided:
        target, draft = _window(target), _window(draft)
    options["params"] = sk.SamplingParams(temperature=temperature, allowed=masks[0])
    options["draft_params"] = sk.SamplingParams(temperature=temperature, allowed=masks[1])
    case = Case(torch.zeros(nodes, dtype=torch.int32), cu_nodes, target, draft, longest, options)
    if nodes:
        case.tokens[1:] = torch.multinomial(case.draft_probs(), 1, generator=g)[:-1, 0]
    if gaps:
        case.tokens[torch.rand(nodes, generator=g) < 0.15] = -1
        case.tokens[torch.rand(nodes, generator=g) < 0.05] = vocabulary
    if point_mass:
        case.draft = None
        options.pop("draft_vocab", None)
    if explicit:
        options["accept_uniforms"] = torch.rand(nodes, generator=g)
        options["final_uniforms"] = torch.rand(batch, generator=g)
    else:
        seeds = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=g)
        options["rng"] = sk.Philox(seeds, torch.randint(0, 2**40, (batch,), generator=g))
    return case


def _window(logits: Tensor) -> Tensor:
    """The same values with a row stride that is not their width, among NaN."""
    view = torch.full((2 * logits.shape[0], logits.shape[1] + 3), torch.nan, dtype=logits.dtype)[::2, 1:-2]
    return view.copy_(logits)


def check_walks(case: Case, got: sk.Verified) -> None:
    """Follow in float64 the token-wise walks that `got` reports: no decision may be wrong by more than BAND."""
    p, q = case.target_probs(), case.draft_probs()
    for b, nodes in enumerate(case.requests()):
        number, emitted = int(got.num_tokens[b]), got.tokens[b].tolist()
        padding = [-1] * (case.max_depth + 1 - number)
        assert number >= 1
        assert got.nodes[b].tolist() == [*range(number), *padding]
        assert emitted[number:] == padding
        for j in range(number):
            node, token = nodes.start + j, emitted[j]
            drafted = case.is_draft(node + 1, nodes)
            if j < number - 1:
                assert drafted and token == case.tokens[node + 1], (b, j)
                assert _coin(case, b, nodes, j + 1) * q[node, token] < p[node, token] + BAND, (b, j)
                continue
            rest = p[node]
            if drafted:
                x = case.tokens[node + 1]
                assert _coin(case, b, nodes, j + 1) * q[node, x] > p[node, x] - BAND, (b, j)
                left = (rest - q[node]).clamp(min=0)
                rest = left if left.sum() > 0 else rest
            mass, coin = rest.sum(), _coin(case, b, nodes, None)
            top, slack = rest[: token + 1].sum() / mass, BAND / mass
            assert rest[token] > 0 and top - rest[token] / mass - slack <= coin <= top + slack, (b, j)
        logs = p[nodes.start + torch.arange(number), torch.tensor(emitted[:number])].log().float()
        torch.testing.assert_close(got.logprobs[b, :number], logs, rtol=1e-5, atol=1e-5)
        assert got.logprobs[b, number:].isnan().all()


def _coin(case: Case, b: int, nodes: range, child: int | None) -> float:
    """The coin of the acceptance of local node `child`, or of the drawn token."""
    if "accept_uniforms" in case.options:
        if child is None:
            return case.options["final_uniforms"][b].item()
        return case.options["accept_uniforms"][nodes.start + child].item()
    rng = case.options["rng"]
    stream = philox.FINAL if child is None else philox.ACCEPT
    return philox.coins(rng.seed[b], rng.offset[b], stream, torch.tensor(child or 0)).item()
