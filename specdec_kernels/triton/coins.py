"""Random numbers on the device: Philox4x32-10, bit for bit what `specdec_kernels.philox` defines."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

ACCEPT = tl.constexpr(0)  # streams, as in specdec_kernels.philox
FINAL = tl.constexpr(1)
ORDER = tl.constexpr(3)


class Coins(NamedTuple):
    """Random numbers of one request: given ones, or the stream."""

    accept: tl.tensor  # pointer to the given uniform of the request's root, or None
    final: tl.tensor  # pointer to the given uniform of the drawn token, or None
    seed: tl.tensor  # int64, or None: then what is not given is 0 (greedy needs none)
    offset: tl.tensor  # int64, or None


@triton.jit
def coins_of(b, first, accept_uniforms, final_uniforms, seed, offset):
    """Coins of request b, whose root is node `first`."""
    accept, final, key, position = accept_uniforms, final_uniforms, seed, offset
    if accept_uniforms is not None:
        accept = accept_uniforms + first
    if final_uniforms is not None:
        final = final_uniforms + b
    if seed is not None:
        key, position = tl.load(seed + b), tl.load(offset + b)
    return Coins(accept=accept, final=final, seed=key, offset=position)


@triton.jit
def stream_coin(coins, STREAM: tl.constexpr, row, column):
    """fp32 coin in [0, 1) of counter (offset, STREAM, row, column).

    tl.rand would lay the counter out in its own way; the rounds of tl.philox_impl are the standard ones.
    """
    if coins.seed is None:
        return tl.full((), 0.0, tl.float32)
    else:
        c0 = coins.offset.to(tl.uint32)
        zero = c0 ^ c0
        key_low, key_high = coins.seed.to(tl.uint32), (coins.seed >> 32).to(tl.uint32)
        w0, w1, w2, w3 = tl.philox_impl(c0, zero + STREAM, zero + row, zero + (column >> 2), key_low, key_high)
        lane = column & 3
        word = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
        # 24 bits are exact in fp32, and so is the product with a power of two.
        return (word >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def accept_coin(coins, node, repeat):
    """Coin of the test of local node `node`; given ones serve the first draw that hit the node."""
    if coins.accept is None:
        return stream_coin(coins, ACCEPT, node, repeat)
    else:
        u = tl.load(coins.accept + node)
        if repeat > 0:
            u = stream_coin(coins, ACCEPT, node, repeat)
        return u


@triton.jit
def final_coin(coins):
    """Coin of the one token that is drawn."""
    if coins.final is not None:
        return tl.load(coins.final)
    else:
        zero = tl.full((), 0, tl.int32)
        return stream_coin(coins, FINAL, zero, zero)
