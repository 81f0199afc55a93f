"""The compiled `verify_chain` against its definition: same tokens, whatever surrounds a request."""

from __future__ import annotations

import pytest
import torch

import specdec_kernels as sk
from chain_cases import check_walks, random_case
from specdec_kernels import backends, philox

MISSING = backends.MISSING["cpu"]
pytestmark = [pytest.mark.native, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MIXED = torch.tensor([1.0, 0.0, 0.5, 2.0, 0.0, 1.3, 0.05])
VARIANTS = {
    "plain": {},
    "ties": {"ties": True},
    "zeros": {"zeros": True},
    "point_mass": {"point_mass": True},
    "point_mass_masked": {"point_mass": True, "masked": True},
    "masked": {"masked": True},
    "mixed_temperatures": {"temperature": MIXED},
    "mixed_temperatures_trimmed": {"temperature": MIXED, "trimmed": 9, "ties": True},
    "greedy_temperature": {"temperature": 0.0, "ties": True},
    "tiny_temperature": {"temperature": 1e-30, "ties": True},
    "trimmed": {"trimmed": 12},
    "trimmed_masked": {"trimmed": 12, "masked": True},
    "trimmed_to_one": {"trimmed": 1},
    "gaps": {"gaps": True},
    "explicit": {"explicit": True},
    "strided": {"strided": True, "gaps": True},
    "all": {"trimmed": 10, "masked": True, "gaps": True, "explicit": True, "strided": True},
}


def assert_same_bits(got: sk.Verified, expected: sk.Verified) -> None:
    for name, a, b in zip(got._fields, got, expected, strict=True):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32)), name


def assert_matches_reference(case, *, exactly: float = 0.97) -> None:
    """Every walk is right within the band, and almost all are the reference's token for token."""
    got, expected = case.run("cpu"), case.run("reference")
    check_walks(case, got)
    same = (got.tokens == expected.tokens).all(1)
    assert same.numel() == 0 or same.float().mean() >= exactly
    torch.testing.assert_close(got.logprobs[same], expected.logprobs[same], rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [16, 111, 1000])
@pytest.mark.parametrize("variant", VARIANTS)
def test_token_matches_reference(variant, vocabulary, dtype):
    assert_matches_reference(random_case(3, 7, vocabulary, dtype, **VARIANTS[variant]), exactly=0.85)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["plain", "ties", "zeros", "masked", "gaps", "strided", "mixed_temperatures"])
def test_greedy_matches_reference(variant, dtype):
    case = random_case(4, 7, 111, dtype, **VARIANTS[variant]).with_options(method="greedy")
    assert_same_bits(case.run("cpu"), case.run("reference"))


@pytest.mark.parametrize("batch", [0, 1, 64])
def test_batches(batch):
    assert_matches_reference(random_case(5, batch, 111))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("variant", [{}, {"trimmed": 32000}, {"point_mass": True}, {"masked": True, "trimmed": 999}])
def test_whole_vocabulary(variant, dtype):
    """Several blocks, whose edges fall inside a row; with logits of both sides apart, drawn residuals cross them."""
    case = random_case(6, 4, 128256, dtype, longest=3, **variant)
    check_walks(case, case.run("cpu"))


