"""The reference backend of verify_chain and verify_tree: filters, limits, isolation, randomness."""

from __future__ import annotations

import pytest
import torch

from specdec_kernels import DraftTree, Philox, SamplingParams, verify_chain, verify_tree
from specdec_kernels.reference.rows import Rows, draw
from specdec_kernels.verify import CHAIN_METHODS, TREE_METHODS
from verify_cases import random_logits, random_tree, streams

EXACT_TREE = [m for m in TREE_METHODS if m != "typical"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tree(t, target, draft=None, **options):
    return verify_tree(t, target, draft, backend="reference", **options)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))


def filtered_by_sorting(row, temperature, top_k, top_p, min_p):
    """The definition, one row at a time, over python floats."""
    z = row.double() / temperature
    keep = torch.ones_like(z, dtype=torch.bool)
    if top_k:
        keep &= z >= z.sort(descending=True).values[min(top_k, len(z)) - 1]
    p = torch.where(keep, z, -torch.inf).softmax(0)
    if top_p < 1:
        ranked, mass = p.sort(descending=True).values, 0.0
        for value in ranked.tolist():
            mass += value
            if mass >= top_p:
                break
        keep &= p >= value
    p = torch.where(keep, z, -torch.inf).softmax(0)
    keep &= p >= min_p * p.max()
    return torch.where(keep, z, -torch.inf).softmax(0)


SETTINGS = [
    (1.0, 0, 1.0, 0.0),
    (0.7, 5, 1.0, 0.0),
    (1.3, 0, 0.8, 0.0),
    (1.0, 0, 1.0, 0.1),
    (0.9, 7, 0.6, 0.05),
    (1.0, 99, 0.3, 0.0),
]


@pytest.mark.parametrize("kind", ["flat", "peaked", "tied", "holes"])
@pytest.mark.parametrize("temperature,top_k,top_p,min_p", SETTINGS)
def test_filters_equal_the_sorted_definition(kind, temperature, top_k, top_p, min_p):
    rows = random_logits(6, 23, generator(1), sharpness={"flat": 0.1, "peaked": 6.0}.get(kind, 1.5)).double()
    if kind == "tied":
        rows = rows.round()
    if kind == "holes":
        rows[:, ::3] = -torch.inf
    found, sound = Rows(rows, 23, scalars=(temperature, top_k, top_p, min_p)).probs(
        torch.arange(6), torch.zeros(6).long()
    )
    assert bool(sound.all())
    for i in range(6):
        expected = filtered_by_sorting(rows[i], temperature, top_k, top_p, min_p)
        assert torch.allclose(found[i], expected, atol=1e-12), (i, found[i], expected)


def test_the_allowed_mask_comes_first_and_masks_by_target_id():
    logits = random_logits(2, 70, generator(2))
    keep = torch.rand(2, 70, generator=generator(3)) < 0.3
    keep[:, 69] = True
    words = torch.zeros(2, 3, dtype=torch.int64)
    for v in range(70):
        words[:, v // 32] |= keep[:, v].long() << (v % 32)
    words = words.to(torch.int32)  # bit 31 makes a word negative
    plain = logits.masked_fill(~keep, -torch.inf)
    index = torch.arange(2)
    a, _ = Rows(logits, 70, allowed=words, scalars=(1.0, 3, 1.0, 0.0)).probs(index, index)
    b, _ = Rows(plain, 70, scalars=(1.0, 3, 1.0, 0.0)).probs(index, index)
    assert torch.equal(a, b)
    vocab = torch.tensor([0, 5, 31, 32, 63, 69], dtype=torch.int32)
    compact, _ = Rows(logits[:, vocab.long()], 70, vocab=vocab, allowed=words).probs(index, index)
    wide = torch.full_like(plain, -torch.inf)
    wide[:, vocab.long()] = plain[:, vocab.long()]
    assert torch.allclose(compact, wide.softmax(1))


def test_draw_is_the_inverse_cdf_in_vocabulary_order():
    mass = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]]).repeat(6, 1) * 3.0
    u = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2.0**-24])
    assert draw(mass, u).tolist() == [1, 1, 3, 3, 4, 4]


