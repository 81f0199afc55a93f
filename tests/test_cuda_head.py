"""The head's CUDA code: device code run by fibers on the host (cuda_host.h), and the ops on a GPU where there is one.

The head's own tests with this code behind them, and what they do not reach. How fast it is only a GPU can tell.
"""

from __future__ import annotations

import inspect
import subprocess
from itertools import pairwise, product

import pytest
import torch

import cuda_head
import specdec_kernels as sk
import test_head
import test_head_law
import test_head_tail
from conftest import GPU
from head_cases import TOLERANCE, inputs
from specdec_kernels import backends
from test_cuda_compile import CSRC, tool
from test_head import DTYPES, stream

pytestmark = pytest.mark.skipif(cuda_head.compiler() is None, reason="no C++ compiler on this machine")
INF = float("inf")


def cases_of(*modules):
    """Every test of other modules that takes a backend, with all its other parameters."""
    for module in modules:
        for name, function in inspect.getmembers(module, inspect.isfunction):
            marks = getattr(function, "pytestmark", [])
            values = {mark.args[0]: mark.args[1] for mark in marks if mark.name == "parametrize"}
            if not name.startswith("test_") or set(inspect.signature(function).parameters) != set(values):
                continue
            if "backend" not in values:
                continue
            others = {key: value for key, value in values.items() if key != "backend"}
            for picked in product(*others.values()):
                chosen = dict(zip(others, picked, strict=True))
                # The longest of all, about the threads of a CPU: once will do.
                again = "threads" in name and chosen["dtype"] != torch.bfloat16
                marks = [pytest.mark.full] if again else []
                yield pytest.param(function, chosen, id="-".join([name[5:], *map(str, picked)]), marks=marks)


@pytest.mark.parametrize(("test", "arguments"), list(cases_of(test_head)))
def test_as_every_backend(head_ops, test, arguments):
    test(backend="cuda", **arguments)


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize(("test", "arguments"), list(cases_of(test_head_law, test_head_tail)))
def test_law(test, arguments):
    with cuda_head.Gpu().instead():
        test(backend="cuda", **arguments)


@pytest.mark.skipif(backends.MISSING["cpu"] is not None, reason=str(backends.MISSING["cpu"]))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_tokens_as_the_cpu(head_ops, dtype):
    hidden, weight = inputs(7, 3000, 520, dtype)
    rng = stream(7)
    rows = torch.randperm(3000, generator=torch.Generator().manual_seed(1))[:2222].to(torch.int32)
    for k, temperature in ((1, 1.0), (10, 0.7), (64, 1.3)):
        for op, rest in ((sk.head_topk, {}), (sk.head_sample, {"rng": rng})):
            got, want = (
                op(hidden, weight, k, rows=rows, temperature=temperature, backend=backend, **rest)
                for backend in ("cuda", "cpu")
            )
            assert torch.equal(got.tokens, want.tokens)
            for a, b in zip((got.logits, got.lse, got.entropy), (want.logits, want.lse, want.entropy), strict=True):
                torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_bit_depends_on_thread_blocks_or_shared_memory(head_library, dtype):
    hidden, weight = inputs(13, 777, 520, dtype)
    rng = stream(13)
    rest = (None, None, None, None, None, 0.7, None, True)
    expected = None
    for machine, blocks in ((cuda_head.H200, 1), (cuda_head.A100, 13), (cuda_head.SMALL, 40), (cuda_head.SMALL, 1)):
        host = cuda_head.Host(head_library, machine=machine, blocks=blocks)
        got = (*host.head_topk(hidden, weight, 9, *rest), *host.head_sample(hidden, weight, 9, *rng, *rest))
        expected = expected or got
        cuda_head.same_bits(got, expected, (machine, blocks))


