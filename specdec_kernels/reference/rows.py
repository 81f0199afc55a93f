"""Rows of logits as distributions, and draws from them."""

from __future__ import annotations

import torch
from torch import Tensor


class Rows:
    """Rows of `logits` as processed probabilities over the target vocabulary.

    Order: allowed mask -> temperature -> top_k -> top_p (on what top_k left) -> min_p. Ties at a threshold stay in.
    Temperature 0 is a point mass at the largest logit, the lowest id among equals.
    """

    def __init__(self, logits, vocabulary, *, vocab=None, params=None, scalars=(1.0, 0.0, 1.0, 0.0), allowed=None):
        """Rows over a vocabulary of V ids.

        Args:
            logits: [N, V], or [N, R] with `vocab`.
            vocabulary: V.
            vocab: [R] int32 target ids of the columns; probabilities outside are zero.
            params: [B, 4] fp32 temperature, top_k, top_p, min_p of each request; replaces `scalars`.
            scalars: the four numbers for all requests.
            allowed: [N, ceil(V/32)] int32 bit mask over target ids.
        """
        self.logits, self.vocabulary, self.allowed = logits, vocabulary, allowed
        self.dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        self.columns = torch.arange(vocabulary, device=logits.device) if vocab is None else vocab.to(torch.int64)
        self.compact = vocab is not None
        self.params = torch.tensor([scalars], dtype=torch.float32, device=logits.device) if params is None else params

    def probs(self, rows: Tensor, requests: Tensor) -> tuple[Tensor, Tensor]:
        """([M, V] probabilities, [M] whether the row is sound) of `rows` [M] int64, which belong to `requests` [M]."""
        z = self.logits[rows].to(self.dtype)
        if self.allowed is not None:
            words = self.allowed[rows][:, self.columns >> 5]
            z = z.masked_fill((words >> (self.columns & 31).to(torch.int32)) & 1 == 0, -torch.inf)
        sound = ~(z.isnan() | (z == torch.inf)).any(1) & (z > -torch.inf).any(1)
        settings = self.params.expand(max(len(self.params), 1), 4)[requests if len(self.params) > 1 else requests * 0]
        p = _filtered(z, *settings.unsqueeze(2).unbind(1)) if z.shape[1] else z
        if self.compact:
            inside = (self.columns >= 0) & (self.columns < self.vocabulary)
            full = p.new_zeros(len(rows), self.vocabulary)
            p = full.index_copy(1, self.columns[inside], p[:, inside])
        return p, sound


def _filtered(z: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """[M, V] probabilities of logits `z`; the settings are [M, 1] fp32, off at top_k 0, top_p 1, min_p 0."""
    greedy = torch.zeros_like(z).scatter(1, z.argmax(1, keepdim=True), 1.0)
    z = z / torch.where(temperature > 0, temperature, 1.0).to(z.dtype)
    if bool((top_k > 0).any()):
        ranked = z.sort(1, descending=True).values
        kth = ranked.gather(1, (top_k.long() - 1).clamp(0, z.shape[1] - 1))
        z = z.masked_fill((top_k > 0) & (z < kth), -torch.inf)
    if bool((top_p < 1).any()):
        ranked = z.sort(1, descending=True).values
        mass = ranked.softmax(1, dtype=torch.float64).cumsum(1)
        last = (mass < top_p.double()).sum(1, keepdim=True).clamp(max=z.shape[1] - 1)
        z = z.masked_fill((top_p < 1) & (z < ranked.gather(1, last)), -torch.inf)
    peak = z.amax(1, keepdim=True)
    z = z.masked_fill((z - peak).exp() < min_p.to(z.dtype), -torch.inf)
    return torch.where(temperature > 0, z.softmax(1), greedy)


def normalised(mass: Tensor, fallback: Tensor) -> Tensor:
    """`mass` [B, V] divided by its sum. A residual without mass has probability 0; rounding may still reach it."""
    total = mass.sum(1, keepdim=True)
    return torch.where(total > 0, mass / total, fallback)


def draw(mass: Tensor, u: Tensor) -> Tensor:
    """[B] int64: inverse CDF in vocabulary order of unnormalised `mass` [B, V] at `u` [B] in [0, 1)."""
    cdf = mass.double().cumsum(1)
    index = torch.searchsorted(cdf, u.double()[:, None] * cdf[:, -1:], right=True)[:, 0]
    last = mass.shape[1] - 1 - (mass > 0).flip(1).to(torch.int8).argmax(1)
    return torch.minimum(index, last)
