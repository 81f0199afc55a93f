"""Gumbel noise of the head's draws: the words of `specdec_kernels.philox`, bit for bit, and their logarithms."""

from __future__ import annotations

import triton
import triton.language as tl

DRAFT = tl.constexpr(2)  # stream, as in specdec_kernels.philox


@triton.jit
def log_1m(v):
    """log(1 - v) of fp32 v in [0, 1), however small v is.

    1 - v rounds to `near`, and what that lost is exact: log(near + lost) is log(near) + lost / near to first order.
    lost is not 0 only where v < 1/2, at most 2^-25, and 1 + v is 1 / near to within v^2.
    """
    near = 1.0 - v
    lost = (1.0 - near) - v
    return tl.log(near) + lost * (1.0 + v)


@triton.jit
def gumbel(word):
    """fp32 standard Gumbel noise of uint32 words; see `philox.gumbel_argument`."""
    v = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.999999940395355224609375)
    return -tl.log(-log_1m(v))


@triton.jit
def words(seed, offset, row, column):
    """Four words for each counter (offset, DRAFT, row, column): seed, offset int64, row int32 [B, 1]; column [1, C]."""
    c3 = column.to(tl.uint32) + (offset ^ offset).to(tl.uint32)  # [B, C]
    c0, c2 = offset.to(tl.uint32) + (c3 ^ c3), row.to(tl.uint32) + (c3 ^ c3)
    low, high = seed.to(tl.uint32) + (c3 ^ c3), (seed >> 32).to(tl.uint32) + (c3 ^ c3)
    return tl.philox_impl(c0, (c3 ^ c3) + DRAFT, c2, c3, low, high)


@triton.jit
def noise(seed, offset, row, id, first, PLAIN: tl.constexpr, SIZE: tl.constexpr):
    """[B, SIZE] fp32 noise of the ids [SIZE]; PLAIN: they are first, first + 1, ..., `first` a multiple of 4.

    Four neighbours share one run of Philox, which is most of the work, so plain ids need a quarter of it.
    """
    if PLAIN:
        w0, w1, w2, w3 = words(seed, offset, row, ((first >> 2) + tl.arange(0, SIZE // 4))[None, :])
        word = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [seed.shape[0], SIZE])
    else:
        w0, w1, w2, w3 = words(seed, offset, row, (id >> 2)[None, :])
        lane = (id & 3)[None, :]
        word = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
    return gumbel(word)
