"""The filter threshold of the Triton kernels keeps exactly the set of the sorted definition.

On a GPU, and everywhere under Triton's interpreter: `test_under_the_interpreter` runs this file again in a process of
its own, as in test_verify_triton.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed")

from specdec_kernels.reference.rows import Rows
from triton_cases import packed_bits
from triton_cut import cuts

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEVICE = "cpu" if INTERPRETED else "cuda"

on_device = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device; runs inside test_under_the_interpreter"
)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted run")
@pytest.mark.parametrize("which, least", [("not full", 20), pytest.param("full", 10, marks=pytest.mark.full)])
def test_under_the_interpreter(which, least):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which, str(Path(__file__))]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=3600)
    print(done.stdout, done.stderr, sep="\n")
    assert done.returncode == 0
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= least, "the interpreted tests did not run"


@pytest.mark.skipif(INTERPRETED, reason="a process interprets Triton or compiles it, never both")
@pytest.mark.parametrize("which", ["chosen", pytest.param("--full", marks=pytest.mark.full)])
def test_compiles_for_every_target(which, tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}  # an empty cache: compile
    command = [sys.executable, str(ROOT / "tests" / "triton_cut.py"), which]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    names = {row["name"] for row in rows}
    targets = {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"}
    assert {(row["name"], row["target"]) for row in rows} == {(name, target) for name in names for target in targets}
    assert len(names) == (3 if which == "--full" else 1)
    assert all(row["bytes"] > 0 for row in rows)


# Settings of a row: temperature, top_k, top_p, min_p.
SETTINGS = [
    (1.0, 0, 0.9, 0.0),
    (0.7, 50, 1.0, 0.0),
    (1.0, 20, 0.8, 0.0),
    (1.3, 0, 0.999, 0.001),
    (0.3, 7, 0.5, 0.1),
    (1.0, 0, 1.0, 0.05),
    (3.0, 300, 0.95, 0.0),
    (0.01, 1, 0.99, 0.0),
    (1.0, 0, 0.0, 0.0),
    (50.0, 0, 0.3, 1.0),
    (1.0, 10**6, 1.0, 0.0),
]


def _kinds(V, dtype, seed):
    """[kinds, V] logits of every shape that may ask something of its own."""
    make = torch.Generator().manual_seed(seed)
    normal = torch.randn(8, V, generator=make)
    tied = (normal[2] * 2).round()
    holes = torch.where(torch.rand(V, generator=make) < 0.7, -torch.inf, normal[3] * 4)
    holes[seed % V] = 1.0
    zeros = torch.where(normal[4] > 0, 0.0, -0.0)
    # Among the smallest there are, but for bf16, of which the interpreter reads subnormal numbers as 0.
    zeros[normal[4].abs() < 0.5] = {torch.float32: -1e-44, torch.bfloat16: -2e-38, torch.float16: -6e-8}[dtype]
    far = 1e4 + normal[5]  # differences which many logits share
    wide = normal[6].clamp(-3, 3) * (2e4 if dtype == torch.float16 else 1e38)
    lonely = torch.full((V,), -torch.inf)
    lonely[seed % V] = -2.0
    plain = [normal[0] * 3, normal[1] * 0.01, torch.full((V,), 1.5), normal[7] * 10]
    return torch.stack([*plain, tied, holes, zeros, far, wide, lonely]).to(dtype)


def _sorted_set(x, settings_):
    """[N, V] what the filters keep of fp32 logits [N, V] by the definition: sort and sum, row by row."""
    kept = []
    for row, (temperature, top_k, top_p, min_p) in zip(x, settings_, strict=True):
        z = (row - row.max()) / temperature
        keep = row > -torch.inf
        if top_k > 0:
            keep &= z >= z.sort(descending=True).values[min(int(top_k), len(z)) - 1]
        if top_p < 1:
            ranked = torch.where(keep, z, -torch.inf).sort(descending=True).values
            mass = ranked.double().softmax(0).cumsum(0)
            keep &= z >= ranked[min(int((mass < top_p.double()).sum()), len(z) - 1)]
        if min_p > 0:
            keep &= z.double() >= min_p.double().log()
        kept.append(keep)
    return torch.stack(kept)


def check(logits, numbers, *, x=None, **options):
    """Compare sets and masses; returns ([N] cuts, [N] masses). `x`: fp32 [N, V] of the row, where not the logits'."""
    numbers = torch.as_tensor(numbers, dtype=torch.float32)
    x = logits.float() if x is None else x
    there = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    cut, mass = (found.cpu() for found in cuts(logits.to(DEVICE), numbers.to(DEVICE), **there))
    got = (x >= cut[:, None]) & (x > -torch.inf)
    wanted = _sorted_set(x, numbers)
    wrong = (got != wanted).any(1)
    assert not wrong.any(), f"rows {wrong.nonzero()[:, 0].tolist()}: kept {got.sum(1)}, expected {wanted.sum(1)}"
    z = (x.double() - x.double().amax(1, keepdim=True)) / numbers[:, :1]
    sums = torch.where(wanted, z.exp(), 0.0).sum(1)
    told = mass > 0
    torch.testing.assert_close(mass[told].double(), sums[told], rtol=1e-5, atol=0)
    return cut, mass


