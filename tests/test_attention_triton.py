"""The Triton kernel of tree_attention against its definition: trees, graphs, windows, splits, head sizes."""

from __future__ import annotations

import math
import random

import pytest
import torch

import specdec_kernels as sk
from attention_cases import NAN, Case, bits_of, naive
from attention_triton import TOLERANCE, check, check_reference, each_device, run
from specdec_kernels import TreeLayout

pytestmark = each_device


def random_case(seed: int, dtype=torch.float32, **changes) -> Case:
    draw = random.Random(seed)

    def parents():
        nodes = draw.choice([1, 2, 5, 9, 9, 20])
        return [-1, *(draw.randint(max(0, node - 6), node - 1) for node in range(1, nodes))]

    batch = draw.choice([1, 2, 3])
    q_heads, kv_heads = draw.choice([(1, 1), (2, 2), (4, 2), (6, 2), (5, 1)])
    requests = [parents() for _ in range(batch)]
    prefixes = [draw.choice([0, 1, 17, 40, 70]) for _ in range(batch)]
    sizes = {"size": draw.choice([8, 24, 16, 7]), "value_size": draw.choice([8, 17, 16])}
    return Case(requests, prefixes, q_heads, kv_heads, dtype=dtype, seed=seed, **sizes | changes)


def random_options(case: Case, seed: int) -> dict:
    draw, make = random.Random(seed), torch.Generator().manual_seed(seed)
    options = {}
    if draw.random() < 0.5:
        options["window"] = draw.choice([1, 4, 11, 60])
    if draw.random() < 0.4:
        options["softcap"] = 1.5
    if draw.random() < 0.4:
        options["sinks"] = torch.randn(case.q_heads, generator=make)
    if draw.random() < 0.4:
        options["k_scale"] = torch.rand(case.kv_heads, generator=make) + 0.5
        options["v_scale"] = torch.rand(case.kv_heads, generator=make) + 0.5
    if draw.random() < 0.3:
        nodes = [len(request) for request in case.requests for _ in request]
        options["mask"] = [[draw.random() < 0.3 for _ in range(n)] for n in nodes]
    return options


@pytest.mark.parametrize("seed", range(4))
def test_random(device, seed):
    dtype = [*TOLERANCE, torch.float32][seed % 4]
    case = random_case(seed, dtype)
    check(case, device, small=True, **random_options(case, seed))


@pytest.mark.full
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("seed", range(10, 50))
def test_random_often(device, dtype, seed):
    case = random_case(seed, dtype)
    check(case, device, small=seed % 4 > 0, **random_options(case, seed))


@pytest.mark.parametrize(
    "heads, sizes",
    [((8, 1), (64, 64)), ((2, 2), (80, 80)), ((4, 2), (96, 40)), ((6, 2), (40, 128)), ((1, 1), (256, 256))],
)
def test_head_sizes(device, heads, sizes):
    """Tiles as a GPU gets them."""
    case = Case([[-1, 0, 0, 1, 2], [-1, 0]], [75, 3], *heads, *sizes, seed=1)
    check(case, device, window=20)


@pytest.mark.parametrize("window", [None, 6])
def test_wide_trees(device, window):
    """More nodes than one word of bits, more rows than one tile."""
    draw = random.Random(3)
    wide = [-1, *(draw.randint(0, min(node - 1, 9)) for node in range(1, 100))]
    deep = [-1, *range(66)]
    check(Case([wide, [-1], deep], [9, 20, 0], 1, 1), device, small=True, window=window)


@pytest.mark.full
def test_trees_of_1024_nodes(device):
    draw = random.Random(4)
    for parents in ([-1, *range(1023)], [-1, *(draw.randint(0, node - 1) for node in range(1, 1024))]):
        check_reference(Case([parents, [-1, 0]], [100, 3000], 2, 1, 16, 16), device, window=50)


@pytest.mark.parametrize("programs", [1, 6])
def test_any_number_of_splits(device, programs, monkeypatch):
    """Ragged prefixes, whatever the GPU: lengths that are not split stand beside lengths that are."""
    from specdec_kernels.triton import attention

    monkeypatch.setattr(attention, "_device", lambda index: ("sm_90" if index is not None else "interpreter", programs))
    case = Case([[-1, 0, 0, 1], [-1], [-1, 0], [-1, 0, 0]], [80, 0, 20, 33], 2, 1)
    check(case, device, small=True)
    check(case, device, small=True, window=40, sinks=torch.tensor([1.0, -2.0]))


def test_batches_of_more_requests_than_a_vector_holds(device):
    sizes = [1 + b % 3 for b in range(40)]
    check_reference(Case([[-1, *[0] * (n - 1)] for n in sizes], [b % 7 for b in range(40)], 1, 1), device)


def test_windows_count_positions(device):
    check(Case([[-1, *[0] * 8]], [30], seed=2), device, small=True, window=3)
    case = Case([[-1, 0, 1, 1]], [40], seed=3)
    layout = sk.trees.tree_layout(case.tree)
    deeper = TreeLayout(layout.depths + 2, *layout[1:])
    for b in range(3):  # seen by no row, so not read
        case.keys[0, :, 40 + 2 - 8 - b] = NAN
        case.values[0, :, 40 + 2 - 8 - b] = NAN
    check_reference(case, device, small=True, window=8, layout=deeper)


def test_rows_that_see_nothing(device):
    case = Case([[-1, 0, 0]], [0])
    case.keys[0, :, 1], case.values[0, :, 1] = NAN, NAN
    mask = [[True, False, False], [False, False, False], [True, False, True]]
    check(case, device, mask=mask)
    out, lse = run(case, device, mask_bits=bits_of(mask, 3))
    assert (out[1] == 0).all() and (lse[1] == -math.inf).all()
    sinks = torch.arange(4.0)
    out, lse = run(case, device, mask_bits=bits_of(mask, 3), sinks=sinks)
    assert (out[1] == 0).all()
    torch.testing.assert_close(lse[1], sinks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_further_from_the_truth_than_sdpa(device, dtype):
    case = Case([[-1, 0, 0, 1, 1, 2]], [250], 8, 2, 64, 64, dtype=dtype, spare=0)
    want, _ = naive(case)
    got, _ = run(case, device)
    seen = case.tree.ancestor_bits()[:, :1] >> torch.arange(6) & 1
    mask = torch.cat([torch.ones(6, 250), seen], 1).bool()
    query = case.query.transpose(0, 1)[None]
    theirs = torch.nn.functional.scaled_dot_product_attention(
        query.to(device), case.keys.to(device), case.values.to(device), mask.to(device), enable_gqa=True
    )
    theirs = theirs[0].transpose(0, 1).cpu()
    errors = [(x.double() - want).square().mean().sqrt().item() for x in (got, theirs)]
    assert errors[0] <= 1.05 * errors[1], errors
