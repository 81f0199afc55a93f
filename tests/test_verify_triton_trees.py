"""What only the Triton kernels of verify_tree do: rows in many blocks, trees in registers, sums taken again.

That every method agrees with the reference under every option is for test_verify_equal.py. On a GPU, and everywhere
under Triton's interpreter: `test_under_the_interpreter` runs this file again in a process of its own.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tree_cases import FORMS, Case, Spec, fits, random_case
from verify_backends import DEVICE, INTERPRETED, assert_same_bits, in_another_process
from verify_margins import assert_same_walks

pytest.importorskip("triton", reason="triton is not installed")

TREE_METHODS = [method for method, chain in FORMS if not chain]
on_device = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device; runs inside test_under_the_interpreter"
)
on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted run")
@pytest.mark.parametrize("which, least", [("not full", 40), pytest.param("full", 10, marks=pytest.mark.full)])
def test_under_the_interpreter(which, least):
    assert in_another_process(str(Path(__file__)), "-m", which, TRITON_INTERPRET="1") >= least


def run(case: Case, **changes):
    return case.run("triton", DEVICE["triton"], **changes)


def check(case: Case):
    got = run(case)
    assert_same_walks(case, got, case.run("reference"), "triton")
    return got


def fitting(forms, *options):
    """Parametrises `method`, `chain` and `options` by every pair that goes together."""
    pairs = [(method, chain, o) for method, chain in forms for o in options if fits(Spec(method, chain, 0, **o))]
    ids = [f"{method}{'-chain' * chain}-{'-'.join(o) or 'plain'}" for method, chain, o in pairs]
    return pytest.mark.parametrize(("method", "chain", "options"), pairs, ids=ids)


@on_device
@fitting(FORMS, {}, {"trimmed": 50, "masked": True}, {"point_mass": True})
def test_rows_in_many_blocks(method, chain, options, monkeypatch):
    """What is drawn, excluded and trimmed lies in other blocks than what is looked at."""
    from specdec_kernels.triton import verify

    monkeypatch.setattr(verify, "MAX_BLOCK", 32)
    check(random_case(Spec(method, chain, 31, 2, 6, 100, **options)))


@on_device
@pytest.mark.parametrize("method", ["target_only", "without_replacement", "k_seq", "typical", "traversal"])
@pytest.mark.parametrize("size", [2, 16, 17])
def test_sizes_around_powers_of_two(method, size):
    shapes = [[-1] + [0] * (size - 1), list(range(-1, size - 1)), [-1]]
    check(random_case(Spec(method, False, 32, 3, size, 20, distance=0.3, roomy=size == 2), shapes))


@on_device
@pytest.mark.parametrize("method", ["without_replacement", "traversal"])
@pytest.mark.parametrize("trimmed", [None, 20])
def test_a_peaked_draft_that_loses_its_peak(method, trimmed):
    """What is left of q has underflowed beside its peak, so that q is summed again, with another peak."""
    lengths = []
    for seed, sharpness in enumerate((2.0, 8.0, 40.0)):
        case = random_case(Spec(method, False, seed, 3, 7, 40, trimmed=trimmed), [[-1] + [0] * 6] * 3)
        case.draft *= sharpness
        rows = case.cu_nodes[:-1].long()
        best = case.draft[rows].argsort(1, descending=True)[:, :6]  # all draws that such a peak leaves
        best = best if trimmed is None else case.options["draft_vocab"].long()[best]
        case.tokens.view(3, 7)[:, 1:] = best
        case.target = torch.randn(case.target.shape, generator=torch.Generator().manual_seed(seed))
        lengths += check(case).num_tokens.tolist()
    assert set(lengths) == {1, 2}


@on_device
@pytest.mark.parametrize("temperature", [0.0, 0.001])
@pytest.mark.parametrize("method", ["without_replacement", "traversal", "greedy_multi"])
def test_a_draft_with_one_token_left(method, temperature):
    """Of a point mass nothing is left once it was tried; what follows stands for itself."""
    case = random_case(Spec(method, False, 33, 8, 5, 12), [[-1] + [0] * 4] * 8)
    case = case.with_options(draft_params=case.options["draft_params"]._replace(temperature=temperature))
    check(case)


@on_device
@pytest.mark.parametrize("method", TREE_METHODS)
def test_whatever_stands_in_parents(method):
    """Parents that are no earlier nodes are read as the reference reads them; nothing is read out of bounds."""
    case = random_case(Spec(method, False, 41, 4, 9, 20, roomy=True))
    wild = torch.rand(len(case.parents), generator=torch.Generator().manual_seed(41))
    case.parents[wild < 0.15] = -(2**31)
    case.parents[(wild > 0.15) & (wild < 0.3)] = 2**31 - 1
    check(case)


@on_device
@pytest.mark.parametrize(("chain_method", "method"), [("token", "multi_round"), ("block", "traversal_iid")])
@pytest.mark.parametrize("options", [{}, {"point_mass": True}, {"trimmed": 12, "gaps": True}], ids=str)
def test_a_chain_is_a_tree(chain_method, method, options):
    """The kernel of chains follows no links; its bits are those of the tree that has them."""
    chain = random_case(Spec(chain_method, True, 34, 4, 8, 20, distance=0.3, **options))
    parents = torch.cat([torch.arange(-1, len(nodes) - 1, dtype=torch.int32) for nodes in chain.requests()])
    assert_same_bits(run(replace(chain, method=method, parents=parents)), run(chain))


@on_device
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("method", ["multi_round", "k_seq"])
def test_many_merged_draws(method, explicit):
    """More draws than nodes, more than a word of Philox serves; given uniforms are those of first draws."""
    spec = Spec(method, False, 35, 8, 5, 8, distance=2.0, counts=True, explicit=explicit)
    case = random_case(spec, [[-1, 0, 0, 0, 1]] * 8)
    case.counts.view(8, 5)[:, 1:] = torch.tensor([9, 1, 0, 3], dtype=torch.int32)
    assert len(set(check(case).num_tokens.tolist())) > 1


@on_device
@fitting(
    [(method, False) for method in ("target_only", "without_replacement", "greedy_multi", "traversal")],
    {},
    {"point_mass": True},
)
def test_siblings_of_one_token(method, chain, options):
    """A token that comes again takes no mass again."""
    case = random_case(Spec(method, chain, 42, 12, 6, 12, explicit=True, **options), [[-1] + [0] * 5] * 12)
    tokens = case.tokens.view(12, 6)
    tokens[:, 3], tokens[:, 5] = tokens[:, 1], tokens[:, 4]
    case.options["accept_uniforms"].view(12, 6)[:] = torch.linspace(0.45, 0.999, 12)[:, None]
    check(case)


@on_device
@pytest.mark.parametrize("method", ["multi_round", "without_replacement", "k_seq", "traversal", "traversal_iid"])
def test_what_is_left_when_all_is_rejected(method):
    case = random_case(Spec(method, False, 43, 16, 4, 6, explicit=True, distance=1.5), [[-1, 0, 0, 0]] * 16)
    case.target = 0.3 * case.target + torch.arange(6.0).flip(0)
    case.tokens.view(16, 4)[:, 1:] = case.draft[::4].argsort(1, descending=True)[:, :3]
    case.options["accept_uniforms"][:] = 1 - 2.0**-24
    case.options["final_uniforms"] = torch.linspace(0.02, 0.98, 16)
    assert (check(case).num_tokens == 1).sum() > 4


@on_device
def test_the_first_of_the_longest_typical_paths():
    """Depth first is not node order."""
    case = random_case(Spec("typical", False, 44, 1, 7, 3), [[-1, 0, 0, 2, 1, 3, 4]])
    case.target[:] = 0.0  # every token is typical
    assert check(case).nodes.tolist() == [[0, 2, 3, 5]]


@on_device
def test_scale_of_k_seq_at_its_ends():
    """Equal distributions (rho = 1), disjoint ones (no overlap), and an overlap of 1 in 10^6."""
    case = random_case(Spec("k_seq", False, 36, 6, 5, 40), [[-1] + [0] * 4] * 6)
    case.target[: 2 * 5] = case.draft[: 2 * 5]
    even = torch.arange(40) % 2 == 0
    for request, gap in ((2, torch.inf), (3, torch.inf), (4, 14.0), (5, 14.0)):
        rows = slice(5 * request, 5 * request + 5)
        case.target[rows] -= torch.where(even, gap, 0.0)
        case.draft[rows] -= torch.where(even, 0.0, gap)
        case.tokens[rows] = 4
    got = check(case)
    assert (got.num_tokens[:2] == 2).all() and (got.num_tokens[2:4] == 1).all()


@pytest.mark.full
@on_device
@pytest.mark.parametrize("method", TREE_METHODS)
def test_large_vocabularies(method):
    for vocabulary, options in ((32000, {}), (128256, {"trimmed": 32000})):
        check(random_case(Spec(method, False, 37, 2, 6, vocabulary, torch.bfloat16, **options)))


@on_device
def test_distant_rows():
    """Offsets of rows pass 2^31 elements; the buffer is never touched between them."""
    case = random_case(Spec("traversal", False, 38, 1, 6, 64, torch.float16), [[-1, 0, 0, 1, 1, 2]])
    stride = 2**31 // 5 + 64
    wanted = case.run("reference")
    buffer = torch.empty(5 * stride + 64, dtype=torch.float16, device=DEVICE["triton"])
    far = buffer.as_strided((6, 64), (stride, 1))
    far.copy_(case.target)
    assert_same_walks(case, run(replace(case, target=far)), wanted, "triton")


@pytest.mark.parametrize("method", [pytest.param(method, marks=on_gpu) for method in TREE_METHODS])
def test_cuda_graph(method):
    """Captured once, replayed with other logits: nothing is read by the host, nothing depends on data."""
    import specdec_kernels as sk

    shapes = [[-1, 0, 0, 0, 1, 1, 2]] * 8
    first, second = (random_case(Spec(method, False, seed, 8, 7, 1000, explicit=True), shapes) for seed in (39, 40))
    names = ("tokens", "parents", "cu_nodes", "target", "draft")
    held = {name: getattr(first, name).cuda() for name in names}
    uniforms = {name: first.options[name].cuda() for name in ("accept_uniforms", "final_uniforms")}
    tree = sk.DraftTree(held["tokens"], held["parents"], held["cu_nodes"], 7, 2)

    def call():
        return sk.verify_tree(
            tree, held["target"], held["draft"], method=method, backend="triton", logprobs=True, **uniforms
        )  # fmt: skip

    call()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for case in (second, first):
        for name in names:
            held[name].copy_(getattr(case, name))
        for name, value in uniforms.items():
            value.copy_(case.options[name])
        graph.replay()
        got = sk.Verified(*(x.cpu() for x in out))
        assert_same_walks(case, got, case.run("reference"), "triton")