def check_kinds(V, dtype, shifts, **options):
    """Every kind of row, each with another setting; `shifts` says with which."""
    for shift in shifts:
        logits = _kinds(V, dtype, seed=V + shift)
        check(logits, [SETTINGS[(i + shift) % len(SETTINGS)] for i in range(len(logits))], **options)


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [1, 2, 111, 1000, 4097])
def test_equals_the_sorted_definition(V, dtype):
    check_kinds(V, DTYPES[dtype], [(len(dtype) + V) % len(SETTINGS)])


@on_device
@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [1, 2, 111, 1000, 4097])
def test_all_settings(V, dtype):
    check_kinds(V, DTYPES[dtype], range(len(SETTINGS)))


@on_device
@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [32000, 262144])
def test_large_vocabularies(V, dtype):
    check_kinds(V, DTYPES[dtype], [4 * list(DTYPES).index(dtype)] if V > 100000 else [1, 5, 8])


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
def test_small_blocks(dtype):
    """Lanes overflow what is gathered of them, so that rows are sectioned."""
    check_kinds(111, DTYPES[dtype], [len(dtype)], block=32)


@on_device
def test_top_p_sections_what_top_k_left():
    """In bf16 the next logit under the cut of top_k, an fp32, lies within the same key: it is gone all the same.

    Beside a peak of 64, z is too coarse to tell the 40th other logit from the fp32 values just under it. The hot
    columns share few lanes, so that these cannot hold them.
    """
    column = torch.arange(112)
    rank = column % 16 * 7 + column // 16
    logits = 2 - rank / 128
    logits[rank == 111] = 64.0
    logits = logits.repeat(2, 1).bfloat16()
    cut, mass = check(logits, [(1000.0, 41, 0.975, 0.0), (1000.0, 41, 1.0, 0.0)], block=16)
    assert mass.tolist() == [0, 0], "nothing was sectioned"
    assert (logits >= cut[:, None]).sum(1).tolist() == [40, 41]
    assert cut[1] < logits[1, rank == 39].item()


@on_device
def test_top_p_between_two_neighbours():
    """top_p is the mass of the first j tokens, rounded to fp32: only sums in fp64 tell whether it suffices."""
    make = torch.Generator().manual_seed(0)
    V, at = 600, torch.tensor([300, 200, 60, 12, 3, 500, 30, 7])
    logits = torch.randn(len(at), V, generator=make) * torch.tensor([0.1, 1.0, 2.0, 3.0]).repeat(2)[:, None]
    mass = logits.sort(1, descending=True).values.sub(logits.amax(1, keepdim=True)).double().softmax(1).cumsum(1)
    numbers = torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(len(at), 1)
    numbers[:, 2] = mass.gather(1, at[:, None])[:, 0].float()
    more = _sorted_set(logits, numbers).sum(1) - at - 1
    assert set(more.tolist()) == {0, 1}, "one side of the edge was never asked"
    check(logits, numbers)


@on_device
def test_ties_that_were_dismissed_count():
    """198 logits share the place of the third; top_p asks for a share of all 200, of which a lane gathers four."""
    logits = torch.full((3, 200), -3.0)
    logits[:, 7] = logits[:, 107] = 0.0
    cut, _ = check(logits, [(1.0, 3, 0.2, 0.0), (1.0, 3, 0.1, 0.0), (1.0, 3, 1.0, 0.0)], block=32)
    assert cut[0] == cut[2] < cut[1]


@on_device
def test_equal_zeros():
    logits = torch.tensor([[-1.0, -0.0, 0.0, -0.0, -2.0], [0.0, 3.0, -0.0, -1.0, 3.0]])
    cut, _ = check(logits, [(1.0, 1, 1.0, 0.0), (1.0, 3, 0.999, 0.0)])
    assert (logits >= cut[:, None]).sum(1).tolist() == [3, 4]


