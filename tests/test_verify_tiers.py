"""The tests of verification's backends in processes of their own: other instruction sets, Triton's interpreter."""

from __future__ import annotations

import os
import sys

import pytest

from specdec_kernels import backends
from verify_backends import INTERPRETED, ROOT, in_another_process

pytestmark = pytest.mark.skipif(
    INTERPRETED or "SPECDEC_CPU_ISA" in os.environ, reason="this process is for one backend already"
)
EQUAL, ISOLATION = (str(ROOT / "tests" / f"test_verify_{name}.py") for name in ("equal", "isolation"))
TIERS = [] if backends.MISSING["cpu"] else sys.modules["specdec_kernels._C"].tiers()


@pytest.mark.parametrize("isa", TIERS[:-1])
def test_every_other_tier(isa):
    """Some methods with every option; `make test-full` runs everything in every tier."""
    chosen = "cpu and with_every_option and (multi_round or k_seq or traversal-)"
    assert in_another_process(EQUAL, "-k", chosen, SPECDEC_CPU_ISA=isa) > 60


@pytest.mark.full
@pytest.mark.parametrize("isa", TIERS[:-1])
def test_thousands_of_random_cases_in_every_other_tier(isa):
    assert in_another_process(EQUAL, "-k", "cpu and thousands", SPECDEC_CPU_ISA=isa) == 1


@pytest.mark.parametrize("which, least", [("not full", 50), pytest.param("full", 1, marks=pytest.mark.full)])
def test_triton_under_the_interpreter(which, least):
    pytest.importorskip("triton", reason="triton is not installed")
    assert in_another_process(EQUAL, ISOLATION, "-m", which, "-k", "triton", TRITON_INTERPRET="1") >= least
