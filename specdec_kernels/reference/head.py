"""The drafter's head in plain PyTorch: logits of some rows, what a softmax of them needs, the best or drawn tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..philox import gumbels
from .quantize import QUANTIZED, dequantize

_LOG2_E = 1.0 / math.log(2.0)
# Rows of the weight that are gathered and upcast at a time: neither copy ever exists whole.
_SLICE = 8192


def _chosen(rows: Tensor | None, row_groups: Tensor | None) -> Tensor | None:
    """[R] or [B, R] rows; those of a group that is not there are unknown (-1)."""
    if row_groups is None:
        return rows
    known = (row_groups >= 0) & (row_groups < rows.shape[0])
    if not rows.shape[0]:
        return rows.new_full((len(row_groups), rows.shape[1]), -1)
    return torch.where(known[:, None], rows[torch.where(known, row_groups, 0)], -1)


def _logits(hidden: Tensor, weight: Tensor, rows: Tensor | None, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    """[B, R] logits (hidden . row) * scale + bias in fp32 (fp64 stays); -inf for rows that the weight does not have.

    Rows of a quantised weight are dequantised first, and a hidden vector with NaN or an infinity breaks its request.
    """
    exact = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    hidden, height, dim = hidden.to(exact), weight.shape[0], hidden.shape[1]
    quantized = weight.dtype in QUANTIZED
    if quantized:
        hidden = torch.where(hidden.isfinite().all(1, keepdim=True), hidden, float("nan"))
    if rows is None:
        rows = torch.arange(height, device=weight.device, dtype=torch.int32)
    known = (rows >= 0) & (rows < height)
    rows = torch.where(known, rows, 0)
    if height == 0:
        return hidden.new_full((hidden.shape[0], rows.shape[-1]), float("-inf"))
    parts = [hidden.new_empty((hidden.shape[0], 0))]
    for part in rows.split(_SLICE, dim=-1):
        picked = dequantize(weight, scale, dim, part, exact) if quantized else weight[part].to(exact)
        parts.append(hidden @ picked.T if part.ndim == 1 else (picked @ hidden[:, :, None])[..., 0])
    logits = torch.cat(parts, dim=1)
    if scale is not None and not quantized:
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


def _ranked(logits: Tensor, k: int, noise, ids: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(keys [B, k] fp64, logits [B, k], tokens [B, k] int32) of the k largest keys, padded with -inf and -1.

    `noise(ids)` gives [B, R] Gumbel noise; None ranks by the logits alone.
    """
    keys = logits.double()
    if noise is not None:
        # In fp64, because near temperature 0 an fp32 quotient is too coarse for the noise that is added to it.
        warm = torch.where(temperature > 0, temperature, 1.0).double()
        keys = torch.where(temperature > 0, keys / warm + noise(ids).double(), keys)
    # Ties go to the lowest id: ids ascending first, then a stable sort.
    by_id = torch.argsort(ids, dim=1, stable=True)
    places = by_id.gather(1, torch.argsort(keys.gather(1, by_id), dim=1, descending=True, stable=True))[:, :k]
    best = logits.gather(1, places)
    # Nothing is drawn where a NaN or an infinite logit leaves no distribution, and a token of logit -inf (masked by
    # the bias, unknown row) is never an answer.
    best = torch.where(_broken(logits)[:, None], float("-inf"), best)
    there = best > float("-inf")
    keys = torch.where(there, keys.gather(1, places), float("-inf"))
    tokens = torch.where(there, ids.gather(1, places), -1).to(torch.int32)
    short = k - places.shape[1]
    return tuple(
        torch.nn.functional.pad(values, (0, short), value=padding)
        for values, padding in ((keys, float("-inf")), (best, float("-inf")), (tokens, -1))
    )


def _broken(logits: Tensor) -> Tensor:
    """[B] bool: a NaN or an infinite logit leaves no distribution."""
    return ~(logits < float("inf")).all(1)


