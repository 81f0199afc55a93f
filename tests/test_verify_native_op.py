"""The op `verify_chain` as compiled code registers it: what it refuses, how it is traced, every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import specdec_kernels as sk
from chain_cases import random_case
from specdec_kernels import backends
from test_verify_native import assert_same_bits

MISSING = backends.MISSING["cpu"]
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def op_arguments(case, method="token", scalars=(1.0, 0.0, 1.0, 0.0), params=None, logprobs=False):
    rng, off = case.options["rng"], [1.0, 0.0, 1.0, 0.0]
    exact = (None, None, 0.0, None, 1.0)
    sampling = (params, list(scalars), None, None, off, None, *exact, rng.seed, rng.offset, None, None, logprobs)
    return (case.tokens, case.cu_nodes, case.target, case.draft, None, case.max_depth, method, *sampling)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "block"}, "method 'block' is not compiled"),
        ({"scalars": (1.0, 5.0, 1.0, 0.0)}, "top_k, top_p and min_p are not compiled"),
        ({"params": torch.tensor([[1.0, 0.0, 0.9, 0.0]] * 7)}, "top_k, top_p and min_p are not compiled"),
        ({"params": torch.ones(3, 4)}, "params: expected"),
        ({"scalars": (1.0,)}, "scalars: expected 4"),
    ],
)
def test_the_op_says_what_it_cannot_do(change, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.specdec_kernels.verify_chain(*op_arguments(random_case(19, 7, 16), **change))


# Without padding where there are logprobs: opcheck takes NaN for a difference.
@pytest.mark.parametrize(("longest", "logprobs"), [(4, False), (0, True)])
def test_opcheck(longest, logprobs):
    arguments = op_arguments(random_case(20, 3, 16, longest=longest), logprobs=logprobs)
    torch.library.opcheck(torch.ops.specdec_kernels.verify_chain.default, arguments)


def test_compiles_as_one_graph():
    case = random_case(21, 4, 111, trimmed=30)
    run = torch.compile(lambda target, draft: sk.verify_chain(
        case.tokens, case.cu_nodes, target, draft, max_depth=case.max_depth, logprobs=True, **case.options
    ), fullgraph=True)  # fmt: skip
    assert_same_bits(run(case.target, case.draft), case.run("cpu"))


@pytest.mark.skipif("SPECDEC_CPU_ISA" in os.environ, reason="SPECDEC_CPU_ISA forces one tier")
@pytest.mark.parametrize("isa", [] if MISSING else sys.modules["specdec_kernels._C"].tiers())
def test_every_tier(isa):
    """Some cases of test_verify_native.py in a process of that tier; `make test-full` runs all in every tier."""
    tests = Path(__file__).with_name("test_verify_native.py")
    env = {**os.environ, "SPECDEC_CPU_ISA": isa}
    chosen = "(token_matches and 1000-torch.bfloat16) or (greedy_matches and float32) or sizes or broken"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests), "-k", chosen]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