@pytest.mark.parametrize("method", EXACT_TREE)
def test_temperature_zero_gives_the_targets_greedy_tokens(method):
    t = random_tree(40, 9, 5, generator(4))
    target, draft = random_logits(len(t.tokens), 5, generator(5)), random_logits(len(t.tokens), 5, generator(6))
    target[:, 1] = target[:, 2]  # ties go to the lowest id
    found = tree(t, target, draft, method=method, params=SamplingParams(temperature=0.0), rng=streams(40))
    greedy = target.argmax(1)
    for b in range(40):
        start = int(t.cu_nodes[b])
        emitted = found.tokens[b][: found.num_tokens[b]].tolist()
        node = 0
        for i, token in enumerate(emitted):
            assert token == int(greedy[start + node])
            if i < len(emitted) - 1:
                node = int(found.nodes[b, i + 1])
                assert int(t.tokens[start + node]) == token
    # These siblings are no draws of q, which bottom-up verification may answer with a shorter path of the same tokens.
    if not method.startswith("traversal"):
        assert same(found, tree(t, target, method="greedy"))


@pytest.mark.parametrize("method", TREE_METHODS)
def test_a_request_does_not_see_its_neighbours(method):
    batch, V = 6, 11
    t = random_tree(batch, 8, V, generator(7))
    N = len(t.tokens)
    target, draft = random_logits(N, V, generator(8)), random_logits(N, V, generator(9))
    params = SamplingParams(temperature=torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, 0.7]), top_p=0.9)
    rng = streams(batch)
    whole = tree(t, target, draft, method=method, params=params, rng=rng, logprobs=True)
    for b in range(batch):
        own = slice(int(t.cu_nodes[b]), int(t.cu_nodes[b + 1]))
        cu = torch.tensor([0, own.stop - own.start], dtype=torch.int32)
        alone = tree(
            DraftTree(t.tokens[own], t.parents[own], cu, t.max_nodes, t.max_depth), target[own], draft[own],
            method=method, params=params._replace(temperature=params.temperature[b : b + 1]),
            rng=Philox(rng.seed[b : b + 1], rng.offset[b : b + 1]), logprobs=True,
        )  # fmt: skip
        assert torch.equal(alone.tokens[0], whole.tokens[b])
        assert torch.equal(alone.nodes[0], whole.nodes[b])
        assert torch.allclose(alone.logprobs[0], whole.logprobs[b], equal_nan=True)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), None])
@pytest.mark.parametrize("method", TREE_METHODS)
def test_unsound_rows_stop_one_request_and_no_other(method, poison):
    batch, V = 5, 9
    t = random_tree(batch, 7, V, generator(10))
    N = len(t.tokens)
    target, draft = random_logits(N, V, generator(11)), random_logits(N, V, generator(12))
    clean = tree(t, target, draft, method=method, rng=streams(batch))
    for name in ("target", "draft"):
        bad = {"target": target.clone(), "draft": draft.clone()}
        root = int(t.cu_nodes[2])
        if poison is None:
            bad[name][root] = -torch.inf
        else:
            bad[name][root, 3] = poison
        found = tree(t, bad["target"], bad["draft"], method=method, rng=streams(batch))
        others = torch.tensor([0, 1, 3, 4])
        assert torch.equal(found.tokens[others], clean.tokens[others])
        if name == "target" or method not in ("greedy", "typical", "target_only"):
            assert t.cu_nodes[3] - t.cu_nodes[2] > 1, "the poisoned request must have drafts"
            assert int(found.num_tokens[2]) == 0
            assert found.tokens[2].unique().tolist() == found.nodes[2].unique().tolist() == [-1]


@pytest.mark.parametrize("method", TREE_METHODS)
def test_rows_of_leaves_are_never_read_in_the_draft(method):
    t = random_tree(8, 9, 7, generator(13))
    N = len(t.tokens)
    target, draft = random_logits(N, 7, generator(14)), random_logits(N, 7, generator(15))
    start = t.cu_nodes[:-1].long().repeat_interleave((t.cu_nodes[1:] - t.cu_nodes[:-1]).long())
    inner = torch.zeros(N, dtype=torch.bool)
    inner[(start + t.parents)[t.parents >= 0]] = True
    poisoned = torch.where(inner[:, None], draft, torch.nan)
    assert same(*(tree(t, target, d, method=method, rng=streams(8)) for d in (draft, poisoned)))


@pytest.mark.parametrize("method", [m for m in EXACT_TREE if m != "greedy"])
def test_compact_q_equals_q_scattered_over_the_vocabulary(method):
    V, batch = 40, 30
    t = random_tree(batch, 8, V, generator(16), iid=True)
    N = len(t.tokens)
    vocab = torch.randperm(V, generator=generator(17))[:15].sort().values.to(torch.int32)
    t = t._replace(tokens=vocab[torch.randint(15, (N,), generator=generator(18))])
    target, compact = random_logits(N, V, generator(19)), random_logits(N, 15, generator(20))
    wide = torch.full((N, V), -torch.inf)
    wide[:, vocab.long()] = compact
    rng = streams(batch)
    assert same(
        tree(t, target, compact, method=method, draft_vocab=vocab, rng=rng),
        tree(t, target, wide, method=method, rng=rng),
    )


