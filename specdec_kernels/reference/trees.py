"""Draft trees in plain PyTorch: where each node stands, and how trees are drawn and grown."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import philox


def tree_layout(
    parents: Tensor, cu_nodes: Tensor, max_nodes: int, prefix_lens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Depths, ancestor bits, positions. After round t of pointer doubling a node has its next 2^t ancestors.

    Nothing here depends on values the host would have to read. A parent that does not come before its child counts as
    the node before it, so every walk ends; rows that cu_nodes gives to no tree (padding) hold harmless numbers.
    """
    nodes = parents.shape[0]
    cu_nodes = bounded(cu_nodes, nodes)
    index = torch.arange(nodes, device=parents.device)
    tree = torch.searchsorted(cu_nodes, index.to(cu_nodes.dtype), right=True) - 1
    starts = cu_nodes.long()[tree.clamp(min=0)]
    local = index - starts
    parents = torch.minimum(parents.long(), local - 1)
    is_root = parents < 0
    jump = torch.where(is_root, index, starts + parents)
    depths = (~is_root).to(torch.int32)
    word = torch.arange((max_nodes + 63) // 64, device=parents.device)
    own = torch.ones_like(local) << (local & 63)
    bits = torch.where(local[:, None] >> 6 == word, own[:, None], 0)
    for _ in range((max_nodes - 1).bit_length()):
        depths = depths + depths[jump]
        bits = bits | bits[jump]
        jump = jump[jump]
    positions = depths.clone()
    if prefix_lens is not None and len(prefix_lens):
        positions += torch.where(tree < len(prefix_lens), prefix_lens[tree.clamp(0, len(prefix_lens) - 1)], 0)
    return depths, bits, positions


def bounded(cu_nodes: Tensor, nodes: int) -> Tensor:
    """`cu_nodes` made ascending and kept in 0..nodes, so that nothing that is indexed with it leaves its tensor."""
    return cu_nodes.clamp(0, nodes).cummax(0).values


def ranked(keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, columns) [M, k] of the k largest `keys` [M, R] fp32, lowest column first among equals; k <= R.

    Keys and columns are packed into one integer of which no two are equal, so that no sort's order shows.
    """
    code = (keys + 0.0).view(torch.int32).to(torch.int64)  # + 0.0: -0 is 0
    code = torch.where(code < 0, code ^ 0x7FFFFFFF, code)
    column = torch.arange(keys.shape[1], device=keys.device)
    columns = (code * 2**32 - column).topk(k, dim=1).values.neg() & 0xFFFFFFFF
    return keys.gather(1, columns), columns


def _scaled(logits: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """(logits / temperature in fp32 [M, R] up to a number a row, whether a row is random [M, 1]); 0 divides by 1.

    The peak is taken off first: near temperature 0 a quotient of large numbers is too coarse for the noise to come.
    """
    if not isinstance(temperature, Tensor):
        temperature = torch.full(logits.shape[:1], temperature, dtype=torch.float32, device=logits.device)
    warm = (temperature > 0)[:, None]
    logits = logits.to(torch.float32)
    if logits.shape[1]:
        peak = logits.amax(1, keepdim=True)
        logits = logits - torch.where(peak.isfinite(), peak, 0.0)
    return logits / torch.where(warm, temperature.to(torch.float32)[:, None], 1.0), warm


def _noise(rng: tuple[Tensor, Tensor, Tensor], columns: int, draft_vocab: Tensor | None) -> Tensor:
    seed, offset, row = rng
    if draft_vocab is None:
        return philox.gumbel_rows(seed, offset, row, columns)
    return philox.gumbels(seed[:, None], offset[:, None], row[:, None], draft_vocab)


def _ids(columns: Tensor, known: Tensor, draft_vocab: Tensor | None, k: int) -> Tensor:
    """[M, k] int32 target ids of `columns`; -1 where not `known` or negative and behind the last column."""
    ids = columns if draft_vocab is None else draft_vocab[columns]
    ids = torch.where(known & (ids >= 0), ids.to(torch.int32), -1)
    return torch.nn.functional.pad(ids, (0, k - ids.shape[1]), value=-1)


def gumbel_top_k(logits: Tensor, k: int, rng, temperature, draft_vocab: Tensor | None) -> Tensor:
    """[M, k] int32: the k largest of logits / temperature + Gumbel noise, in descending order."""
    scaled, warm = _scaled(logits, temperature)
    keys = torch.where(warm, scaled + _noise(rng, logits.shape[1], draft_vocab), logits.to(torch.float32))
    keys, columns = ranked(keys, min(k, logits.shape[1]))
    return _ids(columns, keys > float("-inf"), draft_vocab, k)


def iid_children(logits: Tensor, k: int, rng, temperature, draft_vocab: Tensor | None) -> Tensor:
    """[M, k] int32: k draws of the softmax by inverse CDF in vocabulary order, one coin each."""
    scaled, warm = _scaled(logits, temperature)
    mass = torch.softmax(scaled, 1, dtype=torch.float64)
    greedy = torch.zeros_like(mass).scatter(1, scaled.argmax(1, keepdim=True), 1.0)
    cdf = torch.where(warm, mass, greedy).cumsum(1)
    seed, offset, row = rng
    u = philox.coins(seed[:, None], offset[:, None], philox.DRAFT, row[:, None], torch.arange(k, device=logits.device))
    columns = torch.searchsorted(cdf, u.double() * cdf[:, -1:], right=True).clamp(max=logits.shape[1] - 1)
    return _ids(columns, (cdf[:, -1:] > 0).expand(columns.shape), draft_vocab, k)


def merged_counts(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Draws [M, k] with repeats made -1, and how often each token that is left was drawn (0 at -1)."""
    equal = (tokens[:, :, None] == tokens[:, None, :]) & (tokens >= 0)[:, :, None]
    first = ~equal.tril(-1).any(2) & (tokens >= 0)
    return torch.where(first, tokens, -1), torch.where(first, equal.sum(2), 0).to(torch.int32)


def beam_step(
    logits: Tensor, logprobs: Tensor, keys: Tensor, rng, width: int, temperature, draft_vocab: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One level of stochastic beam search (Kool et al., arXiv 1903.06059, Algorithm 1 and appendix B.3).

    Args:
        logits: [B, m, R] of the m beam nodes.
        logprobs: [B, m] fp64, phi: log-probability of the path to each node.
        keys: [B, m] fp64, G: its perturbed log-probability.
        rng: seeds, offsets, rows, each [B * m].

    Returns:
        tokens [B, w] int32, their parents' places in the beam, logprobs and keys of the w best children, keys
        descending; w = min(width, m * R).
    """
    batch, beam, columns = logits.shape
    scaled, warm = _scaled(logits.flatten(0, 1), temperature)
    phi = logprobs.reshape(-1, 1) + torch.log_softmax(scaled, 1)
    phi = phi.masked_fill(phi.isnan(), -torch.inf)
    noisy = torch.where(warm, phi + _noise(rng, columns, draft_vocab), phi).to(torch.float32)
    # Within one parent the truncation below is monotone, so only its best children can survive.
    near, near_columns = ranked(noisy, min(width, columns))
    phi, near = phi.gather(1, near_columns), near.double()
    # Shift the children's Gumbels so that their maximum is the parent's own key.
    ceiling, top = keys.reshape(-1, 1), near[:, :1]
    gap = ceiling - near + _log1mexp(near - top)
    shifted = ceiling - gap.clamp(min=0) - torch.log1p(torch.exp(-gap.abs()))
    shifted = torch.where(near > -torch.inf, torch.where(warm, shifted, phi), -torch.inf)

    best, place = ranked_rows(shifted.view(batch, -1), min(width, beam * near.shape[1]))
    per_beam = near.shape[1]
    chosen = near_columns.view(batch, -1).gather(1, place)
    tokens = _ids(chosen, best > -torch.inf, draft_vocab, chosen.shape[1])
    return tokens, place // per_beam, phi.view(batch, -1).gather(1, place), best


def ranked_rows(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, columns) [B, k] of the k largest of short rows, lowest column first among equals."""
    values, columns = scores.sort(dim=1, descending=True, stable=True)
    return values[:, :k], columns[:, :k]


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, to full precision at both ends (Maechler 2012)."""
    return torch.where(x > -0.6931471805599453, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def packed(tokens: Tensor, parents: Tensor, roots: Tensor, picked: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and parents [B, P + 1] of the trees that `picked` [B, P] candidates make under their roots.

    Args:
        tokens: [B, C] int32 of all candidates.
        parents: [B, C] int64 candidate that each hangs on, -1 = the root; before its children.
        roots: [B] int32.
        picked: [B, P] int64, ascending in depth; the parent of each is picked too.
    """
    batch, count = picked.shape
    place = torch.zeros(batch, tokens.shape[1] + 1, dtype=torch.int32, device=tokens.device)
    order = torch.arange(1, count + 1, dtype=torch.int32, device=tokens.device).expand(batch, count)
    place.scatter_(1, picked + 1, order)
    above = place.gather(1, parents.gather(1, picked) + 1)
    return (
        torch.cat([roots[:, None], tokens.gather(1, picked)], 1),
        torch.cat([torch.full_like(roots, -1)[:, None], above], 1),
    )
