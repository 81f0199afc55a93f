"""What the head refuses, in which words, and how it fits torch: schemas, fakes, compilation, forced backends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import specdec_kernels as sk
from head_cases import BACKENDS, TOLERANCE, check_ranking, inputs, logits64
from specdec_kernels import head

HIDDEN, WEIGHT = inputs(3, 20, 8)
INTS = torch.arange(20, dtype=torch.int32)
RNG = sk.Philox(torch.arange(3), torch.arange(3))

BAD = {
    "hidden is no tensor": ({"hidden": [[1.0]]}, TypeError, "hidden: expected a tensor, got list"),
    "hidden dtype": ({"hidden": HIDDEN.int()}, TypeError, "hidden: expected dtype float32 or .*, got int32"),
    "hidden shape": ({"hidden": HIDDEN[0]}, ValueError, r"hidden: expected shape \[B, D\], got \[8\]"),
    "weight dtype": ({"weight": WEIGHT.half()}, TypeError, "weight: expected dtype float32, got float16"),
    "weight width": ({"weight": WEIGHT[:, :7]}, ValueError, r"weight: expected shape \[V=20, D=8\], got \[20, 7\]"),
    "weight device": ({"weight": WEIGHT.to("meta")}, ValueError, "weight: expected device cpu, got meta"),
    "k too small": ({"k": 0}, ValueError, "k: expected in 1..64, got 0"),
    "k too large": ({"k": 65}, ValueError, "k: expected in 1..64, got 65"),
    "k no int": ({"k": 2.0}, TypeError, "k: expected an int, got float"),
    "rows dtype": ({"rows": INTS.long()}, TypeError, "rows: expected dtype int32, got int64"),
    "rows batch": ({"rows": INTS.expand(2, -1)}, ValueError, r"rows: expected shape \[B=3, R\], got \[2, 20\]"),
    "rows shape": ({"rows": INTS.expand(1, 3, -1)}, ValueError, r"rows: expected shape \[R\], got \[1, 3, 20\]"),
    "rows is no tensor": ({"rows": [1, 2]}, TypeError, "rows: expected a tensor, got list"),
    "rows and names": ({"rows": INTS, "token_ids": INTS}, ValueError, "token_ids: expected None beside rows .*both"),
    "names length": ({"token_ids": INTS[:5]}, ValueError, r"token_ids: expected shape \[V=20\], got \[5\]"),
    "names dtype": ({"token_ids": INTS.float()}, TypeError, "token_ids: expected dtype int32, got float32"),
    "bias dtype": ({"bias": torch.zeros(20).half()}, TypeError, "bias: expected dtype float32, got float16"),
    "bias length": ({"bias": torch.zeros(19)}, ValueError, r"bias: expected shape \[V=20\], got \[19\]"),
    "scale dtype": ({"scale": torch.zeros(20).double()}, TypeError, "scale: expected dtype float32, got float64"),
    "scale length": ({"scale": torch.zeros(1)}, ValueError, r"scale: expected shape \[V=20\], got \[1\]"),
    "temperature": ({"temperature": "hot"}, TypeError, r"temperature: expected a number or a \[B\] tensor, got str"),
    "temperature < 0": ({"temperature": -1.0}, ValueError, "temperature: expected a finite number >=? 0, got -1.0"),
    "temperature inf": ({"temperature": float("inf")}, ValueError, "temperature: expected a finite number .*, got inf"),
    "temperatures": ({"temperature": torch.ones(2)}, ValueError, r"temperature: expected shape \[B=3\], got \[2\]"),
    "temperatures dtype": (
        {"temperature": torch.ones(3).double()}, TypeError, "temperature: expected dtype float32, got float64",
    ),
    "backend": ({"backend": "tpu"}, ValueError, "backend: expected one of .*, got 'tpu'"),
    "backend that is not there": (
        {"backend": "triton"}, sk.BackendError,
        "backend='triton' cannot serve head_.*: (triton is not installed|triton needs a GPU|serves cuda tensors)",
    ),
}  # fmt: skip
BAD_SAMPLE = {
    "rng": ({"rng": (1, 2)}, TypeError, "rng: expected a Philox, got tuple"),
    "seed dtype": ({"rng": RNG._replace(seed=RNG.seed.int())}, TypeError, "rng.seed: expected dtype int64, got int32"),
    "seed length": (
        {"rng": RNG._replace(seed=RNG.seed[:1])},
        ValueError,
        r"rng.seed: expected shape \[B=3\], got \[1\]",
    ),
    "offset": (
        {"rng": RNG._replace(offset=RNG.offset[:2])},
        ValueError,
        r"rng.offset: expected shape \[B=3\], got \[2\]",
    ),
    "row": ({"rng": RNG._replace(row=RNG.seed)}, TypeError, "rng.row: expected dtype int32, got int64"),
}
DEBUG_ONLY = {
    "rows": ({"rows": INTS + 1}, r"rows: expected row ids in -1..19, got 20 at index 19"),
    "negative rows": ({"rows": INTS - 2}, r"rows: expected row ids in -1..19, got -2 at index 0"),
    "row groups": (
        {"rows": INTS.expand(2, -1), "row_groups": INTS[:3]},
        r"row_groups: expected lines of rows, 0..1, got 2 at index 2",
    ),
    "names": ({"token_ids": INTS - 4}, r"token_ids: expected target ids >= 0, got -4 at index 0"),
    "temperatures": (
        {"temperature": torch.tensor([1.0, -2.0, 1.0])},
        r"temperature: expected finite numbers >=? 0, got -2.0 at index 1",
    ),
}


def call(op, **changed):
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "k": 2} | ({"rng": RNG} if op is sk.head_sample else {}) | changed
    return op(**arguments)


@pytest.mark.parametrize("op", [sk.head_topk, sk.head_sample])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(op, case):
    changed, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call(op, **changed)


@pytest.mark.parametrize("case", BAD_SAMPLE)
def test_bad_streams_are_named(case):
    changed, error, message = BAD_SAMPLE[case]
    with pytest.raises(error, match=message):
        call(sk.head_sample, **changed)


def test_only_sampling_takes_temperature_zero():
    with pytest.raises(ValueError, match="temperature: expected a finite number > 0, got 0"):
        call(sk.head_topk, temperature=0.0)
    call(sk.head_sample, temperature=0.0)


@pytest.mark.parametrize("op", [sk.head_topk, sk.head_sample])
@pytest.mark.parametrize("case", DEBUG_ONLY)
def test_values_are_checked_when_debugging(op, case, monkeypatch):
    changed, message = DEBUG_ONLY[case]
    call(op, **changed)
    monkeypatch.setattr(head, "DEBUG", True)
    with pytest.raises(ValueError, match=message):
        call(op, **changed)


def test_float64_is_for_the_reference():
    double = {"hidden": HIDDEN.double(), "weight": WEIGHT.double()}
    assert call(sk.head_topk, **double).logits.dtype == torch.float64
    if sk.backends.MISSING["cpu"] is None:
        with pytest.raises(sk.BackendError, match=r"backend='cpu' cannot serve head_topk: hidden is torch\.float64"):
            call(sk.head_topk, **double, backend="cpu")


def every_form(dtype=torch.float32):
    """Argument lists of both ops: each optional tensor given once, none given once."""
    hidden, weight = inputs(3, 20, 8, dtype)
    for rest in (
        (None, None, None, None, None, 1.0, None, False),
        (INTS[3:9], None, None, torch.randn(20), None, 0.5, None, True),
        (INTS.expand(3, -1), None, None, torch.randn(20).to(dtype), torch.rand(20), 1.0, torch.rand(3) + 0.1, True),
        (None, None, INTS + 7, None, None, 1.0, torch.rand(3) + 0.1, False),
    ):
        yield torch.ops.specdec_kernels.head_topk, (hidden, weight, 4, *rest)
        for row in (None, INTS[:3]):
            yield torch.ops.specdec_kernels.head_sample, (hidden, weight, 4, RNG.seed, RNG.offset, row, *rest)


@pytest.mark.parametrize("overload", ["default", "reference"])
def test_opcheck(overload):
    for op, arguments in every_form():
        torch.library.opcheck(getattr(op, overload), arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_break(backend):
    def step(hidden, weight, rows, seed, offset):
        top = sk.head_topk(hidden, weight, 4, rows=rows, temperature=0.5, return_logits=True, backend=backend)
        drawn = sk.head_sample(hidden * 2, weight, 4, rng=sk.Philox(seed, offset), backend=backend)
        return top.lse + drawn.lse, top.tokens, drawn.tokens, top.all_logits

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for batch in (3, 5, 6):
        hidden, weight = inputs(batch, 50, 8)
        arguments = (hidden, weight, INTS, torch.arange(batch), torch.arange(batch))
        for a, b in zip(compiled(*arguments), step(*arguments), strict=True):
            torch.testing.assert_close(a, b)


def test_fakes_have_the_shapes_of_the_results():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for dtype in (torch.float32, torch.bfloat16):
        for op, arguments in every_form(dtype):
            with FakeTensorMode(allow_non_fake_inputs=False) as mode:
                fakes = op(*[mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments])
            for fake, real in zip(fakes, op(*arguments), strict=True):
                assert fake.shape == real.shape and fake.dtype == real.dtype and fake.stride() == real.stride()


@pytest.mark.skipif(sk.backends.MISSING["cpu"] is not None, reason=str(sk.backends.MISSING["cpu"]))
def test_the_op_itself_refuses_what_would_leave_its_bounds():
    op, hidden, weight = torch.ops.specdec_kernels.head_topk, HIDDEN, WEIGHT
    rest = (None, None, 1.0, None, False)  # behind rows, row_groups, token_ids
    for arguments, message in [
        ((hidden, weight[:, :5], 2, None, None, None, *rest), "weight: expected"),
        ((hidden, weight.half(), 2, None, None, None, *rest), "weight: expected hidden's dtype"),
        ((hidden, weight, 65, None, None, None, *rest), "k: expected 1..64, got 65"),
        ((hidden, weight, 2, INTS.long(), None, None, *rest), "rows: expected int32"),
        ((hidden, weight, 2, INTS.expand(2, -1), None, None, *rest), "rows: expected int32"),
        ((hidden, weight, 2, None, None, INTS[:3], *rest), "token_ids: expected"),
        ((hidden, weight, 2, None, None, None, torch.zeros(3), *rest[1:]), "bias: expected"),
        ((hidden, weight, 2, None, None, None, None, None, 1.0, torch.ones(2), False), "temperatures: expected"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_shape(backend, data):
    batch, height, dim = (data.draw(st.integers(low, high)) for low, high in ((0, 9), (1, 600), (1, 70)))
    k, dtype = data.draw(st.integers(1, 64)), data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    hidden, weight = inputs(batch, height, dim, dtype, seed=data.draw(st.integers(0, 99)))
    rows = None
    if data.draw(st.booleans()):
        count = data.draw(st.integers(0, height))
        rows = torch.randperm(height, generator=torch.Generator().manual_seed(count))[:count].to(torch.int32)
    logits = logits64(hidden, weight, rows)
    got = sk.head_topk(hidden, weight, k, rows=rows, backend=backend)
    ids = torch.arange(height) if rows is None else rows
    check_ranking(got.tokens, logits, ids.expand(batch, -1))
    torch.testing.assert_close(got.lse.double(), torch.logsumexp(logits, 1), **TOLERANCE)
