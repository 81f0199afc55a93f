"""Bad input of verify_chain and verify_tree: errors name the argument, what came and what was expected."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from specdec_kernels import BackendError, DraftTree, Philox, SamplingParams, verify_chain, verify_tree
from verify_cases import random_logits, streams

V, B, K = 6, 2, 2
TREE = DraftTree.chain(torch.ones(B, K + 1, dtype=torch.int32))
N = B * (K + 1)
TARGET = random_logits(N, V, torch.Generator().manual_seed(0))
GOOD = {"tokens": TREE.tokens, "cu_nodes": TREE.cu_nodes, "target_logits": TARGET, "max_depth": K, "rng": streams(B)}
FLOATS = torch.rand(N)

BAD = [
    ({"tokens": [1, 2]}, TypeError, "tokens: expected a tensor, got list"),
    ({"tokens": TREE.tokens.long()}, TypeError, "tokens: expected dtype int32, got int64"),
    ({"tokens": TREE.tokens[:-1]}, ValueError, r"tokens: expected shape \[N=6\], got \[5\]"),
    ({"tokens": TREE.tokens.reshape(B, -1)}, ValueError, r"tokens: expected shape \[N\], got \[2, 3\]"),
    ({"cu_nodes": TREE.cu_nodes.float()}, TypeError, "cu_nodes: expected dtype int32, got float32"),
    ({"cu_nodes": TREE.cu_nodes[:0]}, ValueError, r"cu_nodes: expected shape \[B\+1\]"),
    ({"target_logits": TARGET.int()}, TypeError, "target_logits: expected dtype float32 or bfloat16"),
    ({"target_logits": TARGET[:, :0]}, ValueError, "target_logits: expected V >= 1"),
    ({"target_logits": TARGET[0]}, ValueError, r"target_logits: expected shape \[N, V\], got \[6\]"),
    ({"draft_logits": TARGET[:, :3]}, ValueError, r"draft_logits: expected shape \[N=6, V=6\], got \[6, 3\]"),
    ({"draft_logits": TARGET[:-1]}, ValueError, "draft_logits: expected shape"),
    ({"draft_vocab": torch.arange(3, dtype=torch.int32)}, ValueError, "draft_vocab: expected draft_logits"),
    (
        {"draft_logits": TARGET[:, :3], "draft_vocab": torch.arange(4, dtype=torch.int32)},
        ValueError,
        r"draft_vocab: expected shape \[R=3\], got \[4\]",
    ),
    ({"draft_logits": TARGET[:, :3], "draft_vocab": torch.arange(3)}, TypeError, "draft_vocab: expected dtype int32"),
    ({"max_depth": -1}, ValueError, "max_depth: expected >= 0, got -1"),
    ({"max_depth": 2.0}, TypeError, "max_depth: expected an int, got float"),
    ({"method": "tree"}, ValueError, "method: expected one of 'token', 'block', 'greedy', 'typical', got 'tree'"),
    ({"rng": None}, ValueError, "accept_uniforms: method 'token' needs rng or accept_uniforms, got neither"),
    ({"rng": None, "accept_uniforms": FLOATS}, ValueError, "final_uniforms: method 'token' needs rng"),
    ({"accept_uniforms": FLOATS.double()}, TypeError, "accept_uniforms: expected dtype float32, got float64"),
    ({"accept_uniforms": FLOATS[1:]}, ValueError, "accept_uniforms: expected shape"),
    ({"final_uniforms": FLOATS[:3]}, ValueError, r"final_uniforms: expected shape \[B=2\], got \[3\]"),
    ({"rng": Philox(torch.zeros(3).long(), torch.zeros(2).long())}, ValueError, r"rng.seed: expected shape \[B=2\]"),
    ({"rng": Philox(torch.zeros(2), torch.zeros(2).long())}, TypeError, "rng.seed: expected dtype int64"),
    ({"rng": (1, 2)}, TypeError, "rng: expected a Philox, got tuple"),
    ({"params": None}, TypeError, "^params: expected SamplingParams, got NoneType"),
    ({"params": 0.5}, TypeError, "^params: expected SamplingParams, got float"),
    ({"draft_params": {"top_p": 0.5}}, TypeError, "^draft_params: expected SamplingParams, got dict"),
    (
        {"params": SamplingParams(temperature=-0.5)},
        ValueError,
        r"params.temperature: expected >= 0.0, finite in fp32, got -0.5",
    ),
    ({"params": SamplingParams(temperature="hot")}, TypeError, "params.temperature: expected a number"),
    (
        {"params": SamplingParams(temperature=float("nan"))},
        ValueError,
        "params.temperature: expected >= 0.0, finite in fp32, got",
    ),
    ({"params": SamplingParams(temperature=1e39)}, ValueError, "params.temperature: expected >= 0.0, finite in fp32"),
    ({"params": SamplingParams(top_k=2.5)}, ValueError, "params.top_k: expected a whole number, got 2.5"),
    ({"rng": Philox(*(torch.zeros(2).long(),) * 2, torch.zeros(2).int())}, ValueError, "rng.row: expected None"),
    (
        {"draft_logits": TARGET[:, :0], "draft_vocab": torch.zeros(0, dtype=torch.int32)},
        ValueError,
        r"draft_vocab: expected shape \[R\] with R >= 1",
    ),
    ({"params": SamplingParams(top_p=1.5)}, ValueError, r"params.top_p: expected in \[0.0, 1.0\], got 1.5"),
    ({"params": SamplingParams(top_k=-2)}, ValueError, "params.top_k: expected >= 0, finite in fp32, got -2"),
    ({"params": SamplingParams(min_p=torch.zeros(3))}, ValueError, r"params.min_p: expected shape \[B=2\], got \[3\]"),
    (
        {"params": SamplingParams(allowed=torch.zeros(N, 2).int())},
        ValueError,
        r"params.allowed: expected shape \[N=6, W=1\]",
    ),
    ({"draft_params": SamplingParams(top_p=-1)}, ValueError, "draft_params.top_p: expected in"),
    ({"backend": "tpu"}, ValueError, "backend: expected one of 'reference', 'cpu', 'triton', 'cuda', got 'tpu'"),
]


@pytest.mark.parametrize("change,error,message", BAD, ids=[f"{next(iter(c))}-{i}" for i, (c, *_) in enumerate(BAD)])
def test_bad_arguments_of_a_chain(change, error, message):
    before = [x.clone() for x in (TREE.tokens, TARGET)]
    with pytest.raises(error, match=message):
        verify_chain(**{**GOOD, **change})
    assert all(torch.equal(a, b) for a, b in zip(before, (TREE.tokens, TARGET), strict=True))


@pytest.mark.parametrize(
    "change,options,error,message",
    [
        ({}, {"method": "block"}, ValueError, "method: expected one of 'greedy'"),
        ({}, {"rng": (1, 2)}, TypeError, "rng: expected a Philox, got tuple"),
        ({}, {"params": 0.5}, TypeError, "^params: expected SamplingParams, got float"),
        ({}, {"draft_params": 0.5}, TypeError, "^draft_params: expected SamplingParams, got float"),
        ({"tokens": TREE.tokens[1:]}, {}, ValueError, r"tree.tokens: expected shape \[N=6\], got \[5\]"),
        ({"cu_nodes": TREE.cu_nodes[:0]}, {}, ValueError, r"tree.cu_nodes: expected shape \[B\+1\]"),
        ({"parents": None}, {}, TypeError, "tree.parents: expected a tensor, got NoneType"),
        ({"parents": TREE.parents[1:]}, {}, ValueError, r"tree.parents: expected shape \[N=6\], got \[5\]"),
        ({"parents": TREE.parents.long()}, {}, TypeError, "tree.parents: expected dtype int32, got int64"),
        ({"max_nodes": 0}, {}, ValueError, "tree.max_nodes: expected >= 1, got 0"),
        ({"max_depth": -1}, {}, ValueError, "tree.max_depth: expected >= 0, got -1"),
        (
            {"counts": torch.ones(N).int()},
            {"method": "traversal"},
            ValueError,
            "tree.counts: expected None with method",
        ),
        ({"counts": torch.ones(N)}, {}, TypeError, "tree.counts: expected dtype int32, got float32"),
        (
            {"counts": torch.ones(N).int()},
            {"rng": None, "accept_uniforms": FLOATS, "final_uniforms": FLOATS[:B]},
            ValueError,
            "rng: merged draws .* got None",
        ),
    ],
)
def test_bad_trees(change, options, error, message):
    with pytest.raises(error, match=message):
        verify_tree(TREE._replace(**change), TARGET, TARGET, **{"method": "multi_round", "rng": streams(B), **options})


def test_a_tree_must_be_a_draft_tree():
    with pytest.raises(TypeError, match="tree: expected a DraftTree, got tuple"):
        verify_tree(tuple(TREE), TARGET, method="greedy")


@pytest.mark.parametrize(
    "build,message",
    [
        (lambda: DraftTree.chain(torch.zeros(3)), r"tokens: expected shape \[B, K\+1\]"),
        (lambda: DraftTree.chain(torch.zeros(2, 3), [1, 4]), r"lengths: expected values in 1..3, got \[1, 4\]"),
        (lambda: DraftTree.chain(torch.zeros(2, 3), [1]), r"lengths: expected shape \[2\], got \[1\]"),
        (lambda: DraftTree.from_paths([[[1]]], [1, 2]), "roots: expected one for each of the 1 requests, got 2"),
    ],
)
def test_bad_tree_constructors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_forced_backend_never_falls_back():
    with pytest.raises(BackendError, match="backend='cuda' cannot serve verify_chain: "):
        verify_chain(**GOOD, backend="cuda")
    with pytest.raises(BackendError, match="backend='cpu' cannot serve verify_chain: "):
        verify_chain(**{**GOOD, "target_logits": TARGET.double()}, backend="cpu")


DEBUG = """
import re, sys, torch
from specdec_kernels import *
V = 6
def chain(**changes):
    tree = DraftTree.chain(torch.ones(2, 3, dtype=torch.int32))
    arguments = dict(tokens=tree.tokens, cu_nodes=tree.cu_nodes, target_logits=torch.zeros(6, V), max_depth=2,
                     rng=Philox(torch.zeros(2).long(), torch.zeros(2).long()))
    return verify_chain(**{**arguments, **changes})
