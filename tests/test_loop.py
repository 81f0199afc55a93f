"""The loop: same tokens as plain decoding, whatever the drafts, the batch and the way a request ends."""

from __future__ import annotations

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, T5Config, T5ForConditionalGeneration

from loop_support import llama, noisy, one_thread  # noqa: F401 (a fixture)
from specdec_kernels import SamplingParams
from specdec_loop import ModelDrafter, NgramDrafter, Tree, attend, autoregressive, generate
from specdec_loop.packed import pack_linears_
from specdec_loop.policies import AdaEDL

PROMPTS = [[1, 2, 3, 4, 5], [7], [9, 8, 7, 6, 5, 4, 3, 2, 1], [3, 3, 3]]
TREE = Tree(nodes=12, depth=4, width=3, branching=(3, 2, 1))
SHAPES = {"chain": {"draft_length": 4}, "tree": {"tree": TREE}, "long": {"draft_length": 9}}
NEW = 24


@pytest.fixture(scope="module")
def pair():
    target = llama(0)
    return target, noisy(target, 0.03)


@pytest.fixture(scope="module")
def plain(pair):
    return autoregressive(pair[0], PROMPTS, max_new_tokens=NEW).tokens


def test_autoregressive_is_what_transformers_decodes(pair, plain):
    for prompt, tokens in zip(PROMPTS, plain, strict=True):
        ids = pair[0].generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW)
        assert tokens == ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["batch4", "batch1"])
def test_greedy_speculation_changes_nothing(pair, plain, shape, prompts):
    result = generate(*pair, prompts, max_new_tokens=NEW, **shape)
    assert result.tokens == plain[: len(prompts)]
    assert result.finish_reasons == ["length"] * len(prompts)
    assert result.statistics.block_efficiency > 1.2


@pytest.mark.parametrize("method", ["token", "block", "multi_round", "without_replacement", "target_only", "traversal"])
def test_temperature_zero_of_sampling_methods_is_greedy(pair, plain, method):
    shape = SHAPES["chain"] if method in ("token", "block") else SHAPES["tree"]
    assert generate(*pair, PROMPTS, max_new_tokens=NEW, method=method, **shape).tokens == plain


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_ngram_drafts_change_nothing(pair, shape):
    # A prompt that repeats itself, and a target that then does too.
    prompts = [[5, 6, 7, 8] * 4, PROMPTS[0]]
    expected = autoregressive(pair[0], prompts, max_new_tokens=60).tokens
    result = generate(pair[0], NgramDrafter(), prompts, max_new_tokens=60, **shape)
    assert result.tokens == expected
    assert result.statistics.accepted > 0


def test_trimmed_head_changes_acceptance_only(pair, plain):
    rows = torch.arange(0, 97, 2)
    for shape in SHAPES.values():
        result = generate(pair[0], ModelDrafter(pair[1], rows=rows), PROMPTS, max_new_tokens=NEW, **shape)
        assert result.tokens == plain
        from_draft = [
            t for ts, fs in zip(result.tokens, result.from_draft, strict=True) for t, f in zip(ts, fs, strict=True) if f
        ]
        assert from_draft
        assert all(token % 2 == 0 for token in from_draft)


def test_policy_shortens_chains(pair, plain):
    fixed = generate(*pair, PROMPTS, max_new_tokens=NEW, draft_length=6)
    policy = AdaEDL(threshold=0.25)
    adaptive = generate(pair[0], ModelDrafter(pair[1], policy=policy), PROMPTS, max_new_tokens=NEW, draft_length=6)
    assert adaptive.tokens == fixed.tokens == plain
    assert adaptive.statistics.drafted < fixed.statistics.drafted
    assert adaptive.statistics.acceptance_rate > fixed.statistics.acceptance_rate


