"""The head's Triton kernels against the reference: on a GPU, and everywhere under Triton's interpreter.

The interpreter is chosen when triton is imported, so `test_under_the_interpreter` runs this file again in a process of
its own; in any other process the interpreted tests are skipped.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import specdec_kernels as sk
from head_cases import inputs, whole
from head_triton_support import call, check, stream, there
from verify_backends import INTERPRETED, TRITON_DEVICES, in_another_process

pytest.importorskip("triton", reason="triton is not installed")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF = float("inf")


@pytest.fixture(params=TRITON_DEVICES)
def device(request) -> str:
    return request.param


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted run")
@pytest.mark.parametrize("which, least", [("not full", 40), pytest.param("full", 10, marks=pytest.mark.full)])
def test_under_the_interpreter(which, least):
    assert in_another_process(str(Path(__file__)), "-m", which, TRITON_INTERPRET="1") >= least


def numbers(height, seed=1):
    """(bias, scale) of every row."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(height, generator=generator), torch.rand(height, generator=generator) + 0.5


@pytest.mark.parametrize("draws", [False, True], ids=["topk", "sample"])
@pytest.mark.parametrize(
    "batch, dtype",
    [(1, torch.bfloat16), (1, torch.float16), (7, torch.float32), (7, torch.bfloat16), (17, torch.float16)],
    ids=str,
)
def test_agrees_with_reference(device, batch, dtype, draws):
    hidden, weight = inputs(batch, 111, 60, dtype)
    bias, scale = numbers(111)
    check(device, hidden, weight, 4, draws=draws, bias=bias, scale=scale, temperature=0.7)