def _names(logits: Tensor, rows: Tensor | None, token_ids: Tensor | None) -> Tensor:
    """[B, R] target ids of the logits."""
    ids = rows if rows is not None else token_ids
    if ids is None:
        ids = torch.arange(logits.shape[1], device=logits.device, dtype=torch.int32)
    return ids.expand(logits.shape)


def _column(temperature: float, temperatures: Tensor | None, hidden: Tensor) -> Tensor:
    """[B, 1] temperatures."""
    if temperatures is None:
        temperatures = hidden.new_full(hidden.shape[:1], temperature, dtype=torch.float32)
    return temperatures[:, None]


def _noise(seed: Tensor | None, offset: Tensor | None, row: Tensor | None):
    """Gumbel noise of [B, R] ids; None without a seed."""
    if seed is None:
        return None
    row = torch.zeros_like(offset) if row is None else row
    return lambda ids: gumbels(seed[:, None], offset[:, None], row[:, None], ids)


def _head(
    hidden, weight, k, noise, rows, row_groups, token_ids, bias, scale, temperature, temperatures, return_logits
):  # fmt: skip
    rows = _chosen(rows, row_groups)
    logits = _logits(hidden, weight, rows, bias, scale)
    column = _column(temperature, temperatures, hidden)
    _, best, tokens = _ranked(logits, k, noise, _names(logits, rows, token_ids), column)
    # A broken request gets NaN.
    lse, entropy = (
        torch.where(_broken(logits), float("nan"), value) for value in _statistics(logits, column)
    )  # fmt: skip
    return best, tokens, lse, entropy, logits if return_logits else logits.new_empty((len(logits), 0))


def head_topk(hidden: Tensor, weight: Tensor, k: int, *rest):
    """The k largest logits. `rest`: rows, row_groups, token_ids, bias, scale, temperature(s), return_logits."""
    return _head(hidden, weight, k, None, *rest)


def head_sample(hidden: Tensor, weight: Tensor, k: int, seed: Tensor, offset: Tensor, row: Tensor | None, *rest):
    """Draws without replacement: the k largest of logits / temperature + Gumbel noise (Kool et al., 1903.06059)."""
    return _head(hidden, weight, k, _noise(seed, offset, row), *rest)


def head_part(
    hidden, weight, k, seed, offset, row, rows, row_groups, token_ids, bias, scale, temperature, temperatures
):  # fmt: skip
    """What one rank of a sharded head knows: the candidates of its rows, and sums that merge with other ranks'.

    Returns keys [B, k] fp64 by which candidates are ranked (logit, or logit / temperature + noise where `seed` is
    given), their logits [B, k] and tokens [B, k], and sums [B, 3] fp64: an integer anchor a, then over
    t = logit * log2(e) / temperature the sums of 2^(t - a) and of 2^(t - a) * (t - a). A broken request has sums of
    NaN; one without a finite logit has anchor -inf and sums of 0.
    """
    rows = _chosen(rows, row_groups)
    logits = _logits(hidden, weight, rows, bias, scale)
    column = _column(temperature, temperatures, hidden)
    keys, best, tokens = _ranked(logits, k, _noise(seed, offset, row), _names(logits, rows, token_ids), column)
    powers = logits.double() * _LOG2_E / torch.where(column > 0, column, 1.0).double()
    powers = torch.nn.functional.pad(powers, (1, 0), value=float("-inf"))  # no rows at all: nothing finite
    anchor = powers.amax(1, keepdim=True).floor()
    above = powers - torch.where(anchor > float("-inf"), anchor, 0.0)
    terms = torch.exp2(above)
    # What has no probability adds nothing: 0 * -inf is 0 here.
    sums = torch.stack([terms.sum(1), torch.where(terms > 0, terms * above, 0.0).sum(1)], 1)
    sums = torch.where(_broken(logits)[:, None], float("nan"), sums)
    return keys, best, tokens, torch.cat([anchor, sums], 1)
