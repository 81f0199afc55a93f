"""Trees that are drawn and then verified leave the target's law alone, and the wrong verifier is caught."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare

from specdec_kernels import DraftTree, Philox, trees, verify_tree

LIMIT = 1e-4
VOCABULARY, TRIALS = 4, 60_000


class Model:
    """A next-token law that depends on the last token: logits [V, V], and those of the first token."""

    def __init__(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.first = torch.randn(VOCABULARY, generator=generator)
        self.after = torch.randn(VOCABULARY, VOCABULARY, generator=generator)

    def logits(self, tokens: torch.Tensor, depths: torch.Tensor) -> torch.Tensor:
        return torch.where((depths == 0)[..., None], self.first, self.after[tokens.long().clamp(min=0)])


def streams(row: torch.Tensor | None = None, repeat: int = 1) -> Philox:
    """One request per trial, the seeds far from those of other tests."""
    seed = torch.arange(TRIALS).repeat_interleave(repeat) + 10**9
    return Philox(seed, torch.zeros_like(seed), row)


def beam_trees(drafter: Model) -> DraftTree:
    beam = trees.Beam.start(torch.zeros(TRIALS, dtype=torch.int32))
    for depth in range(2):
        frontier = beam.tokens[:, -beam.logprobs.shape[1] :]
        beam = trees.beam_expand(beam, drafter.logits(frontier, torch.full_like(frontier, depth)), 3, streams())
    return beam.tree()


def branching_trees(drafter: Model, draw) -> DraftTree:
    shape = trees.branching_tree([2, 2])
    tokens = torch.zeros(TRIALS, shape.nodes, dtype=torch.int32)
    for depth, level in enumerate(shape.levels()):
        nodes = len(level.expand)
        logits = drafter.logits(tokens[:, level.expand], torch.full((TRIALS, nodes), depth)).flatten(0, 1)
        rng = streams(level.expand.to(torch.int32).repeat(TRIALS), nodes)
        tokens[:, level.nodes] = draw(logits, level.draws, rng).view(TRIALS, nodes, -1)[:, level.slots, level.ranks]
    return shape.tree(tokens)


def without_replacement(drafter: Model) -> DraftTree:
    return branching_trees(drafter, trees.gumbel_top_k)


def independent(drafter: Model) -> DraftTree:
    return branching_trees(drafter, lambda *arguments: trees.iid_children(*arguments)[0])


def merged(drafter: Model) -> DraftTree:
    return trees.merge_trees([independent(drafter)], draws=True)[0]


def law_of_two_tokens(make, method: str) -> tuple[float, float]:
    """(p-value of the first two output tokens against the target's law, mean tokens of a round)."""
    drafter, target = Model(1), Model(2)
    tree = make(drafter)
    depths = tree.depths()
    result = verify_tree(
        tree, target.logits(tree.tokens, depths), drafter.logits(tree.tokens, depths), method=method, rng=streams()
    )
    torch.manual_seed(0)
    one = result.tokens[:, 0].long()
    # Where the round ended after one token the target goes on by itself.
    alone = torch.multinomial(torch.softmax(target.after, 1)[one], 1)[:, 0]
    two = torch.where(result.num_tokens > 1, result.tokens[:, 1].long(), alone)
    observed = torch.bincount(one * VOCABULARY + two, minlength=VOCABULARY**2)
    expected = torch.softmax(target.first.double(), 0)[:, None] * torch.softmax(target.after.double(), 1)
    return chisquare(observed.numpy(), expected.flatten().numpy() * TRIALS).pvalue, result.num_tokens.double().mean()


@pytest.mark.parametrize(
    ("make", "method"),
    [
        (without_replacement, "without_replacement"),
        (without_replacement, "traversal"),
        (beam_trees, "without_replacement"),
        (beam_trees, "traversal"),
        (independent, "multi_round"),
        (independent, "k_seq"),
        (independent, "traversal_iid"),
        (merged, "multi_round"),
        (merged, "k_seq"),
    ],
)
def test_matching_verifiers_keep_the_law(make, method):
    chance, tokens = law_of_two_tokens(make, method)
    assert chance > LIMIT
    assert tokens > 1.5  # and something was accepted


@pytest.mark.parametrize(
    ("make", "method"),
    [(without_replacement, "multi_round"), (independent, "without_replacement"), (beam_trees, "multi_round")],
)
def test_other_verifiers_are_caught(make, method):
    assert law_of_two_tokens(make, method)[0] < LIMIT
