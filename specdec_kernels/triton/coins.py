"""Philox4x32-10 on the device, bit for bit what `specdec_kernels.philox` defines."""

from __future__ import annotations

import triton
import triton.language as tl

ACCEPT = tl.constexpr(0)  # streams, as in specdec_kernels.philox
FINAL = tl.constexpr(1)


@triton.jit
def coin(seed, offset, STREAM: tl.constexpr, row):
    """fp32 coin in [0, 1) of counter (offset, STREAM, row, column 0), lane 0.

    tl.rand would lay the counter out in its own way; the rounds of tl.philox_impl are the standard ones.
    """
    c0 = offset.to(tl.uint32)
    zero = c0 ^ c0
    word, _, _, _ = tl.philox_impl(c0, zero + STREAM, zero + row, zero, seed.to(tl.uint32), (seed >> 32).to(tl.uint32))
    # 24 bits are exact in fp32, and so is the product with a power of two.
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def uniform(given, index, seed, offset, b, STREAM: tl.constexpr, row):
    """`given[index]` where uniforms were given, else the Philox coin of request b, else 0 (greedy needs none)."""
    if given is not None:
        u = tl.load(given + index)
    elif seed is not None:
        u = coin(tl.load(seed + b), tl.load(offset + b), STREAM, row)
    else:
        u = 0.0
    return u