@pytest.mark.parametrize("method", CHAIN_METHODS)
def test_a_draft_of_minus_one_ends_the_chain(method):
    V = 6
    target, draft = random_logits(5, V, generator(21)), random_logits(5, V, generator(22))
    tokens = torch.tensor([1, 2, -1, 3, 4], dtype=torch.int32)

    def chain(n):
        return verify_chain(
            tokens[:n], torch.tensor([0, n], dtype=torch.int32), target[:n], draft[:n], max_depth=4, method=method,
            rng=streams(1), backend="reference",
        )  # fmt: skip

    assert same(chain(5), chain(2))


def test_no_drafts_and_no_requests():
    V = 5
    target = random_logits(3, V, generator(23))
    tokens, cu = torch.zeros(3, dtype=torch.int32), torch.arange(4, dtype=torch.int32)
    for method in CHAIN_METHODS:
        found = verify_chain(tokens, cu, target, max_depth=0, method=method, rng=streams(3), backend="reference")
        assert found.num_tokens.tolist() == [1, 1, 1] and found.tokens.shape == (3, 1)
        empty = verify_chain(
            tokens[:0], cu[:1], target[:0], max_depth=3, method=method, rng=streams(0), backend="reference"
        )
        assert empty.tokens.shape == (0, 4) and empty.num_tokens.shape == (0,)
    for method in TREE_METHODS:
        none = DraftTree(tokens[:0], tokens[:0], cu[:1], 4, 3)
        assert tree(none, target[:0], target[:0], method=method, rng=streams(0)).nodes.shape == (0, 4)


@pytest.mark.parametrize("method", [m for m in TREE_METHODS if m != "greedy"])
def test_explicit_uniforms_replace_the_stream_one_for_one(method):
    from specdec_kernels import philox

    t = random_tree(12, 9, 8, generator(24))
    N = len(t.tokens)
    target, draft = random_logits(N, 8, generator(25)), random_logits(N, 8, generator(26))
    rng = streams(12)
    sizes = (t.cu_nodes[1:] - t.cu_nodes[:-1]).long()
    request = torch.arange(12).repeat_interleave(sizes)
    local = torch.arange(N) - t.cu_nodes[:-1].long()[request]
    accept = philox.coins(rng.seed[request], rng.offset[request], philox.ACCEPT, local)
    final = philox.coins(rng.seed, rng.offset, philox.FINAL, torch.zeros(12, dtype=torch.int64))
    a = tree(t, target, draft, method=method, rng=rng)
    assert same(a, tree(t, target, draft, method=method, accept_uniforms=accept, final_uniforms=final))
    assert same(
        a, tree(t, target, draft, method=method, rng=streams(12, 9), accept_uniforms=accept, final_uniforms=final)
    )


def test_logprobs_are_those_of_the_processed_target():
    t = random_tree(9, 6, 10, generator(27))
    target = random_logits(len(t.tokens), 10, generator(28))
    params = SamplingParams(temperature=0.8, top_k=6)
    found = tree(t, target, method="target_only", params=params, rng=streams(9), logprobs=True)
    assert tree(t, target, method="target_only", params=params, rng=streams(9)).logprobs is None
    for b in range(9):
        for j in range(int(found.num_tokens[b])):
            row = target[int(t.cu_nodes[b]) + int(found.nodes[b, j])]
            expected = filtered_by_sorting(row, 0.8, 6, 1.0, 0.0)[found.tokens[b, j]].log()
            assert float(found.logprobs[b, j]) == pytest.approx(float(expected), abs=1e-4)
        assert found.logprobs[b, int(found.num_tokens[b]) :].isnan().all()


def test_tiny_temperatures_are_greedy():
    target = torch.tensor([[20.0, 20.001, 19.0], [3.0, 1.0, 2.0]])
    tokens, cu = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)
    for temperature in (1e-30, 1e-38, 1e-45):
        params = SamplingParams(temperature=torch.tensor([temperature]))
        found = verify_chain(tokens, cu, target, max_depth=1, params=params, rng=streams(1), backend="reference")
        assert found.tokens.tolist() == [[1, 0]]
