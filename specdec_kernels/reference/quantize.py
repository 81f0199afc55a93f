"""What a quantised weight of the head stands for."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 128  # columns of an int4 weight that share a scale
QUANTIZED = (torch.int8, torch.float8_e4m3fn, torch.uint8)  # the last is int4


def groups_of(dim: int) -> int:
    """Groups of columns of an int4 weight."""
    return -(-dim // GROUP)


def dequantize(values: Tensor, scales: Tensor, dim: int, rows: Tensor | None = None, dtype=torch.float32) -> Tensor:
    """[V, D], or [*rows.shape, D] of `rows`: q * scale in `dtype`.

    Args:
        values: [V, D] int8 or float8_e4m3fn; of int4 [V, 64 * G] uint8, G = ceil(D / 128): byte j of a group holds
            value j in its low four bits and value j + 64 in the high ones, each as q + 8 with q in -8..7.
        scales: [V] fp32; of int4 [V, G].
    """
    if rows is not None:
        # Not every device gathers fp8.
        values, scales = values.view(torch.uint8)[rows].view(values.dtype), scales[rows]
    if values.dtype != torch.uint8:
        return values.to(dtype) * scales[..., None].to(dtype)
    packed = values.unflatten(-1, (groups_of(dim), GROUP // 2)) if dim else values[..., None]
    q = torch.cat([packed & 15, packed >> 4], dim=-1).to(dtype) - 8
    return (q * scales[..., None].to(dtype)).flatten(-2)[..., :dim]
