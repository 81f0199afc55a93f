"""low_rank_head against the product of its stages in float64, and factors against the best that any could be."""

from __future__ import annotations

import pytest
import torch

import specdec_kernels as sk
from head_cases import BACKENDS, TOLERANCE, check_ranking, inputs, lse_and_entropy
from specdec_kernels.philox import gumbels
from specdec_loop import tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_stages_are_one_head(backend, dtype):
    hidden, up = inputs(3, 500, 24, dtype)
    generator = torch.Generator().manual_seed(1)
    down = (torch.randn(24, 100, generator=generator) / 10).to(dtype)
    hidden = torch.randn(3, 100, generator=generator).to(dtype)
    bias = torch.randn(500, generator=generator)
    rows = torch.randperm(500, generator=generator)[:300].to(torch.int32)
    # What lies between the stages is rounded to hidden's dtype, however it was added up.
    inner = hidden.double() @ down.double().T
    logits = (inner @ up.double().T + bias.double())[:, rows.long()]
    loose = {"rtol": 1e-5, "atol": 3e-5 + 24**0.5 * torch.finfo(dtype).eps}
    options = {"rows": rows, "bias": bias, "temperature": 0.7, "return_logits": True, "backend": backend}
    index = torch.arange(3)
    rng = sk.Philox(index + 7, index * 3)
    top = sk.low_rank_head(hidden, down, up, 6, **options)
    drawn = sk.low_rank_head(hidden, down, up, 6, rng=rng, **options)
    assert isinstance(top, sk.HeadTopK) and isinstance(drawn, sk.HeadSample)
    lse, entropy = lse_and_entropy(logits, 0.7)
    ids = rows.expand(3, -1)
    noise = gumbels(rng.seed[:, None], rng.offset[:, None], torch.zeros(3, 1), ids).double()
    for got, keys in ((top, top.all_logits.double()), (drawn, drawn.all_logits.double() / 0.7 + noise)):
        torch.testing.assert_close(got.all_logits.double(), logits, **loose)
        torch.testing.assert_close(got.lse.double(), lse, rtol=1e-5, atol=2 * loose["atol"])
        torch.testing.assert_close(got.entropy.double(), entropy, rtol=1e-3, atol=1e-3 + 10 * loose["atol"])
        check_ranking(got.tokens, keys, ids)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_second_stage_may_be_quantised(backend):
    hidden, up = inputs(2, 300, 32)
    down = torch.eye(32)
    quantised = sk.quantize_head(up, "int8")
    got = sk.low_rank_head(hidden, down, quantised, 4, backend=backend)
    want = sk.head_topk(hidden, quantised, 4, backend=backend)
    assert torch.equal(got.tokens, want.tokens)
    torch.testing.assert_close(got.logits, want.logits, **TOLERANCE)


def decaying(height: int, dim: int, seed: int = 0):
    """A weight whose singular values fall, and states that use its directions unequally."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(height, dim, generator=generator) * 0.9 ** torch.arange(dim)
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    states = torch.randn(2000, dim, generator=generator) * 0.8 ** torch.arange(dim).flip(0)
    return weight @ turn, states @ turn


@pytest.mark.parametrize("rank", [1, 7, 24])
def test_factors_are_the_best_of_their_rank(rank):
    weight, states = decaying(400, 24)
    down, up = sk.low_rank_factors(weight, rank)
    assert down.shape == (rank, 24) and up.shape == (400, rank)
    spectrum = torch.linalg.svdvals(weight.double())
    error = torch.linalg.norm(weight.double() - up.double() @ down.double())
    torch.testing.assert_close(error, spectrum[rank:].norm(), rtol=1e-4, atol=1e-4)
    down, up = sk.low_rank_factors(weight, rank, hidden=states)
    spectrum = torch.linalg.svdvals(weight.double() @ states.double().T)
    error = torch.linalg.norm((weight.double() - up.double() @ down.double()) @ states.double().T)
    # The ridge gives up a little of what the states used.
    assert float(error) <= 1.01 * float(spectrum[rank:].norm()) + 1e-3 * float(spectrum.norm())


def test_directions_that_the_states_never_took_are_kept_last():
    weight, states = decaying(400, 24)
    states[:, 12:] = 0
    down, up = sk.low_rank_factors(weight, 24, hidden=states)
    torch.testing.assert_close(up @ down, weight, rtol=1e-3, atol=1e-3)
    assert all(
        torch.equal(a, b) for a, b in zip(sk.low_rank_factors(weight, 5), sk.low_rank_factors(weight, 5), strict=True)
    )
    assert [part.dtype for part in sk.low_rank_factors(weight.bfloat16(), 3)] == [torch.bfloat16] * 2


def test_acceptance_of_the_shipped_drafter_by_rank():
    """1 - TV of the drafter's own law and that of its head at a lower rank, on held-out text; calibrated and not."""
    pair = tiny.load(torch.float32)
    prompts = tiny.heldout_prompts(8, 96, pair.tokenizer)
    with torch.no_grad():
        states = pair.drafter.base_model(prompts).last_hidden_state[:, 8:].flatten(0, 1)
    weight = pair.drafter.get_output_embeddings().weight.detach()
    calibration, held = states[: len(states) // 2], states[len(states) // 2 :]
    law = torch.softmax(held @ weight.T, 1)
    overlap = {}
    for name, hidden in (("plain", None), ("calibrated", calibration)):
        for rank in (16, 32, 48):
            factors = sk.low_rank_factors(weight, rank, hidden=hidden)
            step = sk.low_rank_head(held, *factors, return_logits=True)
            overlap[name, rank] = float(torch.minimum(law, torch.softmax(step.all_logits, 1)).sum(1).mean())
    print(overlap)
    for rank in (16, 32, 48):
        assert overlap["calibrated", rank] > overlap["plain", rank]
    assert overlap["calibrated", 16] < overlap["calibrated", 32] < overlap["calibrated", 48]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: sk.low_rank_head(torch.zeros(2, 5), torch.zeros(3, 4), torch.zeros(9, 3)),
            r"down: expected shape \[r=3, D=5\]",
        ),
        (
            lambda: sk.low_rank_head(torch.zeros(2, 5), torch.zeros(3, 5), torch.zeros(9, 4)),
            r"weight: expected shape \[V=9, D=3\]",
        ),
        (lambda: sk.low_rank_factors(torch.zeros(9, 4), 5), r"rank: expected in 1\.\.4, got 5"),
        (
            lambda: sk.low_rank_factors(torch.zeros(9, 4), 2, hidden=torch.zeros(3, 5)),
            r"hidden: expected shape \[n=3, D=4\]",
        ),
        (
            lambda: sk.low_rank_factors(torch.zeros(9, 4), 2, hidden=torch.full((3, 4), float("nan"))),
            "hidden: expected finite states",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
