"""Quantised weights of a drafter's head: what `head_topk` and `head_sample` read of a step is halved or quartered."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import FLOATS, check_choice, check_tensor
from .reference.quantize import GROUP, groups_of
from .types import QuantizedHead

_DTYPES = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}
# Elements that are upcast and quantised at a time: what is made of them on the way stays in a core's cache.
_SLICE = 1 << 18
# absmax / scale: 7 clips nothing, and the more, the finer the steps and the harder the clipping. The least squared
# error of groups of normal, Laplace and uniform weights lies between these, and the minimum is flat.
_INT4_STEPS = (7.0, 7.4, 7.8, 8.2, 8.6, 9.2, 10.0)
# The smallest normal number: what is below its half becomes 0, and a row of zeros needs no rule of its own.
_LEAST_SCALE = torch.finfo(torch.float32).tiny


@torch.no_grad()
def quantize_head(weight: Tensor, dtype: str = "int8") -> QuantizedHead:
    """Quantise the weight of a head, rounding to nearest even.

    int8: w = q * s with a scale s = absmax / 127 for each row; |w - q s| <= s / 2.
    int4: groups of 128 columns; of a few scales around absmax / 8 each group takes the one of least squared error.
    fp8: e4m3 (no infinities, largest 448) with a scale absmax / 448 for each row; |w - q s| <= max(|w|, s / 64) / 16.

    The weight is left alone, so it may be tied to the embedding. Beside the result a few megabytes are in use.

    Args:
        weight: [V, D] fp32, bf16 or fp16, finite.
        dtype: `int8`, `int4` or `fp8`.

    Returns:
        QuantizedHead on weight's device.

    Raises:
        TypeError, ValueError: an argument that does not fit; a weight with NaN or an infinity, with the first row that
            has one.
    """
    sizes: dict[str, int] = {}
    check_tensor("weight", weight, sizes, "V D", FLOATS)
    check_choice("dtype", dtype, _DTYPES)
    height, dim, groups = sizes["V"], sizes["D"], groups_of(sizes["D"])
    grouped = dtype == "int4"
    width = groups * GROUP // 2 if grouped else dim
    values = torch.empty((height, width), dtype=_DTYPES[dtype], device=weight.device)
    scales = torch.empty((height, groups) if grouped else (height,), dtype=torch.float32, device=weight.device)
    count = max(_SLICE // max(dim, 1), 1)
    for start in range(0, height, count):
        part = weight[start : start + count].float()
        if not bool(part.isfinite().all()):
            row = start + int((~part.isfinite().all(1)).nonzero()[0])
            raise ValueError(f"weight: expected finite numbers, got NaN or an infinity in row {row}")
        made = _int4(part) if grouped else _by_row(part, dtype)
        # fp8 has no copy of its own on every device.
        values[start : start + count].view(torch.uint8).copy_(made[0].view(torch.uint8))
        scales[start : start + count] = made[1]
    return QuantizedHead(values, scales, dim)


def _by_row(part: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """(values, scales) of rows [n, D] fp32."""
    most = 127.0 if dtype == "int8" else torch.finfo(torch.float8_e4m3fn).max
    scales = part.abs().amax(1).div_(most) if part.shape[1] else part.new_zeros(len(part))
    scales.clamp_(min=_LEAST_SCALE)
    # The quotient of an absmax may be rounded beyond the largest value.
    values = (part / scales[:, None]).clamp_(-most, most)
    return (values.round_() if dtype == "int8" else values).to(_DTYPES[dtype]), scales


def _int4(part: Tensor) -> tuple[Tensor, Tensor]:
    """(packed values, scales) of rows [n, D] fp32."""
    groups = groups_of(part.shape[1])
    part = torch.nn.functional.pad(part, (0, groups * GROUP - part.shape[1])).view(len(part), groups, GROUP)
    most = part.abs().amax(2, keepdim=True) if groups else part.new_zeros((len(part), 0, 1))
    best, scales = torch.full_like(most, float("inf")), torch.empty_like(most)
    for steps in _INT4_STEPS:
        tried = (most / steps).clamp_(min=_LEAST_SCALE)
        # In steps, so that the square of a tiny weight is no 0.
        error = (part / tried).sub_(_round4(part, tried)).square_().sum(2, keepdim=True) / steps**2
        better = error < best
        best, scales = torch.where(better, error, best), torch.where(better, tried, scales)
    stored = (_round4(part, scales) + 8).to(torch.uint8)
    packed = stored[..., : GROUP // 2] | stored[..., GROUP // 2 :] << 4
    return packed.flatten(1), scales[..., 0]


def _round4(part: Tensor, scales: Tensor) -> Tensor:
    return (part / scales).round_().clamp_(-8, 7)


def check_quantized(weight: QuantizedHead, sizes: dict[str, int], device) -> None:
    """Raise unless the parts of a QuantizedHead fit each other and `sizes["D"]`; binds V."""
    values, scales, dim = weight
    if dim != sizes["D"]:
        raise ValueError(f"weight.dim: expected D={sizes['D']}, what hidden has, got {dim}")
    width, groups = "D", ""
    if isinstance(values, Tensor) and values.dtype == torch.uint8:
        groups = groups_of(dim)
        width = groups * GROUP // 2
    check_tensor("weight.values", values, sizes, f"V {width}", tuple(_DTYPES.values()), device)
    check_tensor("weight.scales", scales, sizes, f"V {groups}", (torch.float32,), device)
