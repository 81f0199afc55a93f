"""Trees that grow: EAGLE-2 equals brute force, and every draw follows the law it names."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy.stats import chisquare

from specdec_kernels import Philox, head, philox, trees

LIMIT = 1e-4  # a statistical test fails by chance once in ten thousand changes of a seed


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


def rows_of(count: int, seed: int = 0) -> Philox:
    """One stream for each of `count` rows of one request."""
    return Philox(torch.full((count,), seed), torch.full((count,), 7), torch.arange(count, dtype=torch.int32))


def frequencies_fit(outcomes: list, expected: dict) -> bool:
    """Whether a chi-square accepts that `outcomes` follow the law `expected`; what has no probability never came."""
    observed = dict.fromkeys(expected, 0)
    for outcome in outcomes:
        observed[outcome] += 1
    kept = [key for key, chance in expected.items() if chance > 0]
    assert sum(observed[key] for key in kept) == len(outcomes)
    return chisquare([observed[k] for k in kept], [expected[k] * len(outcomes) for k in kept]).pvalue > LIMIT


def plackett_luce(q: dict, k: int) -> dict:
    law = {}
    for order in itertools.permutations(q, k):
        chance, left = 1.0, 1.0
        for item in order:
            chance, left = chance * q[item] / left if left > 1e-12 else 0.0, left - q[item]
        law[order] = chance
    return law


def test_eagle2_equals_sorting_everything():
    generator = torch.Generator().manual_seed(3)
    batch, k, width, depth = 3, 4, 3, 4
    state, reference = None, [[] for _ in range(batch)]  # (score, parent candidate, token)
    frontier = [[-1]] * batch
    for level in range(depth):
        m = 1 if level == 0 else width
        tokens = torch.randint(0, 50, (batch, m, k), generator=generator, dtype=torch.int32)
        # Few different values, so that there are ties, and probability 1, where child and parent tie.
        logprobs = -torch.randint(0, 3, (batch, m, k), generator=generator).float() / 2
        if level == 2:
            tokens[0, 1, 2] = -1
        state = trees.eagle2_expand(state, tokens, logprobs, width)
        for b, nodes in enumerate(reference):
            first = len(nodes)
            for slot, parent in enumerate(frontier[b]):
                for rank in range(k):
                    score = (0.0 if parent < 0 else nodes[parent][0]) + float(logprobs[b, slot, rank])
                    token = int(tokens[b, slot, rank])
                    nodes.append((score if token >= 0 else -math.inf, parent, token))
            order = sorted(range(first, len(nodes)), key=lambda i: (-nodes[i][0], i))
            frontier[b] = order[:width]
            assert state.frontier[b].tolist() == frontier[b]
            assert state.slots[b].tolist() == [(i - first) // k for i in frontier[b]]
    roots = ints([90, 91, 92])
    for nodes in (1, 2, 9, 20, 1000):
        tree, picked = trees.eagle2_select(state, roots, nodes)
        size = min(nodes, len(reference[0]) + 1)
        assert tree.max_nodes == size and tree.max_depth == depth
        for b, candidates in enumerate(reference):
            best = sorted(range(len(candidates)), key=lambda i: (-candidates[i][0], i))[: size - 1]
            best.sort()
            assert picked[b].tolist() == best
            first = b * size
            assert tree.tokens[first : first + size].tolist() == [90 + b, *(candidates[i][2] for i in best)]
            place = {-1: 0} | {i: n + 1 for n, i in enumerate(best)}
            assert tree.parents[first + 1 : first + size].tolist() == [place[candidates[i][1]] for i in best]
        assert int(tree.depths().max()) <= depth
    grown = state.frontier_tree(roots)
    assert grown.max_nodes == 1 + depth * width
    assert grown.tokens.view(batch, -1)[:, -width:].equal(state.tokens.gather(1, state.frontier))
    assert grown.depths().view(batch, -1)[:, -width:].eq(depth).all()


def test_eagle2_names_bad_arguments():
    tokens, logprobs = torch.zeros(2, 1, 3, dtype=torch.int32), torch.zeros(2, 1, 3)
    with pytest.raises(ValueError, match=r"tokens: expected shape \[B=2, m=1, k=3\], got \[2, 2, 3\]|m=1"):
        trees.eagle2_expand(None, tokens.expand(2, 2, 3), logprobs, 2)
    with pytest.raises(ValueError, match=r"logprobs: expected shape \[B=2, m=1, k=3\], got \[2, 1, 2\]"):
        trees.eagle2_expand(None, tokens, logprobs[..., :2], 2)
    state = trees.eagle2_expand(None, tokens, logprobs, 2)
    with pytest.raises(ValueError, match=r"tokens: expected shape \[B=2, m=2, k\], got \[2, 1, 3\]"):
        trees.eagle2_expand(state, tokens, logprobs, 2)
    with pytest.raises(ValueError, match="nodes: expected >= 1, got 0"):
        trees.eagle2_select(state, ints([0, 0]), 0)


def test_gumbel_rows_are_gumbels():
    seed, offset, row = torch.tensor([5, -(2**62) + 3]), torch.tensor([0, 2**33]), ints([4, 5])
    ids = torch.arange(111)
    want = philox.gumbels(seed[:, None], offset[:, None], row[:, None], ids)
    assert philox.gumbel_rows(seed, offset, row, 111).equal(want)


@pytest.mark.parametrize("temperature", [1.0, 0.5, "per row"])
@pytest.mark.parametrize("compact", [False, True])
def test_gumbel_top_k_is_plackett_luce(temperature, compact, device):
    trials = 20_000
    logits = torch.tensor([0.3, -1.0, float("-inf"), 1.2])
    vocab = ints([2, 3, 40, 77]) if compact else None
    t = torch.full((trials,), 0.7) if temperature == "per row" else temperature
    q = torch.softmax(logits.double() / (0.7 if temperature == "per row" else temperature), 0)
    ids = vocab.tolist() if compact else range(4)
    tokens = trees.gumbel_top_k(
        logits.expand(trials, 4).to(device),
        2,
        Philox(*(value.to(device) for value in rows_of(trials, seed=11))),
        temperature=t.to(device) if temperature == "per row" else t,
        draft_vocab=vocab.to(device) if compact else None,
    )
    law = plackett_luce({i: float(chance) for i, chance in zip(ids, q, strict=True)}, 2)
    assert frequencies_fit([tuple(pair) for pair in tokens.tolist()], law)


def test_gumbel_top_k_pads_ranks_and_breaks_ties():
    logits = torch.tensor([[1.0, 2.0, 2.0, float("-inf")], [0.0, -0.0, 0.0, -3.0]])
    rng = rows_of(2)
    assert trees.gumbel_top_k(logits, 6, rng, temperature=0.0).tolist() == [[1, 2, 0, -1, -1, -1], [0, 1, 2, 3, -1, -1]]
    drawn = trees.gumbel_top_k(logits, 4, rng)
    assert sorted(drawn[0].tolist()) == [-1, 0, 1, 2] and sorted(drawn[1].tolist()) == [0, 1, 2, 3]
    assert trees.gumbel_top_k(logits[:0], 2, rows_of(0)).shape == (0, 2)


def test_gumbel_top_k_and_head_sample_agree():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 16, generator=generator), torch.randn(500, 16, generator=generator)
    rows = torch.arange(0, 500, 3, dtype=torch.int32)
    rng = rows_of(6, seed=2**40 + 1)
    for chosen in (None, rows):
        drawn = head.head_sample(
            hidden, weight, 8, rng=rng, rows=chosen, temperature=0.8, return_logits=True, backend="reference"
        )
        again = trees.gumbel_top_k(drawn.all_logits, 8, rng, temperature=0.8, draft_vocab=chosen)
        assert again.equal(drawn.tokens)


def test_draws_depend_on_their_row_alone():
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(1))
    rng = rows_of(5)
    order = torch.tensor([3, 0, 4])
    part = Philox(*(value[order] for value in rng))
    assert trees.gumbel_top_k(logits, 4, rng)[order].equal(trees.gumbel_top_k(logits[order], 4, part))
    assert trees.iid_children(logits, 4, rng)[0][order].equal(trees.iid_children(logits[order], 4, part)[0])


def test_iid_children_are_independent_draws():
    trials, logits = 20_000, torch.tensor([0.3, float("-inf"), 1.2])
    q = torch.softmax(logits.double(), 0).tolist()
    tokens, counts = trees.iid_children(logits.expand(trials, 3), 3, rows_of(trials, seed=5))
    assert counts is None
    law = {order: q[order[0]] * q[order[1]] * q[order[2]] for order in itertools.product(range(3), repeat=3)}
    assert frequencies_fit([tuple(row) for row in tokens.tolist()], law)
    merged, counts = trees.iid_children(logits.expand(trials, 3), 3, rows_of(trials, seed=5), merge=True)
    for raw, row, hits in zip(tokens[:200].tolist(), merged[:200].tolist(), counts[:200].tolist(), strict=True):
        first = [token if token not in raw[:i] else -1 for i, token in enumerate(raw)]
        assert row == first and hits == [raw.count(t) if t >= 0 else 0 for t in first]


def test_iid_children_edges():
    logits = torch.tensor([[0.0, 5.0, 5.0], [float("-inf")] * 3])
    tokens, _ = trees.iid_children(logits, 2, rows_of(2), temperature=0.0, draft_vocab=ints([4, 6, 9]))
    assert tokens[0].tolist() == [6, 6]
    assert trees.iid_children(logits, 2, rows_of(2))[0][1].tolist() == [-1, -1]


@pytest.mark.parametrize("width", [2, 3])
def test_stochastic_beam_search_draws_leaves_without_replacement(width):
    trials = 20_000
    generator = torch.Generator().manual_seed(8)
    first, second = torch.randn(3, generator=generator), torch.randn(3, 3, generator=generator)
    second[1, 2] = float("-inf")
    rng = Philox(torch.arange(trials), torch.full((trials,), 3))
    beam = trees.Beam.start(torch.zeros(trials, dtype=torch.int32))
    beam = trees.beam_expand(beam, first.expand(trials, 1, 3), width, rng)
    beam = trees.beam_expand(beam, second[beam.tokens[:, 1:].long()], width, rng)
    chance = (torch.softmax(first.double(), 0)[:, None] * torch.softmax(second.double(), 1)).tolist()
    law = plackett_luce({(a, b): chance[a][b] for a in range(3) for b in range(3)}, width)
    above = beam.tokens.gather(1, beam.parents[:, -width:].long())
    leaves = torch.stack([above, beam.tokens[:, -width:]], 2).tolist()
    assert frequencies_fit([tuple(map(tuple, row)) for row in leaves], law)
    # The path's log-probability is what it says, and keys fall.
    path = torch.tensor(chance, dtype=torch.float64).log()[above.long(), beam.tokens[:, -width:].long()]
    torch.testing.assert_close(beam.logprobs, path, atol=1e-5, rtol=0)
    assert (beam.keys.diff(dim=1) <= 0).all() and (beam.keys[:, 0] == 0).all()
    tree = beam.tree()
    assert tree.max_depth == 2 and tree.depths().view(trials, -1)[0].tolist() == [0] + [1] * width + [2] * width


def test_beam_search_at_temperature_zero_and_with_dead_ends():
    roots = ints([5])
    rng = Philox(torch.tensor([1]), torch.tensor([0]))
    logits = torch.tensor([[[0.0, 2.0, 1.0]]])
    beam = trees.beam_expand(trees.Beam.start(roots), logits, 2, rng, temperature=0.0, draft_vocab=ints([3, 6, 8]))
    assert beam.tokens.tolist() == [[5, 6, 8]]
    dead = torch.tensor([[[float("-inf"), 0.0, float("-inf")], [float("nan")] * 3]])
    beam = trees.beam_expand(beam, dead, 3, rng)
    assert beam.tokens.tolist() == [[5, 6, 8, 1, -1, -1]] and beam.parents[0, 3] == 1
    wide = trees.beam_expand(trees.Beam.start(roots), logits, 9, rng)
    assert sorted(wide.tokens[0, 1:].tolist()) == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "logits: expected dtype float32"),
        ({"logits": torch.zeros(2, 0)}, ValueError, r"logits: expected at least one column, got \[2, 0\]"),
        ({"k": 0}, ValueError, "k: expected >= 1, got 0"),
        ({"rng": None}, TypeError, "rng: expected a Philox, got NoneType"),
        ({"rng": rows_of(3)}, ValueError, r"rng.seed: expected shape \[M=2\], got \[3\]"),
        ({"temperature": -1.0}, ValueError, "temperature: expected a finite number >= 0, got -1.0"),
        ({"temperature": "hot"}, TypeError, "temperature: expected a number or a tensor, got str"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature: expected shape \[M=2\], got \[3\]"),
        ({"draft_vocab": ints([1, 2])}, ValueError, r"draft_vocab: expected shape \[V=3\], got \[2\]"),
    ],
)
def test_draws_name_bad_arguments(change, error, message):
    arguments = {"logits": torch.zeros(2, 3), "k": 2, "rng": rows_of(2), **change}
    for draw in (trees.gumbel_top_k, trees.iid_children):
        with pytest.raises(error, match=message):
            draw(**arguments)


def test_debug_checks_read_temperatures(monkeypatch):
    monkeypatch.setattr("specdec_kernels.tree_growth.DEBUG", True)
    with pytest.raises(ValueError, match=r"temperature: expected numbers >= 0, got -1.0 at index 1"):
        trees.gumbel_top_k(torch.zeros(2, 3), 1, rows_of(2), temperature=torch.tensor([0.0, -1.0]))


def test_draws_from_ids_that_are_no_ids_are_no_drafts():
    for draw in (trees.gumbel_top_k, lambda *a, **kw: trees.iid_children(*a, **kw)[0]):
        tokens = draw(torch.zeros(2, 3), 3, rows_of(2), draft_vocab=ints([5, -2, 5]))
        assert set(tokens.flatten().tolist()) <= {-1, 5}


def test_beam_names_bad_arguments():
    beam = trees.Beam.start(ints([1, 2]))
    rng = Philox(torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(TypeError, match="rng: expected a Philox, got tuple"):
        trees.beam_expand(beam, torch.zeros(2, 1, 3), 2, (1, 2))
    with pytest.raises(TypeError, match="beam: expected a Beam, got NoneType"):
        trees.beam_expand(None, torch.zeros(2, 1, 3), 2, rng)
    with pytest.raises(ValueError, match=r"rng.row: expected None, the node index takes its place"):
        trees.beam_expand(beam, torch.zeros(2, 1, 3), 2, rng._replace(row=ints([0, 1])))
    with pytest.raises(ValueError, match=r"logits: expected \[B, m\] = \[2, 1\] rows, got \[2, 2, 3\]"):
        trees.beam_expand(beam, torch.zeros(2, 2, 3), 2, rng)
    with pytest.raises(ValueError, match="width: expected >= 1, got 0"):
        trees.beam_expand(beam, torch.zeros(2, 1, 3), 0, rng)
