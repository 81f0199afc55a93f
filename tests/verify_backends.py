"""The backends of verification, as tests call them.

`cpu` in the instruction set that was chosen; `cuda`; `triton`, on a GPU or under its interpreter, which is chosen when
triton is imported, so those tests run in a process of their own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import specdec_kernels as sk
from specdec_kernels import backends
from tree_cases import Case

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROOT = Path(__file__).resolve().parents[1]
DEVICE = {"reference": "cpu", "cpu": "cpu", "triton": "cpu" if INTERPRETED else "cuda", "cuda": "cuda"}

# Where the tests of a Triton kernel run.
TRITON_DEVICES = [
    pytest.param(
        "cpu",
        id="interpreter",
        marks=pytest.mark.skipif(not INTERPRETED, reason="runs inside test_under_the_interpreter"),
    ),
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no CUDA device on this machine"),
        ],
    ),
]


def every_backend(*names: str, **marks):
    """Parametrises `backend`; what this machine or this process lacks is skipped with the reason."""
    params = []
    for name in names:
        missing = backends.MISSING[name]
        if INTERPRETED and name != "triton":
            missing = "this process is for the interpreter"
        skip = pytest.mark.skipif(missing is not None, reason=f"{name}: {missing}")
        params.append(pytest.param(name, marks=[skip, *([marks[name]] if name in marks else [])]))
    return pytest.mark.parametrize("backend", params)


def run(case: Case, backend: str, **changes) -> sk.Verified:
    return case.run(backend, DEVICE[backend], **changes)


def of(answer: sk.Verified, requests) -> sk.Verified:
    return sk.Verified(*(x[requests] for x in answer))


def assert_same_bits(got: sk.Verified, expected: sk.Verified) -> None:
    for name, a, b in zip(got._fields, got, expected, strict=True):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32)), f"{name}:\n{a}\nexpected\n{b}"


def in_another_process(*arguments: str, **environment: str) -> int:
    """Runs pytest in an environment of its own; returns how many tests passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])
