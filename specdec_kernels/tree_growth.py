"""Trees that grow while the drafter runs: draws with and without replacement, stochastic beam search, EAGLE-2.

Part of the `trees` family; import these names from `specdec_kernels.trees`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import DEBUG, INT32, INT64, REFERENCE_FLOATS, check_draft_vocab, check_int, check_tensor, check_values
from .reference import trees as reference
from .tree_shapes import rectangular
from .types import DraftTree, Philox


def _check_draws(logits: Tensor, k: int, rng: Philox, temperature, draft_vocab, shape: str, rows: str) -> tuple:
    """Check what the drawing functions share; returns (seed, offset, row) of each row, row 0 by default."""
    sizes: dict[str, int] = {}
    check_tensor("logits", logits, sizes, shape, REFERENCE_FLOATS)
    device = logits.device
    if sizes["V"] < 1:
        raise ValueError(f"logits: expected at least one column, got {list(logits.shape)}")
    check_int("k" if rows == "M" else "width", k, 1)
    _check_philox(rng)
    check_tensor("rng.seed", rng.seed, sizes, rows, INT64, device)
    check_tensor("rng.offset", rng.offset, sizes, rows, INT64, device)
    if rng.row is not None:
        check_tensor("rng.row", rng.row, sizes, rows, INT32, device)
    if isinstance(temperature, Tensor):
        check_tensor("temperature", temperature, sizes, rows, REFERENCE_FLOATS, device)
        if DEBUG:
            check_values("temperature", temperature >= 0, temperature, "numbers >= 0")
    elif isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature: expected a number or a tensor, got {type(temperature).__name__}")
    elif not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: expected a finite number >= 0, got {temperature}")
    if draft_vocab is not None:
        check_tensor("draft_vocab", draft_vocab, sizes, "V", INT32, device)
        if DEBUG:
            check_draft_vocab(draft_vocab)
    return rng.seed, rng.offset, torch.zeros_like(rng.seed) if rng.row is None else rng.row


def _check_philox(rng) -> None:
    if not isinstance(rng, Philox):
        raise TypeError(f"rng: expected a Philox, got {type(rng).__name__}")


def gumbel_top_k(
    logits: Tensor, k: int, rng: Philox, *, temperature: float | Tensor = 1.0, draft_vocab: Tensor | None = None
) -> Tensor:
    """Draw k tokens of each row without replacement, in draw order (Gumbel-Top-k, Kool et al., arXiv 1903.06059).

    The children of one node of an RSD-C tree (2402.14160), to be verified with `without_replacement` or `traversal`.
    The noise is keyed by target vocabulary id, so `head_sample` draws the same tokens from the same rows. To filter,
    set logits to -inf and verify with the same filtered logits.

    Args:
        logits: [M, V] or, with `draft_vocab`, [M, R]; fp32, bf16, fp16 or fp64.
        k: draws from each row.
        rng: seed, offset and row, [M] each. Rows of one request and one round need different `row`s: pass the node
            index. Two rows with equal numbers get the same noise.
        temperature: number or [M] tensor; 0 ranks the logits themselves.
        draft_vocab: [R] int32, ascending target ids of the columns; a negative one is no draft, -1.

    Returns:
        [M, k] int32 target ids; -1 where fewer than k tokens have a probability. Ties go to the lowest id.

    Raises:
        TypeError, ValueError: an argument that does not fit. Values of `draft_vocab` and tensor temperatures are
            checked under SPECDEC_DEBUG=1.
    """
    rows = _check_draws(logits, k, rng, temperature, draft_vocab, "M V", "M")
    return reference.gumbel_top_k(logits, k, rows, temperature, draft_vocab)


def iid_children(
    logits: Tensor,
    k: int,
    rng: Philox,
    *,
    temperature: float | Tensor = 1.0,
    draft_vocab: Tensor | None = None,
    merge: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Draw k tokens of each row independently: the children of one node for `multi_round`, `k_seq` and `traversal_iid`.

    Args:
        logits, k, rng, temperature, draft_vocab: as for `gumbel_top_k`; draw j takes column j of the stream DRAFT.
        merge: make repeats -1 and count them, for `DraftTree.counts`.

    Returns:
        [M, k] int32 target ids, -1 for a row without a distribution; with `merge` also [M, k] int32, how often each
        token was drawn, 0 at -1, else None.
    """
    rows = _check_draws(logits, k, rng, temperature, draft_vocab, "M V", "M")
    tokens = reference.iid_children(logits, k, rows, temperature, draft_vocab)
    return reference.merged_counts(tokens) if merge else (tokens, None)


