"""Lossy hooks on the reference: each does what `Lossy` says, and nothing where it is off."""

from __future__ import annotations

import pytest
import torch

from specdec_kernels import DraftTree, Lossy, SamplingParams, verify_chain, verify_tree
from specdec_kernels.reference.rows import draw
from specdec_kernels.verify import CHAIN_METHODS, TREE_METHODS
from verify_cases import random_logits, random_tree, streams

JUDGED = [m for m in TREE_METHODS if not m.startswith("traversal")]
LENIENT = ("token", "multi_round", "without_replacement", "k_seq")
V, BATCH = 9, 12


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Problem:
    """Random trees, or chains of 3 drafts, with logits of both sides."""

    def __init__(self, method: str, seed: int = 0, dtype=torch.float32):
        self.method, self.is_chain = method, method in ("token", "block")
        if self.is_chain:
            self.tree = DraftTree.chain(torch.randint(V, (BATCH, 4), generator=generator(seed)))
        else:
            self.tree = random_tree(BATCH, 9, V, generator(seed))
        self.nodes = len(self.tree.tokens)
        self.target = random_logits(self.nodes, V, generator(seed + 1), dtype=dtype)
        self.draft = random_logits(self.nodes, V, generator(seed + 2), dtype=dtype)

    def run(self, lossy=None, **changes):
        options = {
            "method": self.method, "rng": streams(BATCH), "backend": "reference", "logprobs": True, "lossy": lossy,
            "target_logits": self.target, "draft_logits": self.draft, **changes,
        }  # fmt: skip
        if self.is_chain:
            return verify_chain(self.tree.tokens, self.tree.cu_nodes, max_depth=self.tree.max_depth, **options)
        return verify_tree(self.tree, **options)

    def children(self, request: int) -> dict[int, list[int]]:
        start, end = self.tree.cu_nodes[request : request + 2].tolist()
        found: dict[int, list[int]] = {node: [] for node in range(end - start)}
        for node, parent in enumerate(self.tree.parents[start:end].tolist()):
            if parent >= 0:
                found[parent].append(node)
        return found


def same_bits(a, b) -> bool:
    return all(torch.equal(x.view(torch.int32), y.view(torch.int32)) for x, y in zip(a, b, strict=True))


def path(found, request: int) -> list[int]:
    return [node for node in found.nodes[request].tolist() if node >= 0]


@pytest.mark.parametrize("method", ("token", "block", *TREE_METHODS))
def test_hooks_that_are_off_change_no_bit(method):
    problem = Problem(method)
    plain = problem.run()
    reflected = random_logits(problem.nodes, V, generator(9)).masked_fill(problem.target > 1, -torch.inf)
    off = [Lossy(), Lossy(lenience=1), Lossy(reflect_logits=reflected, reflect_weight=0.0)]
    if method != "block" and not method.startswith("traversal"):
        roots = torch.zeros(problem.nodes, dtype=torch.bool)
        roots[problem.tree.cu_nodes[:-1].long()] = True
        off += [Lossy(judge=torch.zeros_like(roots)), Lossy(judge=roots)]
    for lossy in off:
        assert same_bits(problem.run(lossy), plain), lossy


@pytest.mark.parametrize("method", ["token", *(m for m in JUDGED if m != "typical")])
def test_a_judge_accepts_a_node_and_leaves_other_decisions_alone(method):
    changed = 0
    for seed in range(3):
        problem = Problem(method, seed)
        plain = problem.run()
        for request in range(BATCH):
            start, before = int(problem.tree.cu_nodes[request]), path(plain, request)
            for parent, nodes in problem.children(request).items():
                tried = nodes[-1:] + nodes[:-1] if method == "greedy_multi" else nodes
                for node in nodes:
                    judge = torch.zeros(problem.nodes, dtype=torch.bool)
                    judge[start + node] = True
                    found = problem.run(Lossy(judge=judge))
                    untouched = torch.arange(BATCH) != request
                    assert torch.equal(found.tokens[untouched], plain.tokens[untouched])
                    depth = before.index(parent) if parent in before else len(before)
                    taken = before[depth + 1] if depth + 1 < len(before) else None
                    if parent not in before or (taken is not None and tried.index(taken) <= tried.index(node)):
                        assert torch.equal(found.tokens[request], plain.tokens[request])
                    else:
                        assert path(found, request)[: depth + 2] == [*before[: depth + 1], node]
                        changed += 1
    assert changed > 10


