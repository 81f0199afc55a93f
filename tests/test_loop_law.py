"""Sampled output of the whole loop has the target's own law: first three tokens against exact probabilities."""

from __future__ import annotations

import pytest
import torch

from loop_support import exact_law, llama, noisy, one_thread, p_value  # noqa: F401 (a fixture)
from specdec_kernels import SamplingParams
from specdec_loop import ModelDrafter, NgramDrafter, Tree, generate
from specdec_loop.drafters import Draft

VOCAB, REQUESTS, LENGTH = 7, 2000, 3
PROMPT = [3, 1, 4, 1, 5, 1, 4, 1]
TREE = Tree(nodes=8, depth=2, width=3, branching=(3, 2))
CHAINS = ["token", "block"]
TREES = ["multi_round", "without_replacement", "target_only"]
MORE_TREES = ["k_seq", "greedy_multi", "traversal", "traversal_iid"]
LIMIT = 1e-4


@pytest.fixture(scope="module")
def pair():
    target = llama(0, vocab=VOCAB, hidden=16, layers=1, spread=0.35)
    return target, noisy(target, 0.15)


@pytest.fixture(scope="module")
def laws(pair):
    target = pair[0]
    return {
        None: exact_law(target, PROMPT, LENGTH, lambda logits: logits.softmax(-1)),
        "filtered": exact_law(target, PROMPT, LENGTH, filtered),
    }


def filtered(logits):
    """Temperature 1.3, then the four largest."""
    logits = logits / 1.3
    fourth = logits.topk(4).values[:, -1:]
    return logits.masked_fill(logits < fourth, float("-inf")).softmax(-1)


def sample(target, drafter, first_seed=0, params=SamplingParams(), **options):
    prompts = [PROMPT] * REQUESTS
    seeds = range(first_seed, first_seed + REQUESTS)
    result = generate(target, drafter, prompts, max_new_tokens=LENGTH, params=params, seeds=seeds, **options)
    return result


def options_for(method):
    return {"draft_length": 2} if method in CHAINS else {"tree": TREE}


@pytest.mark.parametrize(
    "method", [*CHAINS, *TREES, *(pytest.param(method, marks=pytest.mark.full) for method in MORE_TREES)]
)
def test_law(pair, laws, method):
    result = sample(*pair, method=method, **options_for(method))
    assert result.statistics.accepted > REQUESTS // 4, "the drafter must matter for the test to say anything"
    assert p_value(laws[None], result.tokens, VOCAB) > LIMIT


@pytest.mark.parametrize("method", ["token", "without_replacement"])
def test_law_with_filters_and_trimmed_head(pair, laws, method):
    target, drafter = pair
    trimmed = ModelDrafter(drafter, rows=torch.tensor([0, 2, 3, 5, 6]))
    params = SamplingParams(temperature=1.3, top_k=4)
    result = sample(target, trimmed, params=params, method=method, **options_for(method))
    assert result.statistics.accepted > REQUESTS // 8
    assert p_value(laws["filtered"], result.tokens, VOCAB) > LIMIT


@pytest.mark.parametrize("shape", [{"draft_length": 2}, {"tree": TREE}], ids=["chain", "tree"])
def test_law_of_ngram_drafts(pair, laws, shape):
    result = sample(pair[0], NgramDrafter(), **shape)
    assert result.statistics.accepted > REQUESTS // 8
    assert p_value(laws[None], result.tokens, VOCAB) > LIMIT


class Liar(ModelDrafter):
    """Claims that its drafts came from a flatter distribution than they did."""

    def propose(self, requests, rng, params):
        draft = super().propose(requests, rng, params)
        return Draft(draft.tree, draft.logits * 0.2, draft.vocab)


@pytest.mark.parametrize("method", ["token", "without_replacement"])
def test_the_test_sees_a_wrong_q(pair, laws, method):
    result = sample(pair[0], Liar(pair[1]), method=method, **options_for(method))
    assert p_value(laws[None], result.tokens, VOCAB) < 1e-6
