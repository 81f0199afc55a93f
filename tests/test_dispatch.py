"""The compiled CPU module: which instruction sets it holds, how one is chosen, and what it links against."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from specdec_kernels import backends

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif("was not built" in str(backends.MISSING["cpu"]), reason="no compiled module to look at")
TIERS = ["scalar", "avx2", "avx512", "avx512bf16"]
NATIVE = str(ROOT / "tests" / "test_head.py")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=variables, cwd=ROOT)


def binary() -> Path:
    return Path(importlib.util.find_spec("specdec_kernels._C").origin)


def symbols(path: Path, *options: str) -> list[list[str]]:
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    listed = subprocess.run(["nm", *options, str(path)], capture_output=True, text=True, check=True).stdout
    return [line.split() for line in listed.splitlines() if line]


@functools.cache
def runnable() -> list[str]:
    done = python("-c", "from specdec_kernels import _C; print(*_C.tiers())", SPECDEC_CPU_ISA="scalar")
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_best_tier_is_chosen():
    tiers = runnable()
    assert tiers[0] == "scalar" and tiers == [tier for tier in TIERS if tier in tiers]
    done = python("-c", "from specdec_kernels import _C; print(_C.isa())", SPECDEC_CPU_ISA="")
    assert done.stdout.strip() == tiers[-1], done.stderr


def test_a_tier_that_does_not_exist_is_said_and_not_replaced():
    code = """
import torch, specdec_kernels as sk
print(sk.backends.MISSING["cpu"])
weight = torch.eye(4)
print(sk.head_topk(weight, weight).tokens.tolist())
for call in (lambda: sk.head_topk(weight, weight, backend="cpu"),
             lambda: torch.ops.specdec_kernels.head_topk(weight, weight, 1, *[None] * 5, 1.0, None, False)):
    try:
        call()
    except RuntimeError as error:
        print(type(error).__name__, error)
"""
    done = python("-c", code, SPECDEC_CPU_ISA="mmx")
    reason = f"SPECDEC_CPU_ISA: expected one of {', '.join(runnable())}, got 'mmx'"
    lines = done.stdout.splitlines()
    assert len(lines) == 4, done.stdout + done.stderr
    assert reason in lines[0]
    assert lines[1] == "[[0], [1], [2], [3]]"
    assert lines[2].startswith("BackendError backend='cpu' cannot serve head_topk: ") and reason in lines[2]
    assert lines[3].startswith("RuntimeError ") and reason in lines[3]


@pytest.mark.parametrize("tier", TIERS)
def test_every_tier_can_be_forced_and_serves_the_head(tier):
    if tier not in runnable():
        pytest.skip(f"this CPU or compiler has no {tier}")
    run = """
import sys, pytest
from specdec_kernels import _C
assert _C.isa() == sys.argv[1], _C.isa()
sys.exit(pytest.main(sys.argv[2:]))
"""
    options = ["-q", "-m", "native and not full", "-k", "cpu", "-p", "no:cacheprovider"]
    done = python("-c", run, tier, *options, NATIVE, SPECDEC_CPU_ISA=tier)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout) and "skipped" not in done.stdout


def test_only_the_stable_interface_of_torch_is_linked():
    """Symbols that come from elsewhere: C functions of the stable ABI, Python's limited API, libc and libstdc++."""
    undefined = [row[-1].split("@")[0] for row in symbols(binary(), "-D", "--undefined-only")]
    foreign = [name for name in undefined if re.search(r"c10|2at|5torch|caffe|pybind", name)]
    assert not foreign
    of_torch = [name for name in undefined if name.startswith(("torch_", "aoti_torch_"))]
    assert "torch_parallel_for" in of_torch
    assert ".abi3." in binary().name
    needed = subprocess.run(["readelf", "-d", str(binary())], capture_output=True, text=True, check=True).stdout
    assert "libtorch_python" not in needed and "libc10" not in needed


def test_no_tier_shares_code_with_another():
    """A weak symbol in a kernel object would be merged across tiers, and the copy that is kept may be AVX-512."""
    objects = sorted(ROOT.glob("build/native/*/cpu-*/*.o"))
    if not objects:
        pytest.skip("the objects of the build are not here")
    for path in objects:
        tier = path.parent.name.removeprefix("cpu-")
        for row in symbols(path, "--defined-only"):
            name = row[-1]
            mangled = f"{len(tier)}{tier}"
            assert row[-2] not in "WVu" or mangled in name, f"{path.name} of {tier}: {name} is shared"
            assert row[-2] not in "TBDR" or mangled in name, f"{path.name} of {tier}: {name} is outside its namespace"