@on_device
def test_what_is_off_keeps_all():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    cut, _ = check(logits, [(1.0, 0, 1.0, 0.0), (1.0, 50, 1.0, 0.0), (1.0, 51, 1.0, 0.0), (1.0, 2.0**40, 1.0, 0.0)])
    assert (cut == -torch.inf).all()


@on_device
def test_mass_is_told_where_it_was_gathered():
    """One pass suffices for a few tokens of many; not for min_p alone, which reads no row, nor where many stay."""
    logits = torch.randn(6, 800, generator=torch.Generator().manual_seed(2)) * 4
    logits[3:5] *= 0.01
    numbers = [(1.0, 20, 1.0, 0.0), (1.0, 0, 0.8, 0.0), (1.0, 12, 0.9, 0.01)]
    numbers += [(1.0, 0, 0.9, 0.0), (1.0, 600, 1.0, 0.0), (1.0, 0, 1.0, 0.1)]
    _, mass = check(logits, numbers, block=128)
    assert (mass > 0).tolist() == [True] * 3 + [False] * 3


@on_device
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_masks_and_compact_vocabularies(dtype):
    make = torch.Generator().manual_seed(3)
    V, C = 500, 200
    logits = _kinds(C, DTYPES[dtype], seed=4)
    numbers = [SETTINGS[(i + 2) % 7] for i in range(len(logits))]
    keep = torch.rand(len(logits), V, generator=make) < 0.7
    vocab = torch.randperm(V, generator=make)[:C].sort().values.to(torch.int32)
    keep[:, vocab[4]] = True  # the only finite logit of one kind
    wide = torch.full((len(logits), 33), -1, dtype=torch.int32)
    wide[:, 1::2] = packed_bits(keep)  # words that are not next to each other
    x = torch.where(keep[:, vocab.long()], logits.float(), -torch.inf)
    check(logits, numbers, x=x, vocab=vocab, allowed=wide[:, 1::2], vocabulary=V)
    by_column = logits.t().contiguous().t()
    keep[:, 4] = True
    check(by_column, numbers, x=torch.where(keep[:, :C], logits.float(), -torch.inf), allowed=packed_bits(keep[:, :C]))


@on_device
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_mixed_rows(dtype):
    """A mixture has bits that neither of its rows has."""
    make = torch.Generator().manual_seed(5)
    logits, other = (torch.randn(2, 6, 80, generator=make) * 3).to(DTYPES[dtype])
    share = torch.tensor(0.3)
    x = (1 - share) * logits.float() + share * other.float()
    check(logits, SETTINGS[:6], x=x, other=other, mix=0.3)
    check(logits[:2], SETTINGS[:2], x=x[:2], other=other[:2], mix=0.3, block=16)


@on_device
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_equals_the_reference(dtype):
    """The rows of the reference backend are cut at the same places."""
    logits = _kinds(111, DTYPES[dtype], seed=6)
    numbers = torch.tensor([SETTINGS[i % len(SETTINGS)] for i in range(len(logits))])
    cut, _ = check(logits, numbers)
    rows = torch.arange(len(logits))
    weights, _ = Rows(logits, 111, params=numbers).log_weights(rows, rows)
    x = logits.float()
    z = (x - x.amax(1, keepdim=True)) / numbers[:, :1]
    assert torch.equal((x >= cut[:, None]) & (z > -torch.inf), weights > -torch.inf)


LOGITS = st.one_of(
    st.floats(-30, 30, width=16),
    st.sampled_from([-torch.inf, 0.0, -0.0, 1.0, 5e-8, -6.0]),
    st.floats(-60000, 60000, width=16),
)


def _arbitrary(row, dtype, temperature, top_k, top_p, min_p, block):
    row = [*row, 0.25]  # something finite
    check(torch.tensor([row], dtype=DTYPES[dtype]), [(temperature, top_k, top_p, min_p)], block=block)


ARGUMENTS = {
    "row": st.lists(LOGITS, max_size=150),
    "dtype": st.sampled_from(list(DTYPES)),
    "temperature": st.sampled_from([1.0, 0.7, 0.05, 2.5, 1000.0]),
    "top_k": st.sampled_from([0, 0, 1, 2, 5, 40]),
    "top_p": st.one_of(st.just(1.0), st.floats(0, 1, width=32)),
    "min_p": st.one_of(st.just(0.0), st.floats(0, 1, width=32)),
    "block": st.sampled_from([16, 128]),
}


@on_device
@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(**ARGUMENTS)
def test_arbitrary_rows(**arguments):
    _arbitrary(**arguments)


@on_device
@pytest.mark.full
@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(**ARGUMENTS)
def test_arbitrary_rows_often(**arguments):
    _arbitrary(**arguments)
