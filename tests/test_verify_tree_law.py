"""Compiled verification leaves the target's law unchanged, by counting: every exact method, chains and trees."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

import specdec_kernels as sk
from specdec_kernels.reference.rows import Rows
from tree_cases import COUNTED, NEEDS_Q, SCHEMES
from verify_backends import DEVICE, every_backend

pytestmark = every_backend("cpu", "cuda", cuda=pytest.mark.gpu)

VOCABULARY, SIGNIFICANCE = 16, 1e-4
FEW, MANY = 20_000, 200_000
CHAIN, TREE = (1, 1, 1), (3, 2)  # children of each node, by depth
METHODS = {
    "token": CHAIN,
    "block": CHAIN,
    "target_only": TREE,
    "multi_round": TREE,
    "without_replacement": TREE,
    "k_seq": TREE,
    "greedy_multi": TREE,
    "traversal": TREE,
    "traversal_iid": TREE,
}
BOTTOM_UP = ("block", "traversal", "traversal_iid")
FILTERS = {"params": {"top_k": 9, "top_p": 0.95, "min_p": 0.02}, "draft_params": {"top_k": 7, "top_p": 0.9}}
VARIANTS = {
    "plain": {},
    "bf16": {"dtype": torch.bfloat16},
    "trimmed": {"trimmed": True, "temperature": 1.7, "dtype": torch.float16},
    "filters": {**FILTERS, "temperature": 0.8},
    "filters_trimmed": {**FILTERS, "trimmed": True, "dtype": torch.bfloat16},
    "point_mass": {"point_mass": True},
    "counts": {"counts": True},
}


@dataclass
class World:
    """A target and a drafter whose next token depends on the last one only, and how one verifies the other."""

    method: str
    trials: int
    seed: int = 0
    dtype: torch.dtype = torch.float32
    temperature: float = 1.0
    trimmed: bool = False
    point_mass: bool = False
    counts: bool = False
    params: dict | None = None
    draft_params: dict | None = None
    verifier: str | None = None  # where it is not the method that the drafts were made for
    claimed: float | None = None  # the drafter's temperature as the verifier is told, where it drew with another

    def __post_init__(self):
        g = self.generator = torch.Generator().manual_seed(self.seed)
        self.vocab = torch.tensor([0, 2, 3, 5, 8, 9, 13] if self.trimmed else range(VOCABULARY))
        target = torch.randn(VOCABULARY, VOCABULARY, generator=g) * 1.5
        draft = target + 0.5 * torch.randn(VOCABULARY, VOCABULARY, generator=g)
        for logits in (target, draft):
            logits[torch.rand(logits.shape, generator=g) < 0.15] = -torch.inf
            logits[:, 3] = 0.5
        self.target, self.draft = target.to(self.dtype), draft[:, self.vocab].to(self.dtype)
        self.target_params = sk.SamplingParams(self.temperature, **(self.params or {}))
        self.drafter_params = sk.SamplingParams(self.temperature, **(self.draft_params or {}))
        self.p = self.probabilities(self.target, self.target_params, None)
        self.q = self.probabilities(self.draft, self.drafter_params, self.vocab)
        self.branching = METHODS[self.method]
        self.parents = [-1]
        level = [0]
        for k in self.branching:
            self.parents += [parent for parent in level for _ in range(k)]
            level = list(range(len(self.parents) - k * len(level), len(self.parents)))

    @staticmethod
    def probabilities(logits: Tensor, params: sk.SamplingParams, vocab) -> Tensor:
        """[V, V] float64: what follows each token."""
        numbers = [off if x is None else x for x, off in zip(params[:4], (1.0, 0, 1.0, 0.0), strict=True)]
        index = torch.arange(VOCABULARY)
        weights, _ = Rows(logits, VOCABULARY, vocab=vocab, scalars=numbers).log_weights(index, index)
        return weights.double().softmax(1)

    def siblings(self, parent: Tensor, k: int) -> Tensor:
        """[T, k] draws of what follows `parent` [T], as the method assumes; -1 where nothing is left to draw."""
        log_q = self.q.log()
        scheme = "top" if self.point_mass else SCHEMES[self.method]
        if scheme == "iid":
            return torch.multinomial(self.q[parent], k, True, generator=self.generator)
        fixed = {"top": k, "top_and_one": k - 1, "without_replacement": 0}[scheme]
        ranked, tops = log_q.topk(fixed, 1)
        keys = log_q.scatter(1, tops, -torch.inf)[parent]
        keys -= torch.empty_like(keys).exponential_(generator=self.generator).log()
        values, drawn = torch.cat([ranked[parent], keys.topk(k - fixed, 1).values], 1), keys.topk(k - fixed, 1).indices
        return torch.cat([tops[parent], drawn], 1).masked_fill(values == -torch.inf, -1)

    def grow(self, roots: Tensor) -> tuple[Tensor, Tensor | None]:
        """([T, n] tokens, [T, n] counts): the drafts below `roots`, with equal siblings merged if there are counts."""
        tokens = torch.full((self.trials, len(self.parents)), -1)
        counts = torch.ones_like(tokens) if self.counts else None
        tokens[:, 0] = roots
        for parent in range(len(self.parents)):
            below = [node for node, other in enumerate(self.parents) if other == parent]
            if not below:
                continue
            drawn = self.siblings(tokens[:, parent].clamp(min=0), len(below))
            if self.counts:
                same = drawn[:, :, None] == drawn[:, None, :]
                counts[:, below] = same.sum(2)
                drawn = drawn.masked_fill(same.tril(-1).any(2), -1)
            tokens[:, below] = drawn
        return tokens, counts

    def step(self, roots: Tensor, offset: Tensor, seed: Tensor, backend: str) -> sk.Verified:
        device, nodes = DEVICE[backend], len(self.parents)
        tokens, counts = self.grow(roots)
        rows = tokens.reshape(-1).clamp(min=0).to(device)
        draft_params = self.drafter_params._replace(temperature=self.claimed or self.temperature)
        options = {
            "method": self.verifier or self.method,
            "draft_vocab": self.vocab.to(device, torch.int32) if self.trimmed and not self.point_mass else None,
            "params": self.target_params,
            "draft_params": draft_params,
            "rng": sk.Philox(seed.to(device), offset.to(device)),
            "backend": backend,
        }
        cu_nodes = torch.arange(self.trials + 1, dtype=torch.int32, device=device) * nodes
        tokens = tokens.reshape(-1).to(device, torch.int32)
        target = self.target.to(device)[rows]
        draft = None if self.point_mass else self.draft.to(device)[rows]
        depth = len(self.branching)
        if self.branching == CHAIN:
            found = sk.verify_chain(tokens, cu_nodes, target, draft, max_depth=depth, **options)
        else:
            parents = torch.tensor(self.parents, dtype=torch.int32, device=device).repeat(self.trials)
            counts = None if counts is None else counts.reshape(-1).to(device, torch.int32)
            tree = sk.DraftTree(tokens, parents, cu_nodes, nodes, depth, counts)
            found = sk.verify_tree(tree, target, draft, **options)
        return sk.Verified(*(None if x is None else x.cpu() for x in found))

    def sequences(self, length: int, backend: str, *, steps: int) -> tuple[Tensor, sk.Verified]:
        """([T, 1+length] tokens after a random root, what the first step gave); p goes on after the last step."""
        g = self.generator
        text = torch.full((self.trials, 1 + length), -1)
        text[:, 0] = torch.randint(VOCABULARY, (self.trials,), generator=g)
        seed = torch.randint(-(2**63), 2**63 - 1, (self.trials,), generator=g)
        written, first = torch.zeros(self.trials, dtype=torch.int64), None
        for _ in range(steps):
            last = text.gather(1, written[:, None])[:, 0]
            found = self.step(last, written, seed, backend)
            first = first or found
            for j in range(found.tokens.shape[1]):
                there = (found.num_tokens > j) & (written < length)
                written += there
                text[there, written[there]] = found.tokens[there, j].long()
        for j in range(length):
            missing = text[:, j + 1] < 0
            text[missing, j + 1] = torch.multinomial(self.p[text[missing, j]], 1, generator=g)[:, 0]
        return text, first


def pearson(counts: Tensor, expected: Tensor) -> tuple[float, int]:
    """(statistic, degrees of freedom); in each row, cells of less than 5 count with the row's largest."""
    usable = expected > 5
    largest = expected.argmax(1, keepdim=True)
    merged = [x.masked_fill(usable, 0.0).sum(1, keepdim=True) for x in (counts, expected)]
    counts, expected = (x.scatter_add(1, largest, m) for x, m in zip((counts, expected), merged, strict=True))
    statistic = ((counts - expected) ** 2 / expected)[usable].sum()
    return float(statistic), int((usable.sum(1) - 1).clamp(min=0).sum())


