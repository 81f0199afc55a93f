"""The registered attention: tree logits equal path logits, with windows, caps and sinks, in any batch."""

from __future__ import annotations

import pytest
import torch

from attention_models import MODELS, assert_path_logits, make, path_to
from loop_support import noisy, one_thread  # noqa: F401 (a fixture)
from specdec_kernels import DraftTree, SamplingParams, backends, compact_kv_
from specdec_loop import Tree, attend, autoregressive, generate

FACTS = {"dtype": torch.float32, "cache_dtype": torch.float32, "sizes": (8, 8)}
UNSERVED = backends.why_not("tree_attention", "cpu", "cpu", **FACTS)


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return make(request.param)


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
        _, path, tokens = path_to(tree, 8)
        assert tokens == [5, 6, 7, 8]
        nodes = torch.full((3, 5), -1, dtype=torch.int32)
        nodes[0], nodes[1:, 0] = torch.tensor(path), 0
        compact_kv_(cache.buffers(3), nodes, prefix_lens)
        after = DraftTree.chain(torch.tensor([[13], [14], [15]]))
        positions, step = attend.tree_step(after, prefix_lens + torch.tensor([5, 1, 1], dtype=torch.int32))
        next_logits = attend.forward(model, cache, after.tokens, positions, step).logits[0]
    assert_path_logits(model, prompts, tree, logits)
    longer = [torch.cat([p, torch.tensor(t)]) for p, t in zip(prompts, ([5, 6, 7, 8, 13], [14], [15]), strict=True)]
    assert_path_logits(model, longer, after, next_logits)


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


def test_one_layout_serves_all_layers(model, monkeypatch):
    """Where the nodes of a step stand is computed once; no layer asks again."""
    calls = []
    real = attend.tree_attention
    monkeypatch.setattr(attend, "tree_attention", lambda *args, **kw: calls.append(kw["layout"]) or real(*args, **kw))
    monkeypatch.setattr("specdec_kernels.attention.tree_layout", None)
    with torch.no_grad(), attend.attending(model):
        cache = attend.SlotCache(100, torch.full((1,), 99))
        attend.prefill(model, cache, [torch.arange(90) % 60])
        calls.clear()
        tree = DraftTree.chain(torch.tensor([[5, 6, 7]]))
        positions, step = attend.tree_step(tree, torch.tensor([89], dtype=torch.int32))
        attend.forward(model, cache, tree.tokens, positions, step)
    assert len(calls) == 2 and all(layout is step.layout for layout in calls)


@pytest.mark.skipif(UNSERVED is not None, reason=f"cpu: {UNSERVED}")
@pytest.mark.parametrize("tree", [None, Tree(nodes=8, depth=3, width=3)], ids=["chain", "tree"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_loop_runs_on_the_cpu_backend_alone(model, monkeypatch, tree, temperature):
    """With a backend forced, an op that it does not serve raises; the reference decodes the same tokens."""
    drafter = noisy(model, 0.03)
    prompts = [torch.arange(1, 80) % 60, torch.tensor([3, 4])]
    options = {"tree": tree, "params": SamplingParams(temperature=temperature), "seeds": 7, "max_new_tokens": 12}
    results = []
    for backend in ("cpu", "reference"):
        monkeypatch.setattr("specdec_kernels.backends.FORCED", backend)
        results.append(generate(model, drafter, prompts, **options))
    assert results[0].tokens == results[1].tokens
    assert results[0].statistics.block_efficiency > 1