@pytest.mark.parametrize("method", ["token", *JUDGED])
def test_a_judge_of_everything_accepts_the_first_that_is_tried(method):
    problem = Problem(method, 3)
    found = problem.run(Lossy(judge=torch.ones(problem.nodes, dtype=torch.bool)))
    for request in range(BATCH):
        children = problem.children(request)
        if method == "typical":  # the longest path, the first of them in node order
            paths = {0: [0]}
            for parent, nodes in children.items():
                paths.update({node: [*paths[parent], node] for node in nodes})
            expected = max((paths[node] for node in sorted(paths)), key=len)
        else:
            expected = [0]
            while nodes := children[expected[-1]]:
                expected.append(nodes[-1 if method == "greedy_multi" else 0])
        assert path(found, request) == expected


def test_a_judge_extends_typical_paths_node_by_node():
    problem = Problem("typical", 4)
    judge = torch.rand(problem.nodes, generator=generator(5)) < 0.3
    found, longer = problem.run(Lossy(judge=judge)), 0
    plain = problem.run()
    for request in range(BATCH):
        start, kept = int(problem.tree.cu_nodes[request]), {0: [0]}
        for parent, nodes in problem.children(request).items():
            if parent not in kept:
                continue
            p = problem.target[start + parent].softmax(0)
            bar = min(0.09, 0.3 * float(p.pow(p).log().sum().exp()))  # exp(-H) = prod p^p
            for node in nodes:
                if judge[start + node] or float(p[problem.tree.tokens[start + node]]) > bar:
                    kept[node] = [*kept[parent], node]
        assert path(found, request) == max((kept[node] for node in sorted(kept)), key=len)
        longer += len(path(found, request)) > len(path(plain, request))
    assert longer > 0


def test_greedy_walks_through_judged_nodes_and_says_how_unlikely_they_were():
    target = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0], [0.0, 0.0, 5.0]])
    chain = {"tokens": torch.tensor([0, 2, 0], dtype=torch.int32), "cu_nodes": torch.tensor([0, 3], dtype=torch.int32)}
    judge = torch.tensor([False, True, False])
    found = verify_chain(
        **chain, target_logits=target, max_depth=2, method="greedy", lossy=Lossy(judge=judge), logprobs=True
    )
    assert found.tokens.tolist() == [[2, 0, 2]]
    assert found.logprobs.tolist() == [[-torch.inf, 0.0, 0.0]]