def check_position(law: Tensor, context: Tensor, token: Tensor, name: str) -> None:
    """`token` [M] has the target's law given its `context` [M], ids whose last digit to base V is the token before."""
    law = law.repeat(int(context.max()) // VOCABULARY + 1, 1)
    counts = torch.bincount(context * VOCABULARY + token, minlength=law.numel()).to(law.dtype).view(law.shape)
    assert (counts[law == 0] == 0).all(), f"{name}: a token of probability 0"
    statistic, freedom = pearson(counts, law * counts.sum(1, keepdim=True))
    assert freedom > 5, f"{name}: too few came that far"
    assert statistic < chi2.isf(SIGNIFICANCE, freedom), f"{name}: {statistic:.0f} with {freedom} degrees of freedom"


def check_law(world: World, text: Tensor) -> None:
    """At every position a token depends on the one before as the target says, and on nothing before that."""
    for j in range(text.shape[1] - 1):
        before = text[:, j] if j == 0 else text[:, j - 1] * VOCABULARY + text[:, j]
        check_position(world.p, before, text[:, j + 1], f"position {j}")


def check_walks(world: World, backend: str) -> None:
    depth = len(world.branching)
    text, found = world.sequences(depth + 1, backend, steps=1)
    assert (found.num_tokens >= 1).all() and (found.num_tokens > depth).any()
    check_law(world, text)
    if world.method not in BOTTOM_UP:  # where a walk goes on, it has seen nothing yet of what follows
        for j in range(depth + 1):
            there = found.num_tokens > j
            check_position(world.p, text[there, j], text[there, j + 1], f"walks that reach position {j}")


def fits(method: str, variant: str) -> bool:
    if variant == "counts":
        return method in COUNTED
    return variant != "point_mass" or method not in NEEDS_Q


CASES = [(method, variant) for method in METHODS for variant in VARIANTS if fits(method, variant)]


@pytest.mark.parametrize(("method", "variant"), CASES)
def test_law(backend, method, variant):
    check_walks(World(method, FEW, **VARIANTS[variant]), backend)


@pytest.mark.full
@pytest.mark.parametrize(("method", "variant"), CASES)
def test_law_of_many_trials(backend, method, variant):
    check_walks(World(method, MANY, seed=1, **VARIANTS[variant]), backend)


@pytest.mark.parametrize("method", METHODS)
def test_law_of_eight_tokens(backend, method):
    """Step after step, each from where the last one ended."""
    world = World(method, FEW, seed=2)
    check_law(world, world.sequences(8, backend, steps=8)[0])


@pytest.mark.full
@pytest.mark.parametrize("variant", ["bf16", "filters_trimmed"])
@pytest.mark.parametrize("method", METHODS)
def test_law_of_eight_tokens_of_many_trials(backend, method, variant):
    world = World(method, MANY, seed=3, **VARIANTS[variant])
    check_law(world, world.sequences(8, backend, steps=8)[0])


@pytest.mark.parametrize("method", [m for m in METHODS if m != "target_only"])
def test_counting_sees_a_wrong_drafter(backend, method):
    """Told another q than the one that drew, no verifier keeps the law."""
    with pytest.raises(AssertionError, match="degrees of freedom"):
        check_walks(World(method, FEW, claimed=2.5), backend)


@pytest.mark.parametrize(
    ("drawn_for", "verifier"),
    [
        ("without_replacement", "multi_round"),
        ("multi_round", "without_replacement"),
        ("traversal", "traversal_iid"),
        ("traversal_iid", "traversal"),
        ("greedy_multi", "without_replacement"),
    ],
)
def test_counting_sees_drafts_made_for_another_method(backend, drawn_for, verifier):
    world = World(drawn_for, FEW, verifier=verifier)
    with pytest.raises(AssertionError, match="degrees of freedom"):
        check_walks(replace(world, trials=3 * FEW), backend)
