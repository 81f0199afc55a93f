"""Scores that say which cache entries a drafter's short cache can lose. Plain PyTorch, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import REFERENCE_FLOATS, check_tensor


def keydiff_scores(keys: Tensor) -> Tensor:
    """KeyDiff (arXiv 2504.15364): how far each key points away from the mean direction; keep the highest.

    Args:
        keys: [B, Hkv, L, D] fp32, bf16, fp16 or fp64. Its scale does not matter, only the direction of each key.

    Returns:
        [B, Hkv, L] fp32 (fp64 for fp64): minus the cosine between each key and the mean of the normalised keys.

    Raises:
        TypeError, ValueError: `keys` is no such tensor.
    """
    check_tensor("keys", keys, {}, "B Hkv L D", REFERENCE_FLOATS)
    direction = _unit(keys if keys.element_size() == 8 else keys.float())
    anchor = _unit(direction.mean(2, keepdim=True))
    return -(direction * anchor).sum(-1)


def caote_scores(attention: Tensor, values: Tensor, *, fast: bool = False) -> Tensor:
    """CAOTE (arXiv 2504.14051): the error of the attention output if one entry were evicted; keep the highest.

    With weights a (summing to 1) and output o = sum_j a_j v_j, eviction of j renormalises the others and moves the
    output by exactly `a_j / (1 - a_j) * |o - v_j|`.

    Args:
        attention: [B, Hkv, L] attention weights of one query, summing to 1 over L.
        values: [B, Hkv, L, D].
        fast: use the mean of `values` in place of o, which needs no pass over the weights.

    Returns:
        [B, Hkv, L] fp32 (fp64 for fp64); an entry that holds all the weight scores inf.

    Raises:
        TypeError, ValueError: an argument that does not fit.
    """
    sizes: dict[str, int] = {}
    check_tensor("attention", attention, sizes, "B Hkv L", REFERENCE_FLOATS)
    check_tensor("values", values, sizes, "B Hkv L D", REFERENCE_FLOATS, attention.device)
    weights = attention if attention.element_size() == 8 else attention.float()
    v = values.to(weights.dtype)
    output = v.mean(2, keepdim=True) if fast else (weights[..., None] * v).sum(2, keepdim=True)
    left = 1 - weights
    # Rounding may leave a weight of 1 or a little more: nothing but that entry matters.
    return torch.where(left > 0, weights / left * (output - v).norm(dim=-1), torch.inf)


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-30)