def test_a_judge_overrules_masks_and_filters():
    target, tokens = torch.tensor([[5.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1], dtype=torch.int32)
    allowed = torch.tensor([[0b01], [0b11]], dtype=torch.int32)
    found = verify_chain(
        tokens, torch.tensor([0, 2], dtype=torch.int32), target, max_depth=1, rng=streams(1), logprobs=True,
        params=SamplingParams(allowed=allowed, top_k=1), lossy=Lossy(judge=torch.tensor([False, True])),
    )  # fmt: skip
    assert found.tokens[0, 0] == 1 and found.logprobs[0, 0] == -torch.inf


@pytest.mark.parametrize("method,child", [("token", 1), *((m, child) for m in LENIENT[1:] for child in (1, 2))])
def test_lenience_scales_the_draft_in_the_test_of_every_coin(method, child):
    """Whatever was rejected before, half the lenience doubles the coins that accept."""
    steps = 2048
    target = torch.tensor([[0.45, 0.22, 0.08, 0.15, 0.1]]).log().repeat(3, 1)
    draft = torch.tensor([[0.1, 0.2, 0.5, 0.1, 0.1]]).log().repeat(3, 1)
    tokens = torch.tensor([0, 2, 2 if method == "k_seq" else 1], dtype=torch.int32)
    parents = torch.tensor([-1, 0, 0] if method != "token" else [-1, 0, 1], dtype=torch.int32)
    coins = torch.full((steps, 3), 1 - 2.0**-24)  # which rejects the siblings tried before
    coins[:, child] = torch.arange(steps) / steps
    accepted = {}
    for lenience in (1.0, 0.5):
        tree = DraftTree(
            tokens.repeat(steps), parents.repeat(steps), torch.arange(0, 3 * steps + 1, 3, dtype=torch.int32), 3, 2
        )
        options = {
            "method": method, "accept_uniforms": coins.reshape(-1), "final_uniforms": torch.zeros(steps),
            "lossy": Lossy(lenience=lenience), "backend": "reference",
        }  # fmt: skip
        logits = target.repeat(steps, 1), draft.repeat(steps, 1)
        if method == "token":
            found = verify_chain(tree.tokens, tree.cu_nodes, *logits, max_depth=2, **options)
        else:
            found = verify_tree(tree, *logits, **options)
        hit = found.nodes[:, 1] == child
        accepted[lenience] = int(hit.sum())
        assert bool(hit[: accepted[lenience]].all()), "small coins accept"
    assert 50 < accepted[1.0] < steps / 2
    assert abs(accepted[0.5] - 2 * accepted[1.0]) <= 2


def test_lenience_rounds_its_product_with_q_first():
    """Coins a few units in the last place around the threshold, where another order of rounding decides otherwise."""
    p, q = torch.tensor([0.1, 0.9]).log(), torch.tensor([0.3, 0.7]).log()
    px, qx = p.softmax(0)[0], q.softmax(0)[0]
    steps, differ = torch.arange(-4, 5), 0
    N = 2 * len(steps)
    for lenience in torch.linspace(0.35, 0.99, 30).tolist():
        factor = torch.tensor(lenience)
        u = ((px / (factor * qx)).view(torch.int32) + steps).to(torch.int32).view(torch.float32)
        found = verify_chain(
            torch.zeros(N, dtype=torch.int32), torch.arange(0, N + 1, 2, dtype=torch.int32), p.repeat(N, 1),
            q.repeat(N, 1), max_depth=1, accept_uniforms=torch.stack([u, u], 1).reshape(-1),
            final_uniforms=torch.zeros(len(u)), lossy=Lossy(lenience=lenience), backend="reference",
        )  # fmt: skip
        assert torch.equal(found.num_tokens == 2, u * (factor * qx) < px)
        differ += int(((u * qx * factor < px) != (u * (factor * qx) < px)).sum())
    assert differ > 0


@pytest.mark.parametrize("method", [*CHAIN_METHODS, *TREE_METHODS])
def test_synthetic_rates_are_met_at_every_depth(method):
    requests, rates = 20000, torch.tensor([0.9, 0.5, 0.25, 0.0])
    tree = DraftTree.chain(torch.ones(requests, 5, dtype=torch.int32))
    logits = torch.zeros(5 * requests, 3)
    options = {"method": method, "rng": streams(requests), "lossy": Lossy(synthetic=rates), "backend": "reference"}
    if method in TREE_METHODS:
        found = verify_tree(tree, logits, logits, **options)
    else:
        found = verify_chain(tree.tokens, tree.cu_nodes, logits, logits, max_depth=4, **options)
    left = requests
    for depth, rate in enumerate(rates.tolist(), start=1):
        passed = int((found.num_tokens > depth).sum())
        assert abs(passed - rate * left) <= 4.5 * (left * rate * (1 - rate)) ** 0.5
        left = passed
    assert left == 0


@pytest.mark.parametrize("method", TREE_METHODS)
def test_synthetic_walks_down_first_children_whatever_the_method(method):
    problem = Problem(method, 7)
    accept, final = (torch.rand(n, generator=generator(8)) for n in (problem.nodes, BATCH))
    rates = torch.rand(problem.tree.max_depth, generator=generator(9))
    problem.draft.fill_(torch.nan)  # q is never read
    explicit = {"rng": None, "accept_uniforms": accept, "final_uniforms": final}
    found = problem.run(Lossy(synthetic=rates), **explicit)
    for request in range(BATCH):
        start, children, expected = int(problem.tree.cu_nodes[request]), problem.children(request), [0]
        while nodes := children[expected[-1]]:
            if not accept[start + nodes[0]] < rates[len(expected) - 1]:
                break
            expected.append(nodes[0])
        assert path(found, request) == expected
        p = problem.target[start + expected[-1]].softmax(0)
        last = int(p.argmax()) if method == "greedy" else int(draw(p[None], final[request : request + 1]))
        assert int(found.tokens[request, len(expected) - 1]) == last
    assert same_bits(problem.run(Lossy(synthetic=rates), draft_logits=problem.target, **explicit), found)
    everything, nothing = (problem.run(Lossy(synthetic=rate), **explicit) for rate in (1.0, 0))
    assert all(not problem.children(b)[path(everything, b)[-1]] for b in range(BATCH))
    assert nothing.num_tokens.tolist() == [1] * BATCH


def test_synthetic_reads_rows_on_the_way_for_log_probabilities_only():
    target = torch.zeros(3, 4)
    target[1] = torch.nan
    arguments = (torch.ones(3, dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32), target)
    options = {"max_depth": 2, "rng": streams(1), "lossy": Lossy(synthetic=1.0), "backend": "reference"}
    assert verify_chain(*arguments, **options).num_tokens.tolist() == [3]
    assert verify_chain(*arguments, **options, logprobs=True).num_tokens.tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("method", ("token", "block", *TREE_METHODS))
def test_reflection_is_verification_of_mixed_logits(method, dtype):
    problem = Problem(method, 10, dtype)
    reflected = random_logits(problem.nodes, V, generator(11), dtype=dtype)
    reflected[:, 4] = -torch.inf
    allowed = torch.randint(1, 2**V, (problem.nodes, 1), generator=generator(12), dtype=torch.int32)
    params = SamplingParams(temperature=0.8, top_k=5, min_p=0.05, allowed=allowed | 1)
    for weight in (0.3, 0.71):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        a = torch.tensor(weight, dtype=wide)
        mixed = (1 - a) * problem.target.to(wide) + a * reflected.to(wide)
        found = problem.run(Lossy(reflect_logits=reflected, reflect_weight=weight), params=params)
        assert same_bits(found, problem.run(target_logits=mixed, params=params))
        assert not same_bits(found, problem.run(params=params))


def test_reflection_weighs_what_it_is_told():
    """A request that the target would continue with token 0 follows the reflection once that outweighs it."""
    tokens, cu = torch.zeros(1, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    target, reflected = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    for weight, expected in ((0.3, 0), (0.32, 0), (0.35, 1), (0.9, 1)):
        lossy = Lossy(reflect_logits=reflected, reflect_weight=weight)
        found = verify_chain(tokens, cu, target, max_depth=0, method="greedy", lossy=lossy, backend="reference")
        assert found.tokens.tolist() == [[expected]]


def test_hooks_are_traced():
    problem = Problem("multi_round", 13)
    judge = torch.rand(problem.nodes, generator=generator(14)) < 0.2

    def step(target, judge):
        lossy = Lossy(judge=judge, reflect_logits=target.flip(1), lenience=0.7)
        options = {"rng": streams(BATCH), "method": "multi_round", "backend": "reference", "logprobs": True}
        mixed = verify_tree(problem.tree, target, problem.draft, lossy=lossy, **options)
        return mixed, verify_tree(problem.tree, target, lossy=Lossy(synthetic=0.5), **options)

    traced = torch.compile(step, fullgraph=True, backend="eager")
    for a, b in zip(traced(problem.target, judge), step(problem.target, judge), strict=True):
        assert same_bits(a, b)