@pytest.mark.parametrize(
    ("method", "policy"),
    [("token", True), *((method, False) for method in ("token", "block", "without_replacement", "multi_round")),
     ("traversal", False), ("target_only", False)],
)  # fmt: skip
def test_a_request_does_not_depend_on_its_neighbours(pair, method, policy):
    shape = SHAPES["chain"] if method in ("token", "block") else SHAPES["tree"]
    params = SamplingParams(temperature=torch.tensor([1.0, 0.7, 0.0, 1.2]), top_p=0.9)

    def drafter():
        return ModelDrafter(pair[1], policy=AdaEDL() if policy else None)

    seeds = [11, 2**40 + 1, -3, 5]
    together = generate(
        pair[0], drafter(), PROMPTS, max_new_tokens=NEW, params=params, seeds=seeds, method=method, **shape
    )
    again = generate(
        pair[0], drafter(), PROMPTS, max_new_tokens=NEW, params=params, seeds=seeds, method=method, **shape
    )
    assert again.tokens == together.tokens
    for i, prompt in enumerate(PROMPTS):
        alone = generate(
            pair[0], drafter(), [prompt], max_new_tokens=NEW, seeds=[seeds[i]], method=method, **shape,
            params=params._replace(temperature=params.temperature[i : i + 1]),
        )  # fmt: skip
        assert alone.tokens[0] == together.tokens[i]
    other = generate(
        pair[0], drafter(), PROMPTS, max_new_tokens=NEW, params=params, seeds=[1, 2, 3, 4], method=method, **shape
    )
    assert other.tokens[0] != together.tokens[0]
    assert other.tokens[2] == together.tokens[2], "temperature 0 draws nothing"


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("new", [0, 1, 2, 5])
def test_exactly_max_new_tokens(pair, plain, shape, new):
    result = generate(*pair, PROMPTS, max_new_tokens=new, **shape)
    assert result.tokens == [tokens[:new] for tokens in plain]
    assert result.sequences.shape == (4, 9 + new)
    assert result.finish_reasons == ["length"] * 4
    assert result.statistics.tokens == 4 * new


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_end_of_sequence_cuts_inside_a_path(pair, plain, shape):
    # Each request ends at another place, so rows leave the batch one after the other.
    eos = {plain[0][3], plain[2][10]}
    result = generate(*pair, PROMPTS, max_new_tokens=NEW, eos_token_id=sorted(eos), pad_token_id=96, **shape)
    for got, full, reason in zip(result.tokens, plain, result.finish_reasons, strict=True):
        end = next((i + 1 for i, token in enumerate(full) if token in eos), NEW)
        assert got == full[:end]
        assert reason == ("eos" if full[end - 1] in eos else "length")
    row = result.sequences[0].tolist()
    assert row[: 5 + len(result.tokens[0])] == PROMPTS[0] + result.tokens[0]
    assert set(row[5 + len(result.tokens[0]) :]) <= {96}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_stopping_criteria_see_every_token(pair, plain, shape):
    seen = []

    def criterion(ids, scores):
        seen.append(ids[0].tolist())
        return torch.tensor([ids.shape[1] >= 12])

    result = generate(*pair, PROMPTS, max_new_tokens=8, stopping_criteria=[criterion], **shape)
    for prompt, got, full in zip(PROMPTS, result.tokens, plain, strict=True):
        count = min(8, 12 - len(prompt))
        assert got == full[:count]
        for length in range(1, count + 1):
            assert prompt + full[:length] in seen
    assert result.finish_reasons == ["stop", "length", "stop", "length"]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_streaming_delivers_what_is_returned(pair, shape):
    streamed = {i: [] for i in range(4)}
    result = generate(
        *pair, PROMPTS, max_new_tokens=NEW, token_callback=lambda i, tokens: streamed[i].extend(tokens), **shape
    )
    assert list(streamed.values()) == result.tokens


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts(pair, plain, side):
    ids = torch.full((4, 9), 96)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(PROMPTS):
        place = slice(9 - len(prompt), 9) if side == "left" else slice(0, len(prompt))
        ids[row, place] = torch.tensor(prompt)
        mask[row, place] = 1
    result = generate(*pair, ids, attention_mask=mask, max_new_tokens=NEW)
    assert result.tokens == plain
    for row, prompt in enumerate(PROMPTS):
        lead = 9 - len(prompt) if side == "left" else 0
        assert result.sequences[row, lead : lead + len(prompt) + NEW].tolist() == prompt + plain[row]


def test_invalid_logits_end_one_request_only(pair, plain):
    target = noisy(pair[0], 0.0)
    with torch.no_grad():
        target.model.embed_tokens.weight[96] = float("nan")
        target.lm_head.weight.copy_(pair[0].lm_head.weight)
    result = generate(target, pair[1], [PROMPTS[0], [5, 96], PROMPTS[2]], max_new_tokens=NEW)
    assert result.finish_reasons == ["length", "invalid", "length"]
    assert result.tokens == [plain[0], [], plain[2]]


def test_cache_is_written_in_place(pair, monkeypatch):
    places = []
    update = attend.SlotLayer.update

    def spy(self, keys, values, *args):
        out = update(self, keys, values, *args)
        places.append((id(self), self.keys.data_ptr(), self.values.data_ptr(), tuple(self.keys.shape)))
        return out

    monkeypatch.setattr(attend.SlotLayer, "update", spy)
    generate(*pair, PROMPTS, max_new_tokens=NEW, tree=TREE)
    assert len(places) > 40
    assert len(set(places)) == 4, "two layers of each model, each allocated once"