class Beam(NamedTuple):
    """The nodes of a stochastic beam search so far; the beam is the last `logprobs.shape[1]` nodes of each tree."""

    tokens: Tensor  # [B, n] int32, the root first
    parents: Tensor  # [B, n] int32
    logprobs: Tensor  # [B, m] fp64, log-probability of the path to each node of the beam
    keys: Tensor  # [B, m] fp64, the same perturbed by a Gumbel that its parent's truncates; descending
    depth: int

    @classmethod
    def start(cls, roots: Tensor) -> Beam:
        """The beam that holds the roots [B] int32 alone."""
        check_tensor("roots", roots, {}, "B", INT32)
        zero = torch.zeros(len(roots), 1, dtype=torch.float64, device=roots.device)
        return cls(roots[:, None], torch.full_like(roots, -1)[:, None], zero, zero, 0)

    def tree(self) -> DraftTree:
        """The batch of trees; row i of `draft_logits` is what node i was expanded from."""
        return rectangular(self.tokens, self.parents, self.depth)


def beam_expand(
    beam: Beam,
    logits: Tensor,
    width: int,
    rng: Philox,
    *,
    temperature: float | Tensor = 1.0,
    draft_vocab: Tensor | None = None,
) -> Beam:
    """Add a level to RSD-S trees: the `width` best children by stochastic beam search (arXiv 2402.14160, 1903.06059).

    The beam is a draw of `width` different paths without replacement, and siblings stand in draw order, so the trees
    are verified with `without_replacement` or `traversal`.

    Args:
        beam: `Beam.start(roots)`, or the beam so far.
        logits: [B, m, V] or, with `draft_vocab`, [B, m, R]: one row for each node of the beam.
        width: nodes of the new level.
        rng: seed and offset [B]; `row` must be None, the node index takes its place.
        temperature: number or [B] tensor; 0 is plain beam search.
        draft_vocab: [R] int32, ascending target ids of the columns.

    Returns:
        The beam with min(width, m * columns) nodes more; a node without probability has token -1.

    Raises:
        TypeError, ValueError: an argument that does not fit.
    """
    if not isinstance(beam, Beam):
        raise TypeError(f"beam: expected a Beam, got {type(beam).__name__}")
    _check_philox(rng)
    if rng.row is not None:
        raise ValueError("rng.row: expected None, the node index takes its place")
    seed, offset, _ = _check_draws(logits, width, rng, temperature, draft_vocab, "B m V", "B")
    if logits.shape[:2] != beam.logprobs.shape:
        raise ValueError(f"logits: expected [B, m] = {list(beam.logprobs.shape)} rows, got {list(logits.shape)}")
    batch, m = beam.logprobs.shape
    nodes = beam.tokens.shape[1]
    row = torch.arange(nodes - m, nodes, device=logits.device).expand(batch, m).reshape(-1)
    if isinstance(temperature, Tensor):
        temperature = temperature.repeat_interleave(m)
    rows = (seed.repeat_interleave(m), offset.repeat_interleave(m), row)
    tokens, slots, logprobs, keys = reference.beam_step(
        logits, beam.logprobs, beam.keys, rows, width, temperature, draft_vocab
    )
    return Beam(
        torch.cat([beam.tokens, tokens], 1),
        torch.cat([beam.parents, (slots + nodes - m).to(torch.int32)], 1),
        logprobs,
        keys,
        beam.depth + 1,
    )


