"""top_k and top_p in plain PyTorch: thresholds from one sort of each row, or from `torch.topk`."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec_kernels import SamplingParams

SLACK = 78  # values that topk finds behind the top_k, for ties at the threshold


def keep_by_sort(z: Tensor, logits: Tensor, params: SamplingParams) -> Tensor:
    """`z` [M, V] fp32 with -inf where top_k and top_p say so, from one sort of each row of the `logits` it is made of.

    bf16 is sorted faster than fp32.
    """
    return _cut(z, logits.sort(dim=1, descending=True).values.float(), params)


def keep_by_topk(z: Tensor, logits: Tensor, params: SamplingParams) -> Tensor:
    """The same from `torch.topk`, which serves where top_k is small and few values are equal to the last."""
    values = z.topk(min(params.top_k + SLACK, z.shape[1]), dim=1).values
    if values.shape[1] < z.shape[1] and bool((values[:, -1] == values[:, params.top_k - 1]).any()):
        return keep_by_sort(z, logits, params)
    return _cut(z, values, params)


def _cut(z: Tensor, values: Tensor, params: SamplingParams) -> Tensor:
    """Apply the thresholds that the descending `values` give; ties stay in."""
    kth = values[:, params.top_k - 1 : params.top_k]
    kept = values >= kth
    most = int(kept.sum(1).max())  # on a CPU it costs nothing to know it
    values = values[:, :most].masked_fill(~kept[:, :most], -torch.inf)
    last = (values.softmax(1).cumsum(1) < params.top_p).sum(1, keepdim=True).clamp_(max=values.shape[1] - 1)
    return z.masked_fill_(z < values.gather(1, last), -torch.inf)