def test_statistics_add_up(pair):
    result = generate(*pair, PROMPTS, max_new_tokens=NEW, draft_length=4)
    stats = result.statistics
    assert stats.tokens == 4 * NEW
    assert stats.accepted == sum(map(sum, result.from_draft)) == sum(stats.accepted_at)
    assert stats.drafted == 4 * stats.request_rounds == sum(stats.offered_at)
    assert stats.tokens - stats.accepted <= stats.request_rounds <= 4 * stats.rounds
    assert stats.target_calls == stats.rounds
    assert stats.draft_calls == 4 * stats.rounds
    assert stats.acceptance_at == sorted(stats.acceptance_at, reverse=True)
    assert stats.mbsu == pytest.approx(stats.block_efficiency / (4 + 1))  # the drafter is as large as the target
    assert 0 < stats.decode_seconds < stats.wall_seconds
    assert sum(stats.seconds.values()) <= stats.wall_seconds
    trimmed = ModelDrafter(pair[1], rows=torch.arange(10))
    assert ModelDrafter(pair[1]).bytes_read() - trimmed.bytes_read() == 87 * 32 * 4


def test_packed_linears_compute_the_same(pair, plain):
    models = [noisy(model, 0.0) for model in pair]
    assert all(map(pack_linears_, models))
    ids = torch.arange(12).view(2, 6)
    torch.testing.assert_close(models[0](ids).logits, pair[0](ids).logits, atol=1e-5, rtol=1e-5)
    assert generate(*models, PROMPTS, max_new_tokens=NEW).tokens == plain
    assert not pack_linears_(noisy(pair[0], 0.0).bfloat16())


def test_models_keep_their_own_attention(pair):
    before = [model.config._attn_implementation for model in pair]
    generate(*pair, PROMPTS, max_new_tokens=2)
    with pytest.raises(RuntimeError, match="boom"):
        generate(
            *pair, PROMPTS, max_new_tokens=2, token_callback=lambda *_: (_ for _ in ()).throw(RuntimeError("boom"))
        )
    assert [model.config._attn_implementation for model in pair] == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens: expected an int >= 0, got -1"),
        ({"draft_length": 0}, "draft_length: expected an int >= 1, got 0"),
        ({"method": "multi_round"}, "method: expected one of 'token', .* for chains, got 'multi_round'"),
        ({"method": "token", "tree": TREE}, "method: expected one of 'greedy', .* for trees, got 'token'"),
        ({"method": "greedy", "params": SamplingParams()}, "method: 'greedy' decodes at temperature 0"),
        ({"params": SamplingParams(allowed=torch.zeros(1, 4, dtype=torch.int32))}, "params.allowed: expected None"),
        ({"params": SamplingParams(top_p=torch.ones(3))}, r"params.top_p: expected a number or shape \[1\], got \[3\]"),
        ({"seeds": [1, 2]}, "seeds: expected an int or one for each of 1 requests, got 2"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1]])}, "attention_mask: expected one run of ones in row 0"),
        ({"attention_mask": torch.ones(1, 4)}, r"attention_mask: expected shape \[1, 5\], got \[1, 4\]"),
    ],
)
def test_bad_arguments_are_named(pair, options, message):
    with pytest.raises(ValueError, match=message):
        generate(*pair, torch.tensor(PROMPTS[:1]), **{"max_new_tokens": 2, **options})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=2)),
            "Bloom.*position_ids",
        ),
        (lambda: T5ForConditionalGeneration(T5Config(vocab_size=97, d_model=16, num_layers=1)), "T5.*encoder"),
        (lambda: llama(0, layer_types=["full_attention", "chunked_attention"]), "chunked_attention"),
    ],
)
def test_models_that_cannot_be_served_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        autoregressive(make(), PROMPTS, max_new_tokens=2, eos_token_id=())


def test_vocabularies_must_agree(pair):
    with pytest.raises(ValueError, match=r"has a vocabulary of 50 ids and the target .* one of 97"):
        generate(pair[0], llama(1, vocab=50), PROMPTS)
    with pytest.raises(ValueError, match=r"rows: expected ascending ids in 0\.\.96"):
        ModelDrafter(pair[1], rows=torch.tensor([3, 2]))
    with pytest.raises(ValueError, match="at least one token in prompt 1"):
        generate(*pair, [[1], []])
