"""Rows of logits as distributions, and draws from them."""

from __future__ import annotations

import torch
from torch import Tensor


class Rows:
    """Rows of `logits` as processed probabilities over the target vocabulary.

    Order: mixing -> allowed mask -> temperature -> top_k -> top_p (on what top_k left) -> min_p. Temperature 0 is a
    point mass at the largest logit, the lowest id among equals. All thresholds are on z = (x - max) / T, difference and
    quotient rounded to fp32 (fp64 for fp64 logits), and what ties with a threshold stays in:
        top_k  keeps z >= the k-th largest z
        top_p  keeps z >= the first z, in descending order, at which the fp64 softmax has summed up to top_p or more
        min_p  keeps z >= log(min_p), compared in fp64
    """

    def __init__(
        self, logits, vocabulary, *, vocab=None, params=None, scalars=(1.0, 0.0, 1.0, 0.0), allowed=None,
        mixed=None, mix=0.0,
    ):  # fmt: skip
        """Rows over a vocabulary of V ids.

        Args:
            logits: [N, V], or [N, R] with `vocab`.
            vocabulary: V.
            vocab: [R] int32 target ids of the columns; probabilities outside are zero.
            params: [B, 4] fp32 temperature, top_k, top_p, min_p of each request; replaces `scalars`.
            scalars: the four numbers for all requests.
            allowed: [N, ceil(V/32)] int32 bit mask over target ids.
            mixed: [N, V] further logits, of which a share `mix` replaces `logits`; None: none.
        """
        self.mixed, self.mix = mixed, mix
        self.logits, self.vocabulary, self.allowed = logits, vocabulary, allowed
        self.dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        self.columns = torch.arange(vocabulary, device=logits.device) if vocab is None else vocab.to(torch.int64)
        self.compact = vocab is not None
        self.params = torch.tensor([scalars], dtype=torch.float32, device=logits.device) if params is None else params

    def _logits(self, rows: Tensor) -> Tensor:
        z = self.logits[rows].to(self.dtype)
        if self.mixed is None:
            return z
        mix = torch.tensor(self.mix, dtype=self.dtype, device=z.device)
        return (1 - mix) * z + mix * self.mixed[rows].to(self.dtype)

    def log_weights(self, rows: Tensor, requests: Tensor) -> tuple[Tensor, Tensor]:
        """([M, V] logarithms of unnormalised probabilities, [M] whether the row is sound) of `rows` [M] int64.

        The rows belong to `requests` [M]. The largest weight is 1. Logarithms, because what is left of a peaked row
        once its peak is taken away has underflowed as probabilities, but not as logarithms.
        """
        z = self._logits(rows)
        if self.allowed is not None:
            words = self.allowed[rows][:, self.columns >> 5]
            z = z.masked_fill((words >> (self.columns & 31).to(torch.int32)) & 1 == 0, -torch.inf)
        sound = ~(z.isnan() | (z == torch.inf)).any(1) & (z > -torch.inf).any(1)
        settings = self.params[requests * 0 if len(self.params) == 1 else requests]
        z = _filtered(z, *settings.unsqueeze(2).unbind(1)) if z.shape[1] else z
        if self.compact:
            inside = (self.columns >= 0) & (self.columns < self.vocabulary)
            full = z.new_full((len(rows), self.vocabulary), -torch.inf)
            z = full.index_copy(1, self.columns[inside], z[:, inside])
        return z, sound

    def probs(self, rows: Tensor, requests: Tensor) -> tuple[Tensor, Tensor]:
        """([M, V] probabilities, [M] whether the row is sound)."""
        z, sound = self.log_weights(rows, requests)
        return z.softmax(1), sound


def _filtered(z: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """[M, V] log weights of logits `z`; the settings are [M, 1] fp32, off at top_k 0, top_p 1, min_p 0."""
    greedy = torch.full_like(z, -torch.inf).scatter(1, z.argmax(1, keepdim=True), 0.0)
    # The peak first: a quotient of large numbers would lose what tells them apart, or overflow.
    z = (z - z.amax(1, keepdim=True)) / torch.where(temperature > 0, temperature, 1.0).to(z.dtype)
    if bool((top_k > 0).any()):
        ranked = z.sort(1, descending=True).values
        kth = ranked.gather(1, (top_k.long() - 1).clamp(0, z.shape[1] - 1))
        z = z.masked_fill((top_k > 0) & (z < kth), -torch.inf)
    if bool((top_p < 1).any()):
        ranked = z.sort(1, descending=True).values
        mass = ranked.softmax(1, dtype=torch.float64).cumsum(1)
        last = (mass < top_p.double()).sum(1, keepdim=True).clamp(max=z.shape[1] - 1)
        z = z.masked_fill((top_p < 1) & (z < ranked.gather(1, last)), -torch.inf)
    z = z.masked_fill(z.double() < min_p.double().log(), -torch.inf)
    return torch.where(temperature > 0, z, greedy)


def without(log_weights: Tensor, token: Tensor, where: Tensor) -> Tensor:
    """`log_weights` [B, V] with `token` [B] taken out in the requests of `where` [B]."""
    return torch.where(where[:, None], log_weights.scatter(1, token[:, None], -torch.inf), log_weights)


def draft_of(log_weights: Tensor | None, token: Tensor, like: Tensor) -> Tensor:
    """[B, V] distribution from which `token` [B] was drawn.

    A point mass without weights, and where no weight is left: then no draw can have been made (greedy drafts).
    """
    point = torch.zeros_like(like).scatter(1, token[:, None], 1.0)
    if log_weights is None:
        return point
    left = (log_weights > -torch.inf).any(1, keepdim=True)
    return torch.where(left, torch.where(left, log_weights, 0.0).softmax(1), point)


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
