"""The registered attention: tree logits equal path logits, with windows, caps and sinks, in any batch."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from loop_support import llama, one_thread  # noqa: F401 (a fixture)
from specdec_kernels import DraftTree, compact_kv_
from specdec_loop import attend, autoregressive

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MIXED = {
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention"],
    "attn_implementation": "eager",
}


def mistral():
    return MistralForCausalLM(MistralConfig(sliding_window=7, **SIZES))


def gemma():
    config = Gemma2Config(
        attn_logit_softcapping=3.0, final_logit_softcapping=5.0, query_pre_attn_scalar=8, **MIXED, **SIZES
    )
    return Gemma2ForCausalLM(config)


def gpt_oss():
    config = GptOssConfig(num_local_experts=2, num_experts_per_tok=1, **MIXED, **SIZES)
    return GptOssForCausalLM(config)


MODELS = {"llama": lambda: llama(2, vocab=61), "mistral": mistral, "gemma2": gemma, "gpt_oss": gpt_oss}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(5)
    return MODELS[request.param]().eval()


@torch.no_grad()
def test_tree_logits_equal_path_logits(model):
    prompts = [torch.arange(1, 12), torch.tensor([4]), torch.arange(60, 50, -1)]
    tree = DraftTree.from_paths(
        [[[1, 2, 3], [1, 2, 4], [5, 6, 7, 8]], [[9]], [[i, i + 1] for i in range(20)]], [int(p[-1]) for p in prompts]
    )
    prefix_lens = torch.tensor([len(prompt) - 1 for prompt in prompts], dtype=torch.int32)
    cache = attend.SlotCache(70, torch.full((3,), 69))
    with attend.attending(model):
        attend.prefill(model, cache, prompts)
        positions, step = attend.tree_step(tree, prefix_lens)
        logits = attend.forward(model, cache, tree.tokens, positions, step).logits[0]
        # After committing the path root-5-6-7-8 of request 0 the next token sees it alone.
        index = {(int(p), int(t)): i for i, (p, t) in enumerate(zip(tree.parents[:9], tree.tokens[:9], strict=True))}
        path = [0]
        for token in (5, 6, 7, 8):
            path.append(index[path[-1], token])
        nodes = torch.full((3, 5), -1, dtype=torch.int32)
        nodes[0], nodes[1:, 0] = torch.tensor(path), 0
        compact_kv_(cache.buffers(3), nodes, prefix_lens)
        after = DraftTree.chain(torch.tensor([[13], [14], [15]]))
        positions, step = attend.tree_step(after, prefix_lens + torch.tensor([5, 1, 1], dtype=torch.int32))
        next_logits = attend.forward(model, cache, after.tokens, positions, step).logits[0]

    def path_logits(tokens):
        return model(torch.tensor([tokens]), use_cache=False).logits[0, -1]

    tolerance = 1e-5 * float(logits.abs().max().clamp(min=1))
    starts = tree.cu_nodes.tolist()
    for b, prompt in enumerate(prompts):
        for node in range(starts[b], starts[b + 1]):
            tokens, place = [], node
            while place > starts[b]:
                tokens.append(int(tree.tokens[place]))
                place = starts[b] + int(tree.parents[place])
            expected = path_logits(prompt.tolist() + tokens[::-1])
            torch.testing.assert_close(logits[node], expected, atol=tolerance, rtol=0)
    expected = path_logits([*prompts[0].tolist(), 5, 6, 7, 8, 13])
    torch.testing.assert_close(next_logits[0], expected, atol=tolerance, rtol=0)


def test_prefill_with_windows_caps_and_sinks(model):
    # Longer than the window and than one chunk of the chunked prefill.
    prompt = [1 + 7 * i % 60 for i in range(150)]
    ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)
    assert autoregressive(model, [prompt], max_new_tokens=12).tokens[0] == ids[0, 150:].tolist()


def test_only_some_nodes_run(model):
    """A drafter feeds a tree level by level; the logits are those of feeding it whole."""
    prompt = torch.arange(1, 10)
    tree = DraftTree.from_paths([[[1, 2], [1, 3], [4, 5]]], [int(prompt[-1])])
    prefix = torch.tensor([8], dtype=torch.int32)
    results = []
    with torch.no_grad(), attend.attending(model):
        for parts in ([None], [torch.tensor([0]), torch.tensor([1, 4]), torch.tensor([2, 3, 5])]):
            cache = attend.SlotCache(20, torch.full((1,), 19))
            attend.prefill(model, cache, [prompt])
            logits = torch.empty(6, 61)
            for nodes in parts:
                positions, step = attend.tree_step(tree, prefix, nodes)
                tokens = tree.tokens if nodes is None else tree.tokens[nodes]
                out = attend.forward(model, cache, tokens, positions, step).logits[0]
                logits[slice(None) if nodes is None else nodes] = out
            results.append(logits)
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)


def test_a_forward_without_a_step_says_so(model):
    with attend.attending(model), pytest.raises(ValueError, match="step: expected a Step, got None"):
        model(torch.tensor([[1, 2, 3]]))