@pytest.mark.full
@pytest.mark.parametrize("draws", [False, True], ids=["topk", "sample"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "batch, height, dim", [(3, 5, 1), (2, 1000, 300), (33, 1000, 129), (70, 257, 64), (130, 200, 32)]
)
def test_agrees_with_reference_at_more_sizes(device, batch, height, dim, dtype, draws):
    hidden, weight = inputs(batch, height, dim, dtype)
    for k in (1, 3, 64):
        check(device, hidden, weight, k, draws=draws)


def whose_rows(height, batch):
    """Ways to choose rows: shuffled, padded, doubled; options of a call by name."""
    generator = torch.Generator().manual_seed(2)

    def some(count):
        rows = torch.randperm(height, generator=generator)[:count].to(torch.int32)
        rows[::7] = -1
        return rows

    doubled = some(count := 2 * height // 3)
    doubled[1 : count // 2] = doubled[count // 2 + 1 : 2 * (count // 2)]
    return {
        "all": {},
        "named": {"token_ids": torch.randint(0, 2**31 - 1, (height,), generator=generator).to(torch.int32)},
        "shared": {"rows": some(count)},
        "doubled": {"rows": doubled},
        "own": {"rows": torch.stack([some(count) for _ in range(batch)])},
        "groups": {
            "rows": torch.stack([some(count) for _ in range(3)]),
            "row_groups": torch.tensor([0, 0, 2, 2, 1, 0, 2] * 9, dtype=torch.int32)[:batch],
        },
        "unknown groups": {
            "rows": torch.stack([some(count) for _ in range(2)]),
            "row_groups": torch.tensor([0, -1, 1, 1, 2, 0, 2**31 - 1, -(2**31)] * 9, dtype=torch.int32)[:batch],
        },
    }  # fmt: skip


@pytest.mark.parametrize("how", ["all", "named", "shared", "doubled", "own", "groups", "unknown groups"])
@pytest.mark.parametrize("batch", [2, pytest.param(18, marks=pytest.mark.full)])
def test_ties_and_whose_rows(device, batch, how):
    """Whole numbers: nothing is rounded, most logits are tied, and every answer is the reference's."""
    hidden, weight = whole(batch, 120, 12)
    options = whose_rows(120, batch)[how]
    check(device, hidden, weight, 5, exact=True, **options)
    check(device, hidden, weight, 5, exact=True, draws=True, temperature=0.5, **options)


@pytest.mark.parametrize("how, draws", [("doubled", False), ("groups", True), ("unknown groups", False)])
def test_ties_on_tensor_cores(device, how, draws):
    hidden, weight = whole(18, 120, 12)
    check(device, hidden, weight, 4, exact=True, draws=draws, **whose_rows(120, 18)[how])


@pytest.mark.parametrize(
    "how, draws, k",
    [("all", True, 64), *(pytest.param(how, False, 64, marks=pytest.mark.full) for how in ("all", "groups"))],
)
def test_64_of_them(device, how, draws, k):
    hidden, weight = whole(2, 120, 12)
    check(device, hidden, weight, k, exact=True, draws=draws, **whose_rows(120, 2)[how])


@pytest.mark.parametrize("batch", [3, 20])
def test_one_program_or_many(device, batch, monkeypatch):
    """The same answers whatever the share of the rows that a program looks at."""
    from specdec_kernels.triton import head

    hidden, weight = whole(batch, 200, 12)
    bias, _ = numbers(200)
    bias = (bias * 4).round() / 8
    for processors in (1, 100):
        monkeypatch.setattr(head, "_machine", lambda index, n=processors: ("sm_80", n))
        check(device, hidden, weight, 4, exact=True, draws=batch == 3, bias=bias)


def test_rows_that_do_not_exist(device):
    """What they would read is NaN; the masks must keep it out."""
    hidden, weight = inputs(3, 50, 16)
    weight[0] = float("nan")
    rows = torch.tensor([3, -1, 7, 50, 9, 2**31 - 1, -(2**31)], dtype=torch.int32)
    for draws in (False, True):
        got = check(device, hidden, weight, 5, draws=draws, rows=rows)
        assert (got.tokens[:, 3:] == -1).all() and (got.logits[:, 3:] == -INF).all()
        assert sorted(got.tokens[0, :3].tolist()) == [3, 7, 9]


def test_hardly_any_rows(device):
    hidden, weight = inputs(3, 4, 16)
    none = torch.empty(0, dtype=torch.int32)
    for draws in (False, True):
        got = check(device, hidden, weight, 6, draws=draws)
        assert (got.tokens[:, 4:] == -1).all()
        groups = torch.tensor([0, -1, 1], dtype=torch.int32)
        check(device, hidden[:0], weight, 2, draws=draws)
        for options in (
            {"rows": none},
            {"rows": none.expand(3, 0)},
            {"rows": none.new_empty(0, 4), "row_groups": groups},
            {"rows": none.new_empty(2, 0), "row_groups": groups},
        ):
            got = check(device, hidden, weight, 2, draws=draws, **options)
            assert (got.lse == -INF).all() and (got.entropy == 0).all() and (got.tokens == -1).all()
        check(device, hidden, weight[:0], 2, draws=draws, rows=torch.tensor([0, 1], dtype=torch.int32))
        check(device, hidden, weight[:0], 2, draws=draws)


@pytest.mark.parametrize("batch", [2, 5])
def test_banned_tokens(device, batch):
    hidden, weight = inputs(batch, 111, 16)
    bias = torch.full((111,), -INF)
    bias[[5, 60, 110]] = torch.tensor([0.0, 1.0, -2.0])
    for draws in (False, True):
        got = check(device, hidden, weight, 5, draws=draws, bias=bias)
        assert (got.tokens[:, 3:] == -1).all()
        nothing = check(device, hidden, weight, 5, draws=draws, bias=torch.full((111,), -INF))
        assert (nothing.lse == -INF).all() and (nothing.entropy == 0).all()


@pytest.mark.parametrize("poison, draws", [(float("nan"), False), (INF, True)])
@pytest.mark.parametrize("batch, dtype", [(2, torch.bfloat16), (17, torch.float32), (17, torch.float16)])
def test_a_broken_request_leaves_its_neighbours_alone(device, batch, dtype, poison, draws):
    hidden, weight = inputs(batch, 111, 60, dtype)
    dirty = hidden.clone()
    dirty[1, 17] = poison
    clean = call(device, "triton", hidden, weight, 2, draws=draws)
    got = call(device, "triton", dirty, weight, 2, draws=draws)
    assert (got.tokens[1] == -1).all() and (got.logits[1] == -INF).all()
    assert got.lse[1].isnan() and got.entropy[1].isnan()
    others = [b for b in range(batch) if b != 1]
    assert all(torch.equal(a[others], b[others]) for a, b in zip(got, clean, strict=True))


def test_temperatures(device):
    """Of each request its own; 0 ranks by the logits, and near 0 the noise still decides between equal logits."""
    hidden, weight = whole(7, 111, 9)
    check(device, hidden, weight, 6, exact=True, temperature=torch.tensor([1.0, 0.25, 3.0, 0.6, 1e-6, 1e-30, 50.0]))
    mixed = torch.tensor([0.0, 1.0, 1e-8, 1e-4, 1e-30, 0.0, 2.0])
    got = check(device, hidden, weight, 6, exact=True, draws=True, temperature=mixed)
    top = call(device, "triton", hidden, weight, 6)
    assert torch.equal(got.tokens[[0, 4, 5]], top.tokens[[0, 4, 5]])
    assert not torch.equal(got.tokens[[2, 3]], top.tokens[[2, 3]])
    check(device, hidden, weight, 6, exact=True, draws=True, temperature=0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_are_read_where_they_lie(device, dtype):
    hidden, weight = inputs(3, 111, 60, dtype)
    wide = torch.full((111, 100), float("nan"), dtype=dtype, device=device)
    wide[:, 7:67] = there(weight, device)
    rows = torch.arange(110, -1, -1, dtype=torch.int32, device=device).repeat_interleave(2)[::2]
    want = call("cpu", "reference", hidden, weight, 4, rows=rows.cpu())
    for h in (hidden.T.contiguous().T, torch.cat([hidden, hidden], 1)[:, :60]):
        for w in (wide[:, 7:67], there(weight.T.contiguous(), device).T):
            got = call(device, "triton", there(h, device), w, 4, rows=rows)
            assert torch.equal(got.tokens, want.tokens)
            torch.testing.assert_close(got.all_logits, want.all_logits, rtol=1e-5, atol=3e-5)


def test_distant_rows(device):
    """Offsets of rows pass 2^31 elements; the buffer is never touched between them."""
    hidden, weight = inputs(17, 6, 64, torch.float16)
    stride = 2**31 // 5 + 64
    far = torch.empty(5 * stride + 64, dtype=torch.float16, device=device).as_strided((6, 64), (stride, 1))
    far.copy_(weight)
    for vectors in (hidden, hidden[:1]):
        want = call("cpu", "reference", vectors, weight, 4)
        got = call(device, "triton", vectors, far, 4)
        assert torch.equal(got.tokens, want.tokens)


def test_what_it_cannot_serve(device):
    hidden, weight = inputs(2, 20, 8, torch.float64)
    with pytest.raises(sk.BackendError, match=r"^backend='triton' cannot serve head_topk: hidden is torch.float64"):
        call(device, "triton", hidden, weight, 2)


def test_logits_only_on_request(device):
    hidden, weight = inputs(2, 20, 8)
    assert call(device, "triton", hidden, weight, 2, return_logits=False).all_logits is None


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("batch", [1, 4, 60])
def test_cuda_graph(batch):
    """Captured once, replayed with other vectors: nothing is read by the host, nothing depends on data."""
    first, weight = whole(batch, 3000, 64, torch.bfloat16)
    second, _ = whole(batch, 1, 64, torch.bfloat16, seed=9)
    held, there_weight, rng = first.cuda(), weight.cuda(), there(stream(batch), "cuda")

    def both():
        return sk.head_topk(held, there_weight, 8, backend="triton"), sk.head_sample(
            held, there_weight, 4, rng=rng, backend="triton"
        )

    both()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        top, drawn = both()
    for hidden in (second, first):
        held.copy_(hidden)
        graph.replay()
        assert torch.equal(top.tokens.cpu(), call("cpu", "reference", hidden, weight, 8).tokens)
        assert torch.equal(drawn.tokens.cpu(), call("cpu", "reference", hidden, weight, 4, draws=True).tokens)
