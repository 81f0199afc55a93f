"""Where the loop meets the limits of a model, of a head, of its arguments."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, GPT2Config, GPT2LMHeadModel, GraniteConfig, GraniteForCausalLM

from loop_support import exact_law, llama, p_value
from specdec_kernels import SamplingParams
from specdec_loop import ModelDrafter, Tree, autoregressive, generate
from specdec_loop.policies import Policy

SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def prompts(*lengths, vocab=40):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocab, (n,), generator=generator) for n in lengths]


@pytest.mark.parametrize("options", [{}, {"tree": Tree(nodes=8, depth=4, width=2)}], ids=["chain", "tree"])
def test_drafts_do_not_read_past_a_table_of_positions(options):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    target, drafter = GPT2LMHeadModel(config).eval(), GPT2LMHeadModel(copy.deepcopy(config)).eval()
    ids = prompts(20, 13)
    plain = autoregressive(target, ids, max_new_tokens=12, eos_token_id=())
    assert generate(target, drafter, ids, max_new_tokens=12, eos_token_id=(), **options).tokens == plain.tokens
    assert generate(target, target, ids, max_new_tokens=12, eos_token_id=(), **options).tokens == plain.tokens


@pytest.mark.parametrize(
    "model",
    [
        lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.0625)),
        lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0)),
    ],
    ids=["cohere", "granite"],
)
def test_a_model_that_scales_its_logits_drafts_for_itself(model):
    torch.manual_seed(0)
    model = model().eval()
    with torch.no_grad():  # sharp enough that a wrong scale of q shows
        model.get_output_embeddings().weight.mul_(40)
    statistics = generate(
        model, model, prompts(5, 7), max_new_tokens=24, params=SamplingParams(1.0), seeds=0, eos_token_id=()
    ).statistics
    assert statistics.acceptance_rate > 0.9  # what is missing is the last round, which is cut


def test_parameters_of_any_number_type_for_each_request():
    target, drafter = llama(0), llama(1)
    ids = prompts(4, 6, vocab=97)
    for temperature in (torch.tensor([0, 1]), torch.tensor([0.0, 1.0], dtype=torch.float64)):
        params = SamplingParams(temperature=temperature)
        found = generate(target, drafter, ids, max_new_tokens=6, params=params, seeds=np.int64(3), eos_token_id=())
        greedy = autoregressive(target, ids[:1], max_new_tokens=6, eos_token_id=())
        assert found.tokens[0] == greedy.tokens[0]


@pytest.mark.parametrize("method", ["greedy_multi", "without_replacement", "multi_round"])
def test_a_head_with_fewer_rows_than_branches(method):
    target = llama(0)
    drafter = ModelDrafter(llama(1), rows=torch.tensor([5, 9], dtype=torch.int32))
    options = {"tree": Tree(branching=(4, 2)), "method": method, "params": SamplingParams(1.0), "seeds": 0}
    found = generate(target, drafter, prompts(4, vocab=97), max_new_tokens=8, eos_token_id=(), **options)
    assert len(found.tokens[0]) == 8


@pytest.mark.parametrize(
    "options,error,message",
    [
        ({"tree": Tree(depth=0)}, ValueError, "tree.depth: expected >= 1, got 0"),
        ({"tree": Tree(nodes=1)}, ValueError, "tree.nodes: expected >= 2, got 1"),
        ({"tree": Tree(branching=())}, ValueError, "tree.branching: expected one or more numbers"),
        ({"seeds": [1, 2]}, ValueError, "seeds: expected an int or one for each of 1 requests, got 2"),
    ],
)
def test_arguments_that_do_not_fit(options, error, message):
    model = llama(0)
    with pytest.raises(error, match=message):
        generate(model, model, prompts(4, vocab=97), max_new_tokens=2, **options)


def test_float_prompts_are_refused_and_no_prompts_are_fine():
    model = llama(0)
    with pytest.raises(TypeError, match=r"input_ids: expected integers in prompt 0, got torch.float32"):
        generate(model, model, [[1.5, 2.0]], max_new_tokens=2)
    empty = generate(model, model, [], max_new_tokens=2)
    assert empty.sequences.shape == (0, 0) and empty.tokens == []


def test_seeds_wrap_to_64_bits():
    model = llama(0)
    options = {"max_new_tokens": 3, "params": SamplingParams(1.0), "eos_token_id": ()}
    ids = prompts(4, 4, vocab=97)
    found = generate(model, model, ids, seeds=2**63 - 1, **options)
    assert found.tokens == generate(model, model, ids, seeds=[2**63 - 1, -(2**63)], **options).tokens


class ByEntropy(Policy):
    """Stops at random-looking places that are a function of the context alone."""

    def proceed(self, depth, entropy):
        return [depth == 0 or float(h) < 1.2 for h in entropy]


def test_a_policy_that_sees_the_entropy_only_is_lossless():
    vocab, length, trials = 6, 3, 3000
    target, drafter = llama(3, vocab=vocab, spread=0.6), llama(4, vocab=vocab, spread=0.6)
    prompt = [1, 2, 4]
    law = exact_law(target, prompt, length, lambda logits: logits.softmax(-1))
    found = generate(
        target,
        ModelDrafter(drafter, policy=ByEntropy()),
        [prompt] * trials,
        max_new_tokens=length,
        params=SamplingParams(1.0),
        seeds=0,
        eos_token_id=(),
    )
    assert 0 < found.statistics.drafted < 4 * found.statistics.request_rounds, "the policy must stop at times"
    assert p_value(law, found.tokens, vocab) > 1e-4


def test_no_temperature_is_temperature_one():
    target, drafter, ids = llama(0), llama(1), prompts(4, vocab=97)
    options = {"max_new_tokens": 6, "seeds": 0, "eos_token_id": ()}
    found = [generate(target, drafter, ids, params=SamplingParams(t), **options).tokens for t in (None, 1.0)]
    assert found[0] == found[1]
