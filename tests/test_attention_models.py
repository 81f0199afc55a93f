"""The registered attention in transformers: trees on its own caches, and plain decoding as `generate` does it."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from attention_models import MODELS, WINDOW, assert_path_logits, make
from loop_support import one_thread  # noqa: F401 (a fixture)
from specdec_kernels import DraftTree, backends
from specdec_loop import attend, hf

SERVED = backends.why_not("tree_attention", "cpu", "cpu", dtype=torch.float32, cache_dtype=torch.float32, sizes=(8, 8))


@pytest.fixture(
    params=["reference", pytest.param("cpu", marks=pytest.mark.skipif(SERVED is not None, reason=f"cpu: {SERVED}"))],
    autouse=True,
)
def backend(request, monkeypatch):
    monkeypatch.setattr("specdec_kernels.backends.FORCED", request.param)


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return make(request.param)


def static(model):
    sliding = getattr(model.config, "sliding_window", None) is not None
    return hf.static_cache(model, 40) if sliding else StaticCache(model.config, max_cache_len=40)


CACHES = {"dynamic": lambda model: DynamicCache(), "static": static}
# Longer than the window, one token only, shorter than the window, exactly the window.
PROMPTS = [torch.arange(1, 12), torch.tensor([4]), torch.arange(60, 55, -1), torch.arange(20, 20 + WINDOW)]


def filled(model, cache, prompts):
    """The cache with all but the last token of each prompt, padded on the right; and the lengths of the prefixes."""
    lengths = torch.tensor([len(prompt) - 1 for prompt in prompts], dtype=torch.int32)
    ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt) - 1] = prompt[:-1]
    model(ids, past_key_values=cache, use_cache=True)
    return lengths


@torch.no_grad()
@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("batch", [1, 4])
def test_trees_on_caches_of_transformers(model, kind, batch):
    """Round after round: ragged trees, then ragged paths of them are committed."""
    prompts, cache = PROMPTS[:batch], CACHES[kind](model)
    forests = [
        [[[1, 2, 3], [1, 2, 4], [5, 6, 7, 8]], [[9]], [[i, i + 1] for i in range(4)], []],
        [[[30, 31], [32]], [[3, 4, 5, 6], [3, 7]], [[8]], [[9, 10], [11, 12, 13]]],
        [[[2]], [[2, 3, 4]], [], [[5, 6], [5, 7]]],
    ]
    accepted = [[[5, 6, 7, 8], [9], [2, 3], []], [[], [3, 7], [8], [11]], [[2], [2, 3, 4], [], [5, 7]]]
    with attend.attending(model):
        prefix_lens = filled(model, cache, prompts)
    for paths, kept in zip(forests, accepted, strict=True):
        tree = DraftTree.from_paths(paths[:batch], [int(prompt[-1]) for prompt in prompts])
        with attend.attending(model):
            logits = hf.tree_logits(model, cache, tree, prefix_lens)
        assert_path_logits(model, prompts, tree, logits)
        nodes = torch.full((batch, 6), -1, dtype=torch.int32)
        for b in range(batch):
            nodes[b, 0] = 0
            start = int(tree.cu_nodes[b])
            for step, token in enumerate(kept[b]):
                mine = range(start, int(tree.cu_nodes[b + 1]))
                ours = [i for i in mine if tree.tokens[i] == token and tree.parents[i] == nodes[b, step]]
                nodes[b, step + 1] = ours[0] - start
        prefix_lens = hf.commit_path(cache, nodes, prefix_lens)
        # The model's own token behind the path is the next root.
        prompts = [torch.cat([p, torch.tensor([*kept[b], 17 + b])]) for b, p in enumerate(prompts)]
        assert prefix_lens.tolist() == [len(prompt) - 1 for prompt in prompts]
        assert int(cache.get_seq_length()) == int(prefix_lens.max())


def test_caches_that_forget_are_refused():
    model = make("gemma2")
    tree = DraftTree.from_paths([[[1]]], [3])
    lens = torch.tensor([4], dtype=torch.int32)
    for cache in (DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=32)):
        with pytest.raises(
            ValueError, match=r"cache: expected layers that keep every slot .* got \w+SlidingWindowLayer"
        ):
            hf.tree_logits(model, cache, tree, lens)


def decoded(model, ids, **options):
    return model.generate(ids, do_sample=False, return_dict_in_generate=True, output_logits=True, **options)


@torch.no_grad()
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "left-padded"])
def test_plain_decoding_equals_the_models_own(model, cache, padded):
    """Prompts that are longer than the window and than a chunk of the chunked prefill."""
    ids = torch.stack([torch.arange(150) * 7 % 60 + 1, torch.arange(150) * 11 % 60 + 1])
    options = {"max_new_tokens": 9, "cache_implementation": cache, "attention_mask": torch.ones_like(ids)}
    if padded:
        ids[0, :141], options["attention_mask"][0, :141] = 0, 0
    expected = decoded(model, ids, **options)
    with attend.attending(model):
        got = decoded(model, ids, **options)
    assert torch.equal(got.sequences, expected.sequences)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max().clamp(min=1)), rtol=0)


@torch.no_grad()
def test_chunked_prefill_behind_a_cache(model):
    """Tokens behind a cache that is not empty, few and many at once, and without any cache."""
    ids = torch.arange(2 * 140).view(2, 140) * 13 % 60 + 1
    expected = model(ids, use_cache=False).logits
    tolerance = {"atol": 1e-5 * float(expected.abs().max().clamp(min=1)), "rtol": 0}
    with attend.attending(model):
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, **tolerance)
        for cache in (DynamicCache(config=model.config), DynamicCache()):
            pieces = [
                model(part, past_key_values=cache, use_cache=True).logits for part in ids.split([20, 5, 100, 1, 14], 1)
            ]
            torch.testing.assert_close(torch.cat(pieces, 1), expected, **tolerance)


def test_masks_that_are_not_causal_are_refused():
    model = make("llama")
    ids = torch.tensor([[1, 2, 3, 4]])
    with attend.attending(model):
        with pytest.raises(ValueError, match="attention_mask: expected one run of ones up to the last token"):
            model(ids, attention_mask=torch.tensor([[1, 0, 1, 1]]))
        with pytest.raises(ValueError, match="'specdec' attention: expected plain causal attention"):
            model(ids, position_ids=torch.tensor([[0, 1, 0, 1]]), use_cache=False)  # two packed sequences
        with pytest.raises(ValueError, match="LlamaAttention: expected no mask but the one that is built"):
            model(ids, attention_mask=torch.ones(1, 1, 4, 4, dtype=torch.bool))
        layer = model.model.layers[0].self_attn
        states = torch.zeros(1, 4, 1, 8)
        with pytest.raises(ValueError, match="step: expected a Step or a mask for 'specdec', got neither from Llama"):
            attend.attention(layer, states, states, states, None)
