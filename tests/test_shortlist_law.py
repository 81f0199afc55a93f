"""Output of trees that were drafted over shortlists has the target's law, however q reaches verification."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from scipy.stats import chi2

import specdec_kernels as sk
from head_cases import BACKENDS

INF = float("inf")
VOCABULARY, TRIALS = 20, 40_000


class Level(NamedTuple):
    """What one level of the trees was drawn from."""

    logits: torch.Tensor  # [n, R] of the op
    lists: sk.Shortlist
    whole: torch.Tensor  # [n, V], what the op would have seen without lists


class Drafts(NamedTuple):
    """Trees over shortlists: a root with two children, each with two; the lists of the two levels differ."""

    tree: sk.DraftTree
    target: torch.Tensor  # [V, V] logits after each token
    levels: tuple[Level, Level]
    rng: sk.Philox

    def verify(self, draft_logits, backend, part=slice(None), vocab=None):
        """[n, 3] tokens of the requests of `part`; draft_logits: rows of the root and of its two children."""
        tokens = self.tree.tokens.view(-1, 7)[part]
        tree = sk.trees.branching_tree((2, 2)).tree(tokens)
        # Rows of leaves are never read.
        rows = torch.cat([draft_logits, torch.full((len(tokens), 4, draft_logits.shape[2]), float("nan"))], 1)
        rng = sk.Philox(self.rng.seed[part], self.rng.offset[part])
        logits = self.target[tokens.flatten().clamp(min=0).long()]
        method = "without_replacement"
        return sk.verify_tree(
            tree, logits, rows.flatten(0, 1), method=method, draft_vocab=vocab, rng=rng, backend=backend
        ).tokens


def drafts(backend: str, trials: int = TRIALS) -> Drafts:
    """Trees of `trials` requests of one context; a drafter's state is its last token's."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(VOCABULARY, 6, generator=generator)
    states = torch.randn(VOCABULARY, 6, generator=generator)
    target = torch.randn(VOCABULARY, VOCABULARY, generator=generator) + states @ weight.T
    clusters = sk.cluster_rows(weight, 5, always=torch.tensor([4]))
    seed, tokens, levels = torch.arange(trials) + 1, [torch.zeros(trials, 1, dtype=torch.int32)], []
    for nodes in ([0], [1, 2]):
        groups = torch.arange(trials, dtype=torch.int32).repeat_interleave(len(nodes))
        hidden = states[tokens[-1].flatten().long()]
        lists = sk.route(hidden, clusters, 1, row_groups=groups, groups=trials, budget=2)
        stream = seed.repeat_interleave(len(nodes))
        rng = sk.Philox(stream, torch.zeros_like(stream), torch.tensor(nodes, dtype=torch.int32).repeat(trials))
        options = {"rows": lists.rows, "row_groups": groups, "return_logits": True, "backend": backend}
        step = sk.head_sample(hidden, weight, 2, rng=rng, **options)
        tokens.append(step.tokens.view(trials, -1))
        levels.append(Level(step.all_logits, lists, hidden @ weight.T))
    tree = sk.trees.branching_tree((2, 2)).tree(torch.cat(tokens, 1))
    return Drafts(tree, target, tuple(levels), sk.Philox(seed, torch.zeros_like(seed)))


def nodes(level1, level2):
    """[trials, 3, V] rows of the root and its children."""
    return torch.cat([level1[:, None], level2.view(len(level1), 2, -1)], 1)


def p_value(target, tokens):
    """Chi-square of the first two tokens; the second is drawn from the target where the tree gave one only."""
    law = torch.softmax(target.double(), 1)
    first, second = tokens[:, 0].long(), tokens[:, 1].long()
    drawn = torch.multinomial(law[first], 1, generator=torch.Generator().manual_seed(6))[:, 0]
    second = torch.where(second < 0, drawn, second)
    expected = (law[0][:, None] * law).flatten() * len(tokens)
    seen = torch.bincount(first * VOCABULARY + second, minlength=VOCABULARY**2).double()
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    seen = torch.cat([seen[~rare], seen[rare].sum()[None]])
    return float(chi2.sf(float(((seen - expected) ** 2 / expected).sum()), len(expected) - 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_over_shortlists_has_the_targets_law(backend):
    case = drafts(backend)
    q = nodes(*(sk.scatter_logits(level.logits, level.lists, VOCABULARY) for level in case.levels))
    tokens = case.verify(q, backend)
    assert (tokens[:, 1] >= 0).double().mean() > 0.4, "drafts must matter for the test to say anything"
    assert p_value(case.target, tokens) > 1e-4


@pytest.mark.parametrize("mistake", ["the whole head", "the root's list for all"])
def test_the_test_sees_a_wrong_q(mistake):
    case = drafts("reference")
    q = [sk.scatter_logits(level.logits, level.lists, VOCABULARY) for level in case.levels]
    if mistake == "the whole head":
        q = [level.whole for level in case.levels]
    else:
        q[1] = torch.where(q[0].repeat_interleave(2, 0) > -INF, case.levels[1].whole, -INF)
    assert p_value(case.target, case.verify(nodes(*q), "reference")) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_compact_q_decides_as_the_scattered_one(backend):
    """A call for each request over its own two lists: the same tokens, so the same law."""
    case = drafts(backend, 200)
    one, two = case.levels
    wide = nodes(*(sk.scatter_logits(level.logits, level.lists, VOCABULARY) for level in case.levels))
    for i in range(200):
        rows = torch.stack([one.lists.rows[i], two.lists.rows[i]])
        lists = sk.Shortlist(rows, torch.tensor([0, 1, 1], dtype=torch.int32), one.lists.shared)
        logits = torch.cat([one.logits[i : i + 1], two.logits[2 * i : 2 * i + 2]])
        compact, vocab = sk.compact_logits(logits, lists, VOCABULARY)
        assert len(vocab) < VOCABULARY
        part = slice(i, i + 1)
        got = case.verify(compact[None], backend, part, vocab)
        assert torch.equal(got, case.verify(wide[part], backend, part)), i
