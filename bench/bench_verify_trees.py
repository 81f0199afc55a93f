"""Tree verification against plain torch, at the vocabulary of Llama-3: trees of 32 nodes, 4 children a node.

`careful` makes all rows' probabilities and then walks, `visited_rows` makes only those of the rows that the walk
reaches: see careful.py. With filters the first sorts each row and the second takes `torch.topk`, the best that there is
while top_k is small. Every baseline must return the op's tokens before it is timed. Shares of the read bandwidth count
each row once that the walk read. Run with pinned threads:
OMP_PROC_BIND=true OMP_PLACES=cores python -m pytest bench/bench_verify_trees.py -s
"""

from __future__ import annotations

import functools

import careful
import pytest
import torch
from careful import AllRows, VisitedRows
from common import compare
from filters import keep_by_sort, keep_by_topk
from problems import Problem, filled, problem

from specdec_kernels import SamplingParams

VOCABULARY, SHAPE = 128256, filled(32, width=4)
FILTERED = SamplingParams(top_k=50, top_p=0.9)
RULES = {
    "multi_round": functools.partial(careful.siblings_in_order, replacement=True),
    "without_replacement": functools.partial(careful.siblings_in_order, replacement=False),
    "target_only": careful.children_by_target,
}


def baselines(case: Problem, method: str) -> dict:
    """Plain torch for the methods of which it is short."""
    children = case.children()
    if method == "greedy":
        return {"max_of_all_rows": lambda: careful.walk_greedy(case, children)}
    if method not in RULES:
        return {}
    batch, nodes = case.tokens.shape
    keeps = (keep_by_sort, keep_by_topk) if case.params.top_k else (None, None)
    found = {}
    for name, kind, keep in zip(("careful", "visited_rows"), (AllRows, VisitedRows), keeps, strict=True):
        p = kind(case.target, batch, nodes, case.params, keep)
        q = None if method == "target_only" else kind(case.draft, batch, case.used, case.params, keep)
        found[name] = functools.partial(careful.walk, case, children, p, q, RULES[method])
    return found


def measure(benchmark, dtype, batch: int, method: str, params=SamplingParams(), rounds: int = 10) -> None:
    """Compare on random problems; of one request each, on several in turn, whose walks are of different lengths."""
    seeds = range(4 if batch == 1 else 1)
    cases = [problem(method, SHAPE, batch, VOCABULARY, dtype, params, seed=seed) for seed in seeds]
    ops, others = [case.op(method) for case in cases], [baselines(case, method) for case in cases]
    lengths = []
    for op, other in zip(ops, others, strict=True):
        result = op()
        assert int(result.num_tokens.min()) > 0
        for name, function in other.items():
            assert torch.equal(function(), result.tokens.long()), f"{name} computes something else"
        lengths.append(result.num_tokens.float().mean().item())
    benchmark.extra_info["tokens_per_request"] = sum(lengths) / len(lengths)

    def in_turn(functions):
        return lambda: [function() for function in functions]

    compare(
        benchmark,
        in_turn(ops),
        {name: in_turn([other[name] for other in others]) for name in others[0]},
        # As much as all logits of the target, so that the limit has no better place in the caches; but not the logits.
        memory=torch.zeros_like(cases[0].target).repeat(len(cases), 1),
        bytes_read=sum(case.bytes_read(method) for case in cases),
        rounds=rounds,
    )


CASES = [(dtype, batch) for dtype in (torch.bfloat16, torch.float32) for batch in (1, 8)]
IDS = [f"{str(dtype).removeprefix('torch.')}-B{batch}" for dtype, batch in CASES]


@pytest.mark.parametrize("method", ["multi_round", "without_replacement"])
@pytest.mark.parametrize(("dtype", "batch"), CASES, ids=IDS)
def test_tree(benchmark, dtype, batch, method):
    measure(benchmark, dtype, batch, method)


@pytest.mark.parametrize("method", ["multi_round", "without_replacement"])
@pytest.mark.parametrize(("dtype", "batch"), CASES, ids=IDS)
def test_tree_with_top_k_and_top_p(benchmark, dtype, batch, method):
    measure(benchmark, dtype, batch, method, FILTERED, rounds=3)


@pytest.mark.parametrize(
    "method", ["greedy", "target_only", "k_seq", "greedy_multi", "traversal", "traversal_iid", "typical"]
)
@pytest.mark.parametrize(("dtype", "batch"), CASES[:2], ids=IDS[:2])
def test_tree_by_other_methods(benchmark, dtype, batch, method):
    measure(benchmark, dtype, batch, method)
