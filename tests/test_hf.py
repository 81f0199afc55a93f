"""The loop behind `model.generate`, and the choice of trimmed rows."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from loop_support import llama, noisy, one_thread  # noqa: F401 (a fixture)
from specdec_kernels import SamplingParams
from specdec_loop import Statistics, Tree, generate, hf, vocab

IDS = torch.tensor([[1, 2, 3, 4, 5], [9, 8, 7, 6, 5]])
SHAPES = {"chain": {"draft_length": 3}, "tree": {"tree": Tree(nodes=8, depth=3, width=3)}}


@pytest.fixture(scope="module")
def pair():
    target = llama(0)
    return target, noisy(target, 0.03)


def speculate(target, drafter, ids=IDS, **options):
    return target.generate(ids, custom_generate=hf.custom_generate, drafter=drafter, **options)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_greedy_equals_generate(pair, shape):
    statistics = Statistics()
    expected = pair[0].generate(IDS, do_sample=False, max_new_tokens=20)
    got = speculate(*pair, do_sample=False, max_new_tokens=20, statistics=statistics, **shape)
    assert torch.equal(got, expected)
    assert statistics.tokens == 40
    assert statistics.block_efficiency > 1
    plain = speculate(pair[0], None, do_sample=False, max_new_tokens=20)
    assert torch.equal(plain, expected)


def test_left_padding_end_ids_and_padding(pair):
    ids = torch.tensor([[0, 0, 3, 4, 5], [9, 8, 7, 6, 5]])
    mask = (ids != 0).long()
    first = pair[0].generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=16)
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 16}
    assert torch.equal(speculate(*pair, ids, **options), first)
    eos = int(first[1, 9])
    expected = pair[0].generate(ids, eos_token_id=eos, pad_token_id=0, **options)
    assert torch.equal(speculate(*pair, ids, eos_token_id=eos, pad_token_id=0, **options), expected)


def test_sampling_parameters_reach_verification(pair):
    options = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "min_p": 0.01, "max_new_tokens": 12}
    got = speculate(*pair, seeds=[5, 6], **options)
    params = SamplingParams(temperature=0.8, top_k=50, top_p=0.9, min_p=0.01)
    expected = generate(*pair, IDS, params=params, seeds=[5, 6], max_new_tokens=12)
    assert torch.equal(got, expected.sequences)
    params = params._replace(top_k=None)
    unfiltered = generate(*pair, IDS, params=params, seeds=[5, 6], max_new_tokens=12)
    assert torch.equal(speculate(*pair, seeds=[5, 6], top_k=0, **options), unfiltered.sequences)
    config = GenerationConfig(**options, top_k=0, pad_token_id=0)
    assert torch.equal(speculate(*pair, seeds=[5, 6], generation_config=config), unfiltered.sequences)


class After(StoppingCriteria):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


def test_stopping_criteria_and_dict(pair):
    plain = pair[0].generate(IDS[:1], do_sample=False, max_new_tokens=16)
    criteria = StoppingCriteriaList([After(int(plain[0, 11]))])
    expected = pair[0].generate(IDS[:1], do_sample=False, max_new_tokens=16, stopping_criteria=criteria)
    options = {"do_sample": False, "max_new_tokens": 16, "return_dict_in_generate": True}
    got = speculate(*pair, IDS[:1], stopping_criteria=criteria, **options)
    assert expected.shape[1] < plain.shape[1]
    assert torch.equal(got.sequences, expected)


def test_streaming(pair):
    seen = {0: [], 1: []}
    out = speculate(*pair, do_sample=False, max_new_tokens=9, token_callback=lambda i, tokens: seen[i].extend(tokens))
    assert [seen[0], seen[1]] == out[:, 5:].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repetition_penalty": 1.2}, "logits_processor: RepetitionPenaltyLogitsProcessor is not supported"),
        ({"do_sample": True, "typical_p": 0.5}, "logits_processor: TypicalLogitsWarper is not supported"),
        ({"num_beams": 2}, "num_beams: expected 1 with custom_generate, got 2"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores: expected False"),
    ],
)
def test_what_is_not_served_is_named(pair, options, message):
    with pytest.raises(ValueError, match=message):
        speculate(*pair, max_new_tokens=4, **options)


def test_order_of_processors():
    with pytest.raises(ValueError, match="in this order, got temperature late"):
        hf.sampling_params([TopPLogitsWarper(0.5), TemperatureLogitsWarper(2.0)], True)
    assert hf.sampling_params([TemperatureLogitsWarper(2.0), TopPLogitsWarper(0.5)], True) == SamplingParams(
        2.0, None, 0.5
    )
    assert hf.sampling_params([], False).temperature == 0


def test_rows_of_a_trimmed_head():
    counts = vocab.count_tokens([[1, 1, 4], torch.tensor([[4, 4], [2, 1]])], 6)
    assert counts.tolist() == [0, 3, 1, 0, 3, 0]
    order = vocab.frequency_order(counts)
    assert order.tolist() == [1, 4, 2, 0, 3, 5]
    assert vocab.select_rows(order, 3).tolist() == [1, 2, 4]
    rows = vocab.select_rows(order, 3, force=[5, 5, 4])
    assert rows.tolist() == [1, 4, 5]
    assert rows.dtype == torch.int32
    assert vocab.select_rows(order, 6, force=[0]).tolist() == list(range(6))
    with pytest.raises(ValueError, match=r"size: expected 2\.\.6, got 1"):
        vocab.select_rows(order, 1, force=[0, 5])
    with pytest.raises(ValueError, match=r"order: expected a permutation of 0\.\.5"):
        vocab.select_rows(torch.zeros(6), 3)
    with pytest.raises(ValueError, match=r"force: expected ids in 0\.\.5, got \[6\]"):
        vocab.select_rows(order, 3, force=[6])
    with pytest.raises(ValueError, match=r"texts: expected ids in 0\.\.5"):
        vocab.count_tokens([[6]], 6)
