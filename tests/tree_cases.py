"""Random chains and trees for every method of verification, drafted the way the method assumes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

import specdec_kernels as sk
from specdec_kernels.verify import CHAIN_METHODS, TREE_METHODS
from verify_call import Case

# How the children of a node are drawn from q.
SCHEMES = {
    "token": "iid",
    "block": "iid",
    "multi_round": "iid",
    "k_seq": "iid",
    "traversal_iid": "iid",
    "without_replacement": "without_replacement",
    "traversal": "without_replacement",
    "greedy_multi": "top_and_one",
    "greedy": "top",
    "target_only": "top",
    "typical": "top",
}
NEEDS_Q = ("k_seq", "greedy_multi")
COUNTED = ("multi_round", "k_seq")
LENIENT = ("token", "multi_round", "without_replacement", "k_seq")
JUDGED = (*LENIENT, "greedy", "target_only", "greedy_multi", "typical")
FORMS = [(m, True) for m in CHAIN_METHODS] + [(m, False) for m in TREE_METHODS]  # (method, whether it is a chain)
FORM_IDS = [f"{m}-chain" if chain else m for m, chain in FORMS]


def bit_mask(allowed: Tensor) -> Tensor:
    """[N, V] bool as [N, ceil(V/32)] int32 words."""
    rows, size = allowed.shape
    words = torch.zeros(rows, (size + 31) // 32, 32, dtype=torch.int64)
    words.flatten(1)[:, :size] = allowed
    return (words << torch.arange(32)).sum(2).to(torch.int32)


def window(logits: Tensor) -> Tensor:
    """The same values with a row stride that is not their width, among NaN."""
    view = torch.full((2 * logits.shape[0], logits.shape[1] + 3), torch.nan, dtype=logits.dtype)[::2, 1:-2]
    return view.copy_(logits)


@dataclass(frozen=True)
class Spec:
    """What a random case looks like. Every field but the first three has a default that leaves it plain."""

    method: str
    chain: bool
    seed: int
    batch: int = 5
    nodes: int = 9  # most nodes of a request
    vocabulary: int = 33
    dtype: torch.dtype = torch.float32
    distance: float = 0.6  # how far the drafter's logits are from the target's
    ties: bool = False  # few distinct logits
    zeros: bool = False  # a third of the logits is -inf
    gaps: bool = False  # some nodes hold no token
    trimmed: int | None = None  # size of the drafter's vocabulary
    point_mass: bool = False  # no draft logits
    masked: bool = False  # both sides have `allowed` masks
    temperature: float | str = 1.0  # "mixed": a tensor in which some are 0
    filters: str = ""  # of p, of q: letters k, p, m for top_k, top_p, min_p; capital letters: a tensor
    draft_filters: str = ""
    counts: bool = False  # merged draws
    explicit: bool = False  # uniforms instead of Philox
    strided: bool = False  # logits are a window of a wider and longer tensor
    roomy: bool = False  # max_nodes and max_depth are bounds, not the largest values
    lossy: str = ""  # any of judge, lenience, reflect, synthetic


def fits(spec: Spec) -> bool:
    """Whether the method takes what the case brings."""
    return not (
        (spec.point_mass and (spec.method in NEEDS_Q or spec.counts))
        or (spec.counts and spec.method not in COUNTED)
        or ("judge" in spec.lossy and spec.method not in JUDGED)
        or ("lenience" in spec.lossy and spec.method not in LENIENT)
        or ("synthetic" in spec.lossy and spec.lossy != "synthetic")
    )


def random_case(spec: Spec, shapes: list[list[int]] | None = None) -> Case:
    """`shapes`: the parents of each request's nodes, in place of random ones; spec.batch and spec.nodes fit them."""
    g = torch.Generator().manual_seed(spec.seed)
    shapes = [_shape(spec, g) for _ in range(spec.batch)] if shapes is None else shapes
    parents = torch.tensor([x for shape in shapes for x in shape], dtype=torch.int32)
    cu_nodes = torch.tensor([0, *accumulate(map(len, shapes))], dtype=torch.int32)
    deepest = max((depth for shape in shapes for depth in _depths(shape)), default=0)
    nodes, V = len(parents), spec.vocabulary
    target = torch.randn(nodes, V, generator=g) * 2
    draft = target + spec.distance * torch.randn(nodes, V, generator=g)
    if spec.ties:
        target, draft = target.round(), draft.round()
    if spec.zeros:
        target[torch.rand(target.shape, generator=g) < 0.3] = -torch.inf
        draft[torch.rand(draft.shape, generator=g) < 0.3] = -torch.inf
        target[:, V // 2] = 1.0
    options: dict = {}
    ids = torch.arange(V)
    if spec.trimmed is not None and not spec.point_mass:
        ids = torch.randperm(V, generator=g)[: spec.trimmed].sort().values
        options["draft_vocab"] = ids.to(torch.int32)
        draft = draft[:, ids]
    if spec.zeros:
        draft[:, 0] = 1.0
    masks = [None, None]
    if spec.masked:
        keep = torch.rand(2, nodes, V, generator=g) < 0.7
        keep[0, :, V // 2] = keep[1, :, ids[0]] = True
        masks = [bit_mask(keep[0]), bit_mask(keep[1])]
    target, draft = target.to(spec.dtype), draft.to(spec.dtype)
    if spec.strided:
        target, draft = window(target), window(draft)
    temperature = spec.temperature
    if temperature == "mixed":
        temperature = torch.tensor([1.0, 0.0, 0.5, 2.0, 0.05])[torch.randint(5, (spec.batch,), generator=g)]
    options["params"] = _params(spec.filters, temperature, masks[0], spec.batch, g)
    options["draft_params"] = _params(spec.draft_filters, temperature, masks[1], spec.batch, g)
    if spec.explicit:
        options["accept_uniforms"] = torch.rand(nodes, generator=g)
        options["final_uniforms"] = torch.rand(spec.batch, generator=g)
    if not spec.explicit or spec.counts:
        seeds = torch.randint(-(2**63), 2**63 - 1, (spec.batch,), generator=g)
        options["rng"] = sk.Philox(seeds, torch.randint(0, 2**40, (spec.batch,), generator=g))
    if spec.lossy:
        options["lossy"] = _lossy(spec, target, deepest + 2 * spec.roomy, g)
    case = Case(
        spec.method, torch.zeros(nodes, dtype=torch.int32), None if spec.chain else parents, cu_nodes, target,
        None if spec.point_mass else draft, spec.nodes + 2 * spec.roomy, deepest + 2 * spec.roomy,
        counts=torch.ones(nodes, dtype=torch.int32) if spec.counts else None, options=options,
    )  # fmt: skip
    _draw(case, g)
    if spec.gaps:
        lost = torch.rand(nodes, generator=g)
        case.tokens[lost < 0.12] = -1
        case.tokens[lost > 0.95] = V
        case.tokens[lost > 0.98] = 2**31 - 1
    return case


def _shape(spec: Spec, g) -> list[int]:
    """Parents of 1..spec.nodes nodes; some trees are wide, some are deep."""
    size = int(torch.randint(1, spec.nodes + 1, (), generator=g))
    if spec.chain:
        return list(range(-1, size - 1))
    reach = size if torch.rand((), generator=g) < 0.7 else 2
    return [-1, *(node - 1 - int(torch.randint(min(node, reach), (), generator=g)) for node in range(1, size))]


def _depths(parents: list[int]) -> list[int]:
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    return depths


def _params(filters: str, temperature, allowed, batch: int, g) -> sk.SamplingParams:
    choices = {"k": ("top_k", [1, 2, 5, 20, 1000]), "p": ("top_p", [0.0, 0.3, 0.9, 0.99]), "m": ("min_p", [0.02, 0.3])}
    chosen = {}
    for letter in filters:
        name, values = choices[letter.lower()]
        if letter.isupper():
            off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}[name]
            chosen[name] = torch.tensor([*values, off])[torch.randint(len(values) + 1, (batch,), generator=g)]
        else:
            chosen[name] = values[int(torch.randint(len(values), (), generator=g))]
    return sk.SamplingParams(temperature=temperature, allowed=allowed, **chosen)


def _lossy(spec: Spec, target: Tensor, max_depth: int, g):
    fields: dict = {}
    if "judge" in spec.lossy:
        fields["judge"] = torch.rand(len(target), generator=g) < 0.2
    if "reflect" in spec.lossy:
        mixed = target.float().nan_to_num(neginf=-4.0) + torch.randn(target.shape, generator=g)
        fields |= {"reflect_logits": mixed.to(target.dtype), "reflect_weight": 0.3}
    if "synthetic" in spec.lossy:
        rates = torch.rand(max_depth, generator=g)
        fields["synthetic"] = rates if torch.rand((), generator=g) < 0.5 else 0.6
    if "lenience" in spec.lossy:
        fields["lenience"] = 0.7
    return sk.Lossy(**fields)


def _draw(case: Case, g) -> None:
    """Fill in tokens (and counts): the children of each node, drawn from its q as the method says."""
    probs, scheme = case.draft_probs(), SCHEMES[case.method]
    for request in case.requests():
        children: dict[int, list[int]] = {}
        for node, parent in enumerate(case.parents_of(request)):
            if parent >= 0:
                children.setdefault(parent, []).append(node)
        for parent, below in children.items():
            q = probs[request.start + parent]
            drawn = _siblings(q, len(below), "without_replacement" if case.draft is None else scheme, g)
            if case.counts is not None:  # twice as many draws as nodes, equal ones merged
                drawn += _siblings(q, len(below), scheme, g)
                distinct = list(dict.fromkeys(drawn))[: len(below)]
                for node, token in zip(below, distinct, strict=False):
                    case.counts[request.start + node] = drawn.count(token)
                drawn = distinct
            drawn += [-1] * (len(below) - len(drawn))
            case.tokens[[request.start + node for node in below]] = torch.tensor(drawn, dtype=torch.int32)


def _siblings(q: Tensor, k: int, scheme: str, g) -> list[int]:
    """At most k tokens, as many as have a positive probability."""
    if scheme == "iid":
        return torch.multinomial(q, k, True, generator=g).tolist()
    k = min(k, int((q > 0).sum()))
    if scheme == "without_replacement":
        return torch.multinomial(q, k, generator=g).tolist()
    tops = q.argsort(descending=True, stable=True)[:k]
    if scheme == "top":
        return tops.tolist()
    rest = q.index_fill(0, tops[:-1], 0.0)
    return [*tops[:-1].tolist(), int(torch.multinomial(rest, 1, generator=g))]