@pytest.mark.parametrize("vocabulary", [511, 512, 513, 4095, 4096, 4097, 8200])
def test_sizes_around_blocks(vocabulary):
    assert_matches_reference(
        random_case(7, 8, vocabulary, longest=4, masked=True, trimmed=vocabulary // 2), exactly=0.7
    )


def test_target_outside_the_trimmed_vocabulary():
    case = random_case(8, 32, 64, trimmed=20)
    ids = case.options["draft_vocab"].long()
    case.target[:, ids] = -torch.inf
    got = case.run("cpu")
    assert (got.num_tokens == 1).all() and not torch.isin(got.tokens[:, 0].long(), ids).any()
    check_walks(case, got)


def test_equal_distributions_accept_everything():
    case = random_case(9, 32, 4097)
    case.draft = case.target
    assert (case.run("cpu").num_tokens == (case.cu_nodes[1:] - case.cu_nodes[:-1])).all()


def test_default_draft_parameters_are_the_temperature_of_the_target():
    case = random_case(10, 16, 111, temperature=0.6)
    given = case.run("cpu")
    assert_same_bits(case.run("cpu", draft_params=None), given)
    assert not torch.equal(case.run("cpu", draft_params=sk.SamplingParams(temperature=3.0)).tokens, given.tokens)


def test_philox_coins_are_the_definition():
    case = random_case(11, 64, 111)
    rng, owner = case.options["rng"], case.owners()
    local = torch.arange(len(owner)) - case.cu_nodes[:-1].long()[owner]
    explicit = case.with_options(
        rng=None,
        accept_uniforms=philox.coins(rng.seed[owner], rng.offset[owner], philox.ACCEPT, local),
        final_uniforms=philox.coins(rng.seed, rng.offset, philox.FINAL, torch.zeros_like(rng.seed)),
    )
    assert_same_bits(explicit.run("cpu"), case.run("cpu"))


@pytest.mark.parametrize("method", ["token", "greedy"])
@pytest.mark.parametrize("variant", ["plain", "trimmed_masked", "gaps", "point_mass"])
def test_rows_the_walk_does_not_reach_are_not_read(variant, method):
    case = random_case(12, 40, 111, **VARIANTS[variant]).with_options(method=method)
    clean = case.run("cpu")
    case.target = case.target.clone()
    case.draft = None if case.draft is None else case.draft.clone()
    for b, nodes in enumerate(case.requests()):
        last = nodes[0] + int(clean.num_tokens[b]) - 1
        case.target[last + 1 : nodes.stop] = torch.nan
        if case.draft is not None:
            tested = method == "token" and case.is_draft(last + 1, nodes)
            start = nodes[0] if method == "greedy" else last + 1 if tested else last
            case.draft[start : nodes.stop] = torch.nan
    assert_same_bits(case.run("cpu"), clean)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", ["target", "draft"])
@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_broken_rows_stay_in_their_request(bad, side, temperature):
    case = random_case(13, 6, 5000, longest=3, temperature=temperature)
    clean = case.run("cpu")
    logits = getattr(case, side).clone()
    setattr(case, side, logits)
    b = next(b for b, nodes in enumerate(case.requests()) if len(nodes) > 1)
    row = logits[case.requests()[b][0]]
    row[... if bad == -torch.inf else 4500] = bad
    got = case.run("cpu")
    assert got.num_tokens[b] == 0 and (got.tokens[b] == -1).all() and (got.nodes[b] == -1).all()
    assert got.logprobs[b].isnan().all()
    others = [i for i in range(6) if i != b]
    assert_same_bits(sk.Verified(*(x[others] for x in got)), sk.Verified(*(x[others] for x in clean)))
    reference = case.run("reference")
    assert torch.equal(got.num_tokens, reference.num_tokens)


def test_a_mask_hides_what_is_broken():
    case = random_case(14, 7, 111, masked=True)
    clean = case.run("cpu")
    words = case.options["params"].allowed
    allowed = (words[:, :, None] >> torch.arange(32, dtype=torch.int32)).reshape(len(words), -1)[:, :111] & 1
    case.target = torch.where(allowed == 1, case.target, torch.nan)
    assert_same_bits(case.run("cpu"), clean)


@pytest.mark.parametrize("variant", ["plain", "trimmed_masked", "mixed_temperatures"])
def test_threads_batch_and_order_change_no_bit(variant):
    case = random_case(15, 7, 9000, longest=4, **VARIANTS[variant])
    threads, expected = torch.get_num_threads(), case.run("cpu")
    try:
        for number in (1, 2, 3, 16):  # 16 > 7 requests: the threads share a row
            torch.set_num_threads(number)
            assert_same_bits(case.run("cpu"), expected)
    finally:
        torch.set_num_threads(threads)
    order = [4, 0, 6, 2, 5, 1, 3]
    assert_same_bits(case.select(order).run("cpu"), sk.Verified(*(x[order] for x in expected)))
    for b in range(7):
        assert_same_bits(case.select([b]).run("cpu"), sk.Verified(*(x[b : b + 1] for x in expected)))


def test_columns_that_do_not_lie_side_by_side():
    case = random_case(16, 7, 111)
    expected = case.run("cpu")
    case.target, case.draft = case.target.t().contiguous().t(), case.draft.t().contiguous().t()
    assert_same_bits(case.run("cpu"), expected)


def test_arguments_are_left_alone():
    case = random_case(17, 7, 111, masked=True, trimmed=20, explicit=True)
    before = [x.clone() for x in (case.tokens, case.cu_nodes, case.target, case.draft)]
    case.run("cpu")
    assert all(
        torch.equal(a, b) for a, b in zip(before, (case.tokens, case.cu_nodes, case.target, case.draft), strict=True)
    )


@pytest.mark.parametrize(
    "cu_nodes",
    [[0, 1000], [5, 2], [-3, 4], [0, 0], [2**31 - 1, -(2**31)]],
    ids=["long", "falling", "negative", "empty", "huge"],
)
def test_any_cu_nodes_and_draft_vocab_stay_in_bounds(cu_nodes):
    case = random_case(18, 1, 111, trimmed=30, masked=True, longest=3)
    case.cu_nodes = torch.tensor(cu_nodes, dtype=torch.int32)
    case.options["draft_vocab"] = torch.randint(-(2**31), 2**31 - 1, (30,)).to(torch.int32)
    got = case.run("cpu")
    assert (got.num_tokens >= 0).all() and (got.num_tokens <= 4).all()