def test_long_vectors_take_one_thread_block_of_more_warps_or_fewer_requests(head_library):
    """A machine with little shared memory reads the weight several times, and computes the same."""
    hidden, weight = inputs(8, 50, 3000, torch.bfloat16)
    rest = (None, None, None, None, None, 1.0, None, True)
    wide = cuda_head.Host(head_library).head_topk(hidden, weight, 5, *rest)
    for machine in (cuda_head.SMALL, (102400, 60000), (10**9, 232448)):
        cuda_head.same_bits(cuda_head.Host(head_library, machine=machine).head_topk(hidden, weight, 5, *rest), wide)
    with pytest.raises(AssertionError, match="no room in shared memory"):
        cuda_head.Host(head_library, machine=(16384, 8192)).head_topk(hidden, weight, 5, *rest)


@pytest.mark.parametrize("batch", [1, 9, 33, 70])
def test_groups_of_rows(head_ops, batch):
    """Runs of equal groups, longer than a run may be, again later, and groups that are not there."""
    hidden, weight = inputs(batch, 300, 60)
    generator = torch.Generator().manual_seed(batch)
    lists = torch.stack([torch.randperm(304, generator=generator)[:150] - 2 for _ in range(5)]).to(torch.int32)
    groups = torch.arange(batch).div(11, rounding_mode="floor").mul(7).remainder(6).to(torch.int32)
    groups[batch // 2] = -1
    for op, rest in ((sk.head_topk, {}), (sk.head_sample, {"rng": stream(batch)})):
        got, want = (
            op(hidden, weight, 7, rows=lists, row_groups=groups, return_logits=True, backend=backend, **rest)
            for backend in ("cuda", "reference")
        )
        assert torch.equal(got.tokens, want.tokens)
        for a, b in zip((got.lse, got.entropy, got.all_logits), want[2:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        none = op(hidden, weight, 7, rows=lists[:0], row_groups=groups, return_logits=True, backend="cuda", **rest)
        assert (none.tokens == -1).all() and (none.all_logits == -INF).all() and (none.lse == -INF).all()


@pytest.mark.parametrize("drawn", [False, True])
def test_parts_of_a_head(head_ops, drawn):
    hidden, weight = inputs(6, 500, 60)
    hidden[1, 3] = float("nan")
    bias = torch.zeros(500)
    bias[::3] = -INF
    temperatures = torch.tensor([1.0, 1.0, 0.3, 3.0, 1e-4, 0.8])
    rng = stream(6) if drawn else None
    for weights, of_rows in ((weight, bias), (weight, torch.full((500,), -INF)), (weight[:0], bias[:0])):
        got, want = (
            sk.head_part(hidden, weights, 9, rng=rng, bias=of_rows, temperature=temperatures, backend=backend)
            for backend in ("cuda", "reference")
        )
        assert torch.equal(got.tokens, want.tokens)
        torch.testing.assert_close(got.keys, want.keys, **TOLERANCE)
        torch.testing.assert_close(got.logits, want.logits, **TOLERANCE)
        # A logit beside a whole power may fall to either side of it, and the anchor with it.
        whole_parts = want.sums[:, 0].isfinite() & got.sums[:, 0].isfinite()
        assert torch.equal(whole_parts, want.sums[:, 1] > 0)
        near = got.sums[whole_parts, 0] + got.sums[whole_parts, 1].log2()
        torch.testing.assert_close(
            near, want.sums[whole_parts, 0] + want.sums[whole_parts, 1].log2(), rtol=1e-5, atol=1e-4
        )
        assert (got.sums[~whole_parts, 1].isnan() == want.sums[~whole_parts, 1].isnan()).all()


def test_sums_of_parts_merge(head_ops):
    """Shards of any sizes add up to the sums of the whole, to the last bits of fp64."""
    hidden, weight = inputs(5, 1111, 60)
    whole_head = sk.head_part(hidden, weight, 4, temperature=0.7, backend="cuda")
    for cuts in ([0, 1, 600, 1111], [0, 555, 556, 557, 1111]):
        total = torch.zeros(5, 2, dtype=torch.float64)
        for start, end in pairwise(cuts):
            part = sk.head_part(hidden, weight[start:end], 4, temperature=0.7, backend="cuda").sums
            lower = part[:, 0] - whole_head.sums[:, 0]
            assert (lower <= 0).all()
            total += torch.exp2(lower)[:, None] * torch.stack([part[:, 1], part[:, 2] + lower * part[:, 1]], 1)
        torch.testing.assert_close(total, whole_head.sums[:, 1:], rtol=1e-14, atol=0)


@pytest.mark.parametrize("k", [1, 32, 33, 64])
def test_many_good_candidates(head_ops, k):
    """Ascending logits: each row is better than all before, so lists fill up again and again."""
    weight = torch.arange(2000.0)[:, None]
    hidden = torch.tensor([[1.0], [-1.0], [0.0]])
    got = sk.head_topk(hidden, weight, k, backend="cuda")
    assert got.tokens[0].tolist() == list(range(1999, 1999 - k, -1))
    assert got.tokens[1].tolist() == got.tokens[2].tolist() == list(range(k))


def test_few_vectors_take_cuda_and_many_triton(monkeypatch):
    monkeypatch.setattr(backends, "MISSING", dict.fromkeys(backends.NAMES))
    monkeypatch.setattr(backends, "FORCED", None)
    facts = {"dtype": torch.bfloat16, "dim": 4096}
    for op in ("head_topk", "head_sample", "head_part"):
        found = [backends.select(op, "cuda", None, together=n, **facts) for n in (1, 8, 9, 300)]
        assert found == ["cuda", "cuda", "triton", "triton"]
        assert backends.select(op, "cuda", "cuda", together=300, **facts) == "cuda"
        for dtype, most in ((torch.bfloat16, 16384), (torch.float32, 8192)):
            assert backends.why_not(op, "cuda", "cuda", dtype=dtype, dim=most) is None
            assert f"more than {most}" in backends.why_not(op, "cuda", "cuda", dtype=dtype, dim=most + 1)
    monkeypatch.setitem(backends.MISSING, "cuda", "was not built")
    assert backends.select("head_topk", "cuda", None, together=1, **facts) == "triton"


def test_noise_alone_decides(head_ops):
    """Equal logits: a token whose noise is large wins, however late it comes."""
    hidden, weight = torch.zeros(3, 4), torch.ones(2000, 4)
    got, want = (
        sk.head_sample(hidden, weight, 10, rng=stream(3), backend=backend) for backend in ("cuda", "reference")
    )
    assert torch.equal(got.tokens, want.tokens)


@pytest.mark.skipif(tool("nvcc") is None or tool("cuobjdump") is None, reason="no nvcc and cuobjdump on this machine")
def test_a_warp_has_4_kb_under_way(tmp_path):
    """Eight loads of 16 bytes in every lane before the first product, in the loop and before it."""
    output = tmp_path / "head.cubin"
    source = tmp_path / "head.cu"
    source.write_text(
        '#include "head_kernels.cuh"\n'
        "template __global__ void specdec::head::scan_kernel<specdec::head::Int8<specdec::head::Bf16>>("
        "const __grid_constant__ specdec::head::Launch);\n"
    )
    includes = [f"-I{CSRC / 'include'}", f"-I{CSRC / 'cuda'}"]
    command = [tool("nvcc"), "-std=c++17", "-O3", "--fmad=false", "-cubin", "-arch=sm_90", str(source), *includes]
    subprocess.run([*command, "-o", str(output)], check=True)
    sass = subprocess.run([tool("cuobjdump"), "-sass", str(output)], capture_output=True, text=True, check=True).stdout
    kinds = [
        "load" if "LDG.E.NA" in line and ".128" in line else "product"
        for line in sass.splitlines()
        if ("LDG.E.NA" in line and ".128" in line) or "HMMA" in line
    ]
    assert kinds.count("load") == 16 and kinds[:16] == ["load"] * 16