def given(**changes):
    return DraftTree.chain(torch.ones(2, 3, dtype=torch.int32))._replace(**changes)
def tree(**changes):
    return verify_tree(given(**changes), torch.zeros(6, V), method="greedy")
def attend(**changes):
    cache = torch.zeros(2, 1, 9, 4)
    return tree_attention(torch.zeros(6, 1, 4), cache, cache, given(**changes), ints(2, 5))
def layout(**changes):
    return trees.tree_layout(given(**changes))
def draw(function, *draft_vocab):
    rng = Philox(torch.zeros(2).long(), torch.zeros(2).long())
    return function(torch.zeros(2, 3), 2, rng, draft_vocab=ints(*draft_vocab))
def beam(*draft_vocab):
    rng = Philox(torch.zeros(2).long(), torch.zeros(2).long())
    return trees.beam_expand(trees.Beam.start(ints(1, 2)), torch.zeros(2, 1, 3), 2, rng, draft_vocab=ints(*draft_vocab))
def ints(*values):
    return torch.tensor(values, dtype=torch.int32)
def expect(message, call):
    try:
        call()
    except ValueError as error:
        assert re.search(message, str(error)), (message, str(error))
    else:
        raise AssertionError(message)
explicit = dict(accept_uniforms=torch.zeros(6), final_uniforms=torch.zeros(2))
chain(); tree(); attend(); layout(); draw(trees.gumbel_top_k, 0, 1, 9); beam(0, 1, 9); chain(**explicit)
compact = dict(draft_logits=torch.zeros(6, 2))
hot = SamplingParams(top_p=torch.tensor([1.0, 2.0]))
expect("tokens: expected ids in 0..5, or -1 for no draft, got 6 at", lambda: chain(tokens=ints(1, 1, 6, 1, 1, 1)))
expect("cu_nodes: expected 0 first, got 1", lambda: chain(cu_nodes=ints(1, 3, 6)))
expect("cu_nodes: expected N=6 last, got 5", lambda: chain(cu_nodes=ints(0, 3, 5)))
expect("cu_nodes: expected 1..3 nodes a request, got 4", lambda: chain(cu_nodes=ints(0, 4, 6)))
expect("draft_vocab: expected strictly ascending ids", lambda: chain(**compact, draft_vocab=ints(3, 3)))
expect("draft_vocab: expected ids in 0..5, got 9", lambda: chain(**compact, draft_vocab=ints(3, 9)))
expect("params.top_p: expected in .0.0, 1.0., got 2.0", lambda: chain(params=hot))
rates = Lossy(synthetic=torch.tensor([0.5, 2.0]))
expect("^lossy.synthetic: expected rates in .0, 1., got 2.0 at index 1", lambda: chain(lossy=rates))
expect("^cu_nodes: expected 0 first, got 3", lambda: chain(cu_nodes=ints(3, 2, 6)))
expect("^cu_nodes: expected N=6 last, got 90", lambda: chain(cu_nodes=ints(0, 3, 90)))
expect("^cu_nodes: expected 1..3 nodes a request, got 90", lambda: chain(cu_nodes=ints(0, 90, 6)))
expect("^cu_nodes: expected 1..3 nodes a request, got -3", lambda: chain(cu_nodes=ints(0, -3, 6)))
expect("^cu_nodes: expected 1..2 nodes a request, got 3", lambda: chain(max_depth=1))
low, high = torch.tensor([0.5, -0.5]), torch.tensor([0, 0, 0, 1.0, 0, 0])
expect("^accept_uniforms: expected numbers in .0, 1., got 1.0 at index 3", lambda: chain(accept_uniforms=high))
expect("^accept_uniforms: expected numbers in .0, 1., got nan", lambda: chain(accept_uniforms=high * torch.nan))
expect("^final_uniforms: expected numbers in .0, 1., got -0.5 at index 1", lambda: chain(final_uniforms=low))
for call in (tree, attend, layout, lambda **changes: trees.merge_trees([given(**changes)])):
    expect("^tree.parents: expected parents before children, got 2", lambda: call(parents=ints(-1, 2, 0, -1, 0, 1)))
    expect("^tree.parents: expected parents before children, got 1 at index 1",
           lambda: call(parents=ints(-1, 1, 0, -1, 0, 1)))
    expect("^tree.parents: expected -1 at each root and nowhere", lambda: call(parents=ints(-1, -1, 0, -1, 0, 1)))
    expect("^tree.parents: expected -1 or a node of the same tree, got -7",
           lambda: call(parents=ints(-1, 0, -7, -1, 0, 1)))
    expect("^tree.max_depth: expected no node deeper than max_depth=1, got 2", lambda: call(max_depth=1))
    expect("^tree.cu_nodes: expected 0 first, got 3", lambda: call(cu_nodes=ints(3, 2, 6)))
    expect("^tree.cu_nodes: expected N=6 last, got 4", lambda: call(cu_nodes=ints(0, 3, 4)))
    expect("^tree.cu_nodes: expected 1..2 nodes a request, got 3", lambda: call(max_nodes=2))
    expect("^tree.cu_nodes: expected 1..3 nodes a request, got 0", lambda: call(cu_nodes=ints(0, 0, 6)))
for call in (beam, lambda *ids: draw(trees.gumbel_top_k, *ids), lambda *ids: draw(trees.iid_children, *ids)):
    expect("^draft_vocab: expected ids >= 0, got -2 at index 1", lambda: call(5, -2, 5))
    expect("^draft_vocab: expected strictly ascending ids, got 5", lambda: call(5, 5, 6))
    expect("^draft_vocab: expected strictly ascending ids, got 4", lambda: call(5, 4, 6))
print("all raised")
"""


def test_checks_of_values_under_debug():
    found = subprocess.run(
        [sys.executable, "-c", DEBUG], env={**os.environ, "SPECDEC_DEBUG": "1"}, capture_output=True, text=True
    )
    assert "all raised" in found.stdout, found.stderr