class Candidates(NamedTuple):
    """The nodes that an EAGLE-2 drafter has scored so far; candidate -1 is the root."""

    tokens: Tensor  # [B, C] int32
    parents: Tensor  # [B, C] int64, candidate that each hangs on
    scores: Tensor  # [B, C] fp32, log-probability of the path
    expanded: Tensor  # [B, E] int64, candidates picked for expansion so far, level after level
    frontier: Tensor  # [B, m] int64, candidates to expand next, best first
    slots: Tensor  # [B, m] int64, which row of the last expansion each of them came from
    depth: int

    def frontier_tree(self, roots: Tensor) -> DraftTree:
        """Trees of the roots and all candidates picked for expansion: what a drafter has in its cache.

        The last m nodes of each tree are the frontier, in its order.
        """
        return rectangular(*reference.packed(self.tokens, self.parents, roots, self.expanded), self.depth)


def eagle2_expand(candidates: Candidates | None, tokens: Tensor, logprobs: Tensor, width: int) -> Candidates:
    """Add a level to EAGLE-2 trees (Li et al., arXiv 2406.16858, section 4.1) and pick the nodes to expand next.

    Args:
        candidates: the result for the level before; None at the root.
        tokens: [B, m, k] int32, the best tokens below each node of the frontier (m = 1 at the root), best first.
        logprobs: [B, m, k] fp32, their log-probabilities, e.g. `head_topk`'s logits - lse.
        width: nodes to expand next, those with the largest log-probability of the whole path; ties go to the
            candidate that came first.

    Returns:
        Candidates with m * k more of them and a frontier of min(width, m * k). A token of -1 scores -inf.

    Raises:
        TypeError, ValueError: an argument that does not fit.
    """
    check_int("width", width, 1)
    sizes = {"m": 1}
    if candidates is not None:
        sizes = dict(zip("Bm", candidates.frontier.shape, strict=True))
    check_tensor("tokens", tokens, sizes, "B m k", INT32)
    check_tensor("logprobs", logprobs, sizes, "B m k", REFERENCE_FLOATS, tokens.device)
    batch, _, k = tokens.shape
    if candidates is None:
        none = tokens.new_empty((batch, 0), dtype=torch.int64)
        root = tokens.new_full((batch, 1), -1, dtype=torch.int64)
        above = torch.zeros(batch, 1, device=tokens.device)
        candidates = Candidates(tokens.new_empty((batch, 0)), none, above[:, :0], none, root, root, 0)
    else:
        above = candidates.scores.gather(1, candidates.frontier)
    scores = above[:, :, None] + logprobs.to(torch.float32)
    scores = scores.masked_fill((tokens < 0) | scores.isnan(), float("-inf")).flatten(1)
    _, best = reference.ranked_rows(scores, width)
    frontier = best + candidates.tokens.shape[1]
    return Candidates(
        torch.cat([candidates.tokens, tokens.flatten(1)], 1),
        torch.cat([candidates.parents, candidates.frontier.repeat_interleave(k, 1)], 1),
        torch.cat([candidates.scores, scores], 1),
        torch.cat([candidates.expanded, frontier], 1),
        frontier,
        best // k,
        candidates.depth + 1,
    )


def eagle2_select(candidates: Candidates, roots: Tensor, nodes: int) -> tuple[DraftTree, Tensor]:
    """Keep the best candidates of all levels (EAGLE-2's reranking, arXiv 2406.16858, section 4.2).

    A child never scores above its parent and comes after it, so what is kept is a tree. Its siblings are a function of
    the context: verify with `target_only` or `greedy`.

    Args:
        candidates: all levels.
        roots: [B] int32, last committed tokens.
        nodes: nodes of each tree, root included.

    Returns:
        Trees of min(nodes, C + 1) nodes, level after level, siblings best first; and picked [B, nodes - 1] int64, the
        candidate that each node below the root was.
    """
    check_int("nodes", nodes, 1)
    check_tensor("roots", roots, {"B": len(candidates.tokens)}, "B", INT32, candidates.tokens.device)
    picked = reference.ranked_rows(candidates.scores, nodes - 1)[1].sort(1).values
    tokens, parents = reference.packed(candidates.tokens, candidates.parents, roots, picked)
    return rectangular(tokens, parents, candidates.depth), picked
