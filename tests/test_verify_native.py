"""Compiled verification where a general comparison with the reference does not look: limits, layouts, bad input."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

import specdec_kernels as sk
from specdec_kernels import backends, philox
from tree_cases import COUNTED, FORM_IDS, FORMS, NEEDS_Q, Spec, random_case
from verify_backends import assert_same_bits
from verify_margins import assert_same_walks

MISSING = backends.MISSING["cpu"]
pytestmark = [pytest.mark.native, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]
EVERY_METHOD = pytest.mark.parametrize(("method", "chain"), FORMS, ids=FORM_IDS)
READS_Q = [(m, c) for m, c in FORMS if m not in ("greedy", "typical", "target_only")]
# For i.i.d. draws p = q is accepted whatever the coin; K-SEQ's rho is then 1 but for rounding.
ALWAYS = [(m, c) for m, c in READS_Q if m != "k_seq"]


@pytest.mark.parametrize(("method", "chain"), ALWAYS)
def test_equal_distributions_accept_a_path_of_drafts(method, chain):
    case = random_case(Spec(method, chain, 9, 32, 8, 4097))
    case.draft = case.target
    got = case.run("cpu")
    for request, nodes in enumerate(case.requests()):
        end = int(got.nodes[request, int(got.num_tokens[request]) - 1])
        assert not case.children_of(nodes)[end], "the walk ends at a leaf"


@pytest.mark.parametrize(("method", "chain"), READS_Q)
def test_target_outside_the_trimmed_vocabulary(method, chain):
    case = random_case(Spec(method, chain, 8, 32, 6, 64, trimmed=20))
    ids = case.options["draft_vocab"].long()
    case.target[:, ids] = -torch.inf
    got = case.run("cpu")
    assert (got.num_tokens == 1).all() and not torch.isin(got.tokens[:, 0].long(), ids).any()
    assert_same_walks(case, got, case.run("reference"))


def test_default_draft_parameters_are_the_temperature_of_the_target():
    case = random_case(Spec("multi_round", False, 10, 16, vocabulary=111, temperature=0.6, filters="k"))
    given = case.run("cpu")
    assert_same_bits(case.run("cpu", draft_params=None), given)
    assert not torch.equal(case.run("cpu", draft_params=sk.SamplingParams(temperature=3.0)).tokens, given.tokens)


@EVERY_METHOD
def test_philox_coins_are_the_definition(method, chain):
    case = random_case(Spec(method, chain, 11, 64, vocabulary=111))
    rng, owner = case.options["rng"], case.owners()
    local = torch.arange(len(owner)) - case.cu_nodes[:-1].long()[owner]
    explicit = case.with_options(
        rng=None,
        accept_uniforms=philox.coins(rng.seed[owner], rng.offset[owner], philox.ACCEPT, local),
        final_uniforms=philox.coins(rng.seed, rng.offset, philox.FINAL, torch.zeros_like(rng.seed)),
    )
    assert_same_bits(explicit.run("cpu"), case.run("cpu"))


@EVERY_METHOD
def test_columns_that_do_not_lie_side_by_side(method, chain):
    case = random_case(Spec(method, chain, 16, 7, vocabulary=111, lossy="reflect"))
    expected = case.run("cpu")
    lossy = case.options["lossy"]
    turned = case.with_options(lossy=lossy._replace(reflect_logits=lossy.reflect_logits.t().contiguous().t()))
    turned.target, turned.draft = case.target.t().contiguous().t(), case.draft.t().contiguous().t()
    assert_same_bits(turned.run("cpu"), expected)


@EVERY_METHOD
def test_arguments_are_left_alone(method, chain):
    spec = Spec(method, chain, 17, 7, masked=True, trimmed=20, explicit=True, filters="kpm", counts=method in COUNTED)
    case, twin = random_case(spec), random_case(spec)
    case.run("cpu")

    def tensors(value):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            for part in value:
                yield from tensors(part)

    pairs = [list(tensors([*vars(x).values(), *x.options.values()])) for x in (case, twin)]
    assert len(pairs[0]) > 8
    assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))


@pytest.mark.parametrize(
    "cu_nodes",
    [[0, 1000], [5, 2], [-3, 4], [0, 0], [2**31 - 1, -(2**31)]],
    ids=["long", "falling", "negative", "empty", "huge"],
)
@EVERY_METHOD
def test_any_structure_stays_in_bounds(method, chain, cu_nodes):
    """What only SPECDEC_DEBUG checks may be anything: the kernels read and write what is theirs."""
    g = torch.Generator().manual_seed(18)
    case = random_case(Spec(method, chain, 18, 1, 9, 111, trimmed=30, masked=True, counts=method in COUNTED))
    for seed in range(5):
        anything = torch.randint(-(2**31), 2**31 - 1, (30,), generator=g).to(torch.int32)
        broken = case.with_options(draft_vocab=anything)
        broken.cu_nodes = torch.tensor(cu_nodes, dtype=torch.int32)
        broken.max_depth, broken.max_nodes = seed % 3, 3 + seed
        if not chain:
            nodes = len(case.tokens)
            near = torch.randint(-2, nodes + 2, (nodes,), generator=g)
            broken.parents = (near if seed % 2 else anything[:nodes]).to(torch.int32)
        if case.counts is not None:
            broken.counts = torch.randint(-3, 5, case.counts.shape, generator=g).to(torch.int32)
        for options in ({}, {"draft_params": sk.SamplingParams(temperature=0.0)}):  # whose point may be any id
            got = broken.with_options(**options).run("cpu")
            assert (got.num_tokens >= 0).all() and (got.num_tokens <= broken.max_depth + 1).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_request_of_no_nodes_emits_nothing(backend):
    tree = sk.DraftTree(*(torch.tensor(x, dtype=torch.int32) for x in ([0, 1, 2], [-1, 0, 1], [0, 0, 3])), 3, 2)
    rng = sk.Philox(torch.tensor([1, 2]), torch.tensor([3, 4]))
    got = sk.verify_tree(tree, torch.zeros(3, 7), method="multi_round", rng=rng, backend=backend)
    assert got.num_tokens[0] == 0 and (got.tokens[0] == -1).all() and (got.nodes[0] == -1).all()
    assert got.num_tokens[1] > 0


def test_many_point_mass_siblings_do_not_read_a_block_again_for_each():
    """Rejections cost the blocks of a row each, however many tokens are excluded: 16 times as many, not 256 times."""

    def seconds(siblings: int) -> float:
        tokens = torch.arange(1, siblings + 1) * (131_072 // (siblings + 1))
        target = torch.zeros(siblings + 1, 131_072, dtype=torch.bfloat16)
        target[0, tokens] = -20.0
        structure = (torch.cat([tokens[:1], tokens]), torch.tensor([-1] + [0] * siblings), [0, siblings + 1])
        tree = sk.DraftTree(*(torch.as_tensor(x).int() for x in structure), siblings + 1, 1)
        uniforms = {"accept_uniforms": torch.full((siblings + 1,), 0.999), "final_uniforms": torch.full((1,), 0.5)}
        start = time.process_time()
        got = sk.verify_tree(tree, target, method="multi_round", backend="cpu", **uniforms)
        assert got.num_tokens[0] == 1 and not torch.isin(got.tokens[0, 0], tokens)
        return time.process_time() - start

    seconds(64)
    assert seconds(1023) < 64 * min(seconds(64) for _ in range(5)) + 0.1


@pytest.mark.parametrize("variant", ["plain", "filters", "trimmed", "point_mass"])
@pytest.mark.parametrize(
    ("method", "chain"),
    [("token", True), ("without_replacement", False), ("k_seq", False), ("traversal", False), ("typical", False)],
)
def test_whole_vocabularies(method, chain, variant):
    """Many blocks, whose edges fall inside a row; drawn residuals cross them."""
    if variant == "point_mass" and method in NEEDS_Q:
        variant = "plain"
    options = {
        "plain": {},
        "filters": {"filters": "kp", "draft_filters": "p", "dtype": torch.float16},
        "trimmed": {"trimmed": 999, "masked": True, "filters": "m"},
        "point_mass": {"point_mass": True, "dtype": torch.float32},
    }[variant]
    case = random_case(replace(Spec(method, chain, 6, 2, 5, 128_256, dtype=torch.bfloat16), **options))
    assert_same_walks(case, case.run("cpu"), case.run("reference"))
