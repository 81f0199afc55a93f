"""The Triton kernel of verify_chain against the reference: on a GPU, and everywhere under Triton's interpreter.

The interpreter is chosen when triton is imported, so `test_under_the_interpreter` runs this file again in a process of
its own; in any other process the interpreted tests are skipped.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import specdec_kernels as sk
from specdec_kernels import Philox, SamplingParams, backends
from triton_cases import Case, packed_bits
from verify_backends import INTERPRETED, TRITON_DEVICES, in_another_process

pytest.importorskip("triton", reason="triton is not installed")

HALVES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(params=TRITON_DEVICES)
def device(request) -> str:
    return request.param


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreted run")
@pytest.mark.parametrize("which, least", [("not full", 50), pytest.param("full", 5, marks=pytest.mark.full)])
def test_under_the_interpreter(which, least):
    assert in_another_process(str(Path(__file__)), "-m", which, TRITON_INTERPRET="1") >= least


def agree(device, V, dtype, q, seeds):
    counts = []
    for seed in seeds:
        counts += Case(V, dtype=HALVES[dtype], q=q, seed=seed).check(device).num_tokens.tolist()
    assert len(set(counts)) > 1, "drafts were never, or always, accepted"


@pytest.mark.parametrize("q", ["none", "dense", "compact"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("V", [16, 111, 1000])
def test_agrees_with_reference(device, V, dtype, q):
    agree(device, V, dtype, q, range(1))


@pytest.mark.full
@pytest.mark.parametrize("q", ["none", "dense", "compact"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("V", [16, 111, 1000, 5000])
def test_agrees_with_reference_often(device, V, dtype, q):
    agree(device, V, dtype, q, range(1, 4))


@pytest.mark.full
@pytest.mark.parametrize("q", ["none", "dense", "compact"])
@pytest.mark.parametrize("V", [32000, 128256])
def test_large_vocabularies(device, V, q):
    Case(V, q=q, lengths=(3, 5), dtype=torch.bfloat16).check(device)


@pytest.mark.parametrize("q", ["none", "dense", "compact"])
def test_many_blocks(device, q, monkeypatch):
    from specdec_kernels.triton import verify

    monkeypatch.setattr(verify, "MAX_BLOCK", 32)
    case = Case(150, q=q, seed=1, lengths=(2, 3, 5))
    case.check(device)
    case.check(device, params=SamplingParams(allowed=packed_bits(case.keep)))


@pytest.mark.parametrize("q", ["none", "dense", "compact"])
def test_masks(device, q):
    """The target's mask and the draft's are independent; the drafts were drawn without either."""
    case = Case(111, q=q, seed=4)
    other = Case(111, q=q, seed=5)
    params = SamplingParams(allowed=packed_bits(case.keep))
    got = case.check(device, params=params)
    draft_params = SamplingParams(allowed=packed_bits(other.keep))
    got = case.check(device, params=params, draft_params=draft_params)
    request = torch.arange(len(case.lengths)).repeat_interleave(got.num_tokens.long())
    column = torch.cat([torch.arange(n) for n in got.num_tokens.tolist()])
    assert case.keep[case.cu[:-1].long()[request] + column, got.tokens[request, column].long()].all()
    wide = torch.full((sum(case.lengths), 9), -1, dtype=torch.int32)
    wide[:, 1::2] = params.allowed  # words that are not next to each other
    case.check(device, params=SamplingParams(allowed=wide[:, 1::2]))


@pytest.mark.parametrize("q", ["none", "dense", "compact"])
@pytest.mark.parametrize("method", ["token", "greedy"])
def test_temperatures(device, q, method):
    case = Case(111, q=q, seed=6)
    mixed = torch.tensor([0.0, 1.0, 0.5, 0.0, 1.7, 0.01, 0.0])
    for temperature in (0.0, 0.7, mixed):
        case.check(device, method=method, params=SamplingParams(temperature=temperature))
    params = SamplingParams(temperature=mixed, allowed=packed_bits(case.keep))
    case.check(device, method=method, params=params, draft_params=SamplingParams(temperature=mixed.flip(0)))


@pytest.mark.parametrize("block", [32, 4096])
@pytest.mark.parametrize("q", ["none", "compact"])
def test_ties_take_the_lowest_id(device, q, block, monkeypatch):
    from specdec_kernels.triton import verify

    monkeypatch.setattr(verify, "MAX_BLOCK", block)
    case = Case(111, q=q, seed=7)
    case.target = case.target.round().clamp(max=2)
    if case.draft is not None:
        case.draft = case.draft.round().clamp(max=2)
    case.check(device, params=SamplingParams(temperature=0.0))
    got = case.check(device, method="greedy")
    rows = case.cu[:-1].long()
    assert torch.equal(got.tokens[:, 0].long(), case.target[rows].argmax(1))


@pytest.mark.parametrize("q", ["none", "dense", "compact"])
def test_philox(device, q):
    """Seeds of 64 bits; offsets wrap at 32."""
    case = Case(111, q=q, seed=8)
    seed = torch.tensor([0, 1, -1, 2**40 + 3, -(2**63), 7, 2**63 - 1])
    offset = torch.tensor([0, 2**32 - 1, 2**32 + 5, 17, -3, 2**31, 9])
    rng = Philox(seed, offset)
    case.check(device, rng=rng, accept_uniforms=None, final_uniforms=None)
    case.check(device, rng=rng, accept_uniforms=None)
    whole = case.run("triton", device, rng=rng, accept_uniforms=None, final_uniforms=None)
    for b in (1, 4, 6):  # a request alone: same tokens whatever stands around it
        rows = slice(int(case.cu[b]), int(case.cu[b + 1]))
        alone = Case(111, q=q, seed=8, lengths=(5,))
        alone.tokens, alone.target = case.tokens[rows], case.target[rows]
        alone.draft = None if q == "none" else case.draft[rows]
        alone.vocab, alone.cu = case.vocab, torch.tensor([0, rows.stop - rows.start], dtype=torch.int32)
        one = Philox(seed[b : b + 1], offset[b : b + 1])
        found = alone.run("triton", device, rng=one, accept_uniforms=None, final_uniforms=None)
        assert torch.equal(found.tokens[0], whole.tokens[b])


def test_no_draft_ends_a_chain(device):
    """-1, and ids that do not exist, are passed over; what follows them is not looked at."""
    for token in (-1, 111, 2**31 - 1):
        case = Case(111, lengths=(5, 5, 5), seed=9)
        case.target[:] = case.draft  # p = q: all accepted
        for b, at in enumerate((1, 3, 4)):
            case.tokens[5 * b + at] = token
        got = case.check(device)
        assert got.num_tokens.tolist() == [1, 3, 4]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "nothing"])
@pytest.mark.parametrize("which", ["target", "draft"])
def test_unsound_rows(device, which, bad):
    """A row that is read spoils its own request only; a row that is not read spoils nothing."""
    case = Case(111, lengths=(2, 4, 2), q="compact", seed=10)
    case.options["accept_uniforms"][:] = 0.0
    case.options["accept_uniforms"][5] = 0.99999  # node 3 of request 1: its own row is never read
    clean = case.run("triton", device)
    assert clean.num_tokens[1] == 3
    pristine = getattr(case, which).clone()
    for node in range(4):
        row = 2 + node
        logits = pristine.clone()
        setattr(case, which, logits)
        logits[row, 5] = float("-inf") if bad == "nothing" else bad
        if bad == "nothing":
            logits[row] = float("-inf")
        got = case.check(device)
        for b in (0, 2):
            assert torch.equal(got.tokens[b], clean.tokens[b])
            torch.testing.assert_close(got.logprobs[b], clean.logprobs[b], rtol=0, atol=0, equal_nan=True)
        assert got.num_tokens[1] == (3 if node == 3 else 0)


def test_masked_rows_are_sound_if_what_is_allowed_is(device):
    case = Case(111, lengths=(3, 3), seed=11)
    case.target[~case.keep] = float("nan")
    assert (case.check(device, params=SamplingParams(allowed=packed_bits(case.keep))).num_tokens > 0).all()
    nothing = case.keep.clone()
    nothing[0] = False
    got = case.check(device, params=SamplingParams(allowed=packed_bits(nothing)))
    assert got.num_tokens.tolist()[0] == 0 and got.num_tokens.tolist()[1] > 0


def test_greedy_does_not_read_the_draft(device):
    case = Case(111, seed=12)
    case.draft[:] = float("nan")
    assert (case.check(device, method="greedy", accept_uniforms=None, final_uniforms=None).num_tokens > 0).all()


def test_minus_infinity(device):
    case = Case(111, q="compact", seed=13)
    case.target[:, ::3] = float("-inf")
    case.draft[:, ::4] = float("-inf")
    case.draft[:, 1] = 3e38
    case.target[::2, 1] = -3e38
    case.check(device)


def test_residual_without_mass_falls_back_to_the_target(device):
    """Equal p and q leave nothing after a rejection, which only a coin of 1, outside its range, can bring about."""
    case = Case(111, seed=14)
    case.target[:] = case.draft
    case.options["accept_uniforms"][:] = 1.0
    assert (case.check(device).num_tokens == 1).all()


def test_strides(device):
    """Views of wider buffers whose other elements are NaN, and logits that lie column by column."""
    for q in ("dense", "compact"):
        case = Case(111, q=q, seed=15, dtype=torch.bfloat16, lengths=(4, 2, 3))
        for name in ("target", "draft"):
            logits = getattr(case, name)
            wide = torch.full((2 * len(logits), logits.shape[1] + 7), float("nan"), dtype=logits.dtype)
            view = wide[::2, 3 : 3 + logits.shape[1]]
            view.copy_(logits)
            setattr(case, name, view)
        case.check(device)
        case.target, case.draft = case.target.t().contiguous().t(), case.draft.t().contiguous().t()
        case.check(device)


def test_distant_rows(device):
    """Offsets of rows pass 2^31 elements; the buffer is never touched between them."""
    case = Case(64, lengths=(3, 3), dtype=torch.float16, q="dense", seed=16)
    stride = 2**31 // 5 + 64
    buffer = torch.empty(5 * stride + 64, dtype=torch.float16, device=device)
    far = buffer.as_strided((6, 64), (stride, 1))
    far.copy_(case.target)
    wanted = case.run("reference", "cpu")
    case.target = far
    assert torch.equal(case.run("triton", device).tokens, wanted.tokens)


def test_sizes_at_the_edge(device):
    Case(1, q="none", lengths=(2, 1)).check(device)
    Case(3, q="compact", lengths=(2, 1)).check(device)
    Case(16, lengths=(1, 1)).check(device)
    Case(16, lengths=(9, 4)).check(device, max_depth=12)
    Case(16, lengths=(9, 4)).check(device, max_depth=2)
    empty = Case(16, lengths=())
    got = empty.check(device)
    assert got.tokens.shape == (0, 1) and got.logprobs.shape == (0, 1)


def test_logprobs_only_on_request(device):
    case = Case(16)
    assert sk.verify_chain(
        *(t.to(device) for t in (case.tokens, case.cu, case.target, case.draft)),
        max_depth=case.max_depth,
        backend="triton",
        **{name: value.to(device) for name, value in case.options.items()},
    ).logprobs is None  # fmt: skip


def test_what_it_cannot_serve(device):
    case = Case(16, dtype=torch.float64)
    with pytest.raises(sk.BackendError, match=r"^backend='triton' cannot serve verify_chain: logits are torch.float64"):
        case.run("triton", device)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_cuda_graph():
    """Captured once, replayed with other logits: nothing is read by the host, nothing depends on data."""
    first, second = Case(1000, q="compact", seed=20), Case(1000, q="compact", seed=21)
    second.vocab = first.vocab
    names = ("tokens", "cu", "target", "draft", "vocab")
    held = {name: getattr(first, name).cuda() for name in names}
    uniforms = {name: value.cuda() for name, value in first.options.items()}

    def call():
        return sk.verify_chain(
            held["tokens"], held["cu"], held["target"], held["draft"], max_depth=first.max_depth,
            draft_vocab=held["vocab"], backend="triton", **uniforms,
        )  # fmt: skip

    call()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for case in (second, first):
        for name in names:
            held[name].copy_(getattr(case, name))
        for name, value in case.options.items():
            uniforms[name].copy_(value)
        graph.replay()
        assert torch.equal(out.tokens.cpu(), case.run("reference", "cpu").tokens)


def test_availability_is_reported():
    reason = backends.MISSING["triton"]
    assert (reason is None) == (INTERPRETED or torch.cuda.is_available())
