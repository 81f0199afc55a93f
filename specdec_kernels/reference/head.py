"""The drafter's head in plain PyTorch: logits of some rows, what a softmax of them needs, the best or drawn tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..philox import gumbels

# Rows of the weight that are gathered and upcast at a time: neither copy ever exists whole.
_SLICE = 8192


def _logits(hidden: Tensor, weight: Tensor, rows: Tensor | None, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    """[B, R] logits (hidden . row) * scale + bias in fp32 (fp64 stays); -inf for rows that the weight does not have."""
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    hidden, height = hidden.to(exact), weight.shape[0]
    if rows is None:
        rows = torch.arange(height, device=weight.device, dtype=torch.int32)
    known = (rows >= 0) & (rows < height)
    rows = torch.where(known, rows, 0)
    if height == 0:
        return hidden.new_full((hidden.shape[0], rows.shape[-1]), float("-inf"))
    parts = [hidden.new_empty((hidden.shape[0], 0))]
    for part in rows.split(_SLICE, dim=-1):
        picked = weight[part].to(exact)
        parts.append(hidden @ picked.T if part.ndim == 1 else (picked @ hidden[:, :, None])[..., 0])
    logits = torch.cat(parts, dim=1)
    if scale is not None:
        logits = logits * scale[rows]
    if bias is not None:
        logits = logits + bias[rows].to(exact)
    return torch.where(known, logits, float("-inf"))


def _statistics(logits: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """(lse [B], entropy [B]) of logits / temperature [B, 1]; temperature 0 counts as 1."""
    temperature = torch.where(temperature > 0, temperature, 1.0).to(logits.dtype)
    if not logits.shape[1]:
        return logits.new_full(logits.shape[:1], float("-inf")), logits.new_zeros(logits.shape[:1])
    # The peak first: a quotient of large numbers would lose what tells them apart.
    peak = logits.amax(1, keepdim=True)
    peak = torch.where(peak > float("-inf"), peak, 0.0)
    scaled = (logits - peak) / temperature
    rest = torch.logsumexp(scaled, dim=1)
    probabilities = torch.exp(scaled - rest[:, None])
    # What has no probability adds nothing: 0 * -inf is 0 here. Where nothing has any, lse is -inf and entropy 0.
    entropy = -torch.where(probabilities > 0, probabilities * (scaled - rest[:, None]), 0.0).sum(1)
    return (peak / temperature)[:, 0] + rest, torch.where(rest == float("-inf"), 0.0, entropy)


def _head(hidden, weight, k, noise, rows, token_ids, bias, scale, temperature, temperatures, return_logits):
    """Both ops; `noise(ids)` gives [B, R] Gumbel noise, None ranks by the logits alone."""
    logits = _logits(hidden, weight, rows, bias, scale)
    batch, count = logits.shape
    if temperatures is None:
        temperatures = hidden.new_full((batch,), temperature, dtype=torch.float32)
    temperature = temperatures[:, None]
    lse, entropy = _statistics(logits, temperature)
    # A NaN or an infinite logit leaves no distribution: the request gets NaN and no token.
    broken = ~(logits < float("inf")).all(1)
    lse, entropy = (torch.where(broken, float("nan"), value) for value in (lse, entropy))

    ids = rows if rows is not None else token_ids
    if ids is None:
        ids = torch.arange(count, device=hidden.device, dtype=torch.int32)
    ids = ids.expand(batch, count)
    keys = logits
    if noise is not None:
        # In fp64, because near temperature 0 an fp32 quotient is too coarse for the noise that is added to it.
        warm = torch.where(temperature > 0, temperature, 1.0).double()
        keys = torch.where(temperature > 0, logits.double() / warm + noise(ids).double(), logits.double())
    # Ties go to the lowest id: ids ascending first, then a stable sort.
    by_id = torch.argsort(ids, dim=1, stable=True)
    ranked = by_id.gather(1, torch.argsort(keys.gather(1, by_id), dim=1, descending=True, stable=True))[:, :k]
    best = logits.gather(1, ranked)
    best = torch.where(broken[:, None], float("-inf"), best)
    # A token of logit -inf (masked by the bias, unknown row) is never an answer.
    tokens = torch.where(best > float("-inf"), ids.gather(1, ranked), -1)
    short = k - ranked.shape[1]
    return (
        torch.nn.functional.pad(best, (0, short), value=float("-inf")),
        torch.nn.functional.pad(tokens, (0, short), value=-1).to(torch.int32),
        lse,
        entropy,
        logits if return_logits else logits.new_empty((batch, 0)),
    )


def head_topk(hidden: Tensor, weight: Tensor, k: int, *rest):
    """The k largest logits. `rest`: rows, token_ids, bias, scale, temperature, temperatures, return_logits."""
    return _head(hidden, weight, k, None, *rest)


def head_sample(hidden: Tensor, weight: Tensor, k: int, seed: Tensor, offset: Tensor, row: Tensor | None, *rest):
    """Draws without replacement: the k largest of logits / temperature + Gumbel noise (Kool et al., 1903.06059)."""
    row = torch.zeros_like(offset) if row is None else row

    def noise(ids):
        return gumbels(seed[:, None], offset[:, None], row[:, None], ids)

    return _head(hidden, weight, k, noise, *rest)
