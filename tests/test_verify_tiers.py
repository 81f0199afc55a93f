"""The tests of verification's backends in processes of their own: other instruction sets, Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest

from specdec_kernels import backends
from verify_backends import INTERPRETED, ROOT, in_another_process

pytestmark = pytest.mark.skipif(
    INTERPRETED or "SPECDEC_CPU_ISA" in os.environ, reason="this process is for one backend already"
)
NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
EQUAL, ISOLATION = (str(ROOT / "tests" / f"test_verify_{name}.py") for name in ("equal", "isolation"))
TIERS = [] if backends.MISSING["cpu"] else sys.modules["specdec_kernels._C"].tiers()


@pytest.mark.parametrize("isa", TIERS[:-1])
def test_random_cases_in_every_other_tier(isa):
    assert in_another_process(EQUAL, "-k", "cpu and test_random_cases", SPECDEC_CPU_ISA=isa) == 1


@pytest.mark.full
@pytest.mark.parametrize("isa", TIERS[:-1])
def test_thousands_of_random_cases_in_every_other_tier(isa):
    assert in_another_process(EQUAL, "-k", "cpu and thousands", SPECDEC_CPU_ISA=isa) == 1


@NEEDS_TRITON
def test_random_cases_under_the_interpreter():
    assert in_another_process(EQUAL, "-k", "triton and test_random_cases", TRITON_INTERPRET="1") == 1


@pytest.mark.full
@NEEDS_TRITON
def test_thousands_of_random_cases_under_the_interpreter():
    assert in_another_process(EQUAL, "-k", "triton and thousands", TRITON_INTERPRET="1") == 1


@pytest.mark.full
@NEEDS_TRITON
def test_everything_under_the_interpreter():
    assert in_another_process(EQUAL, ISOLATION, "-m", "not full", "-k", "triton", TRITON_INTERPRET="1") > 400
