"""The exact threshold of the filters: which logits top_k, top_p and min_p keep, without sorting the row.

The filters are defined on z = (x - largest x) / temperature in fp32, which never falls where x rises. So each keeps the
logits from some x upwards, and a threshold on z becomes one on x, the cut, by a search over floats that reads no row.

top_k and top_p ask for the largest x at which a weight of the logits from x upwards (their number, or their
probability) reaches a target. One pass keeps the largest `KEPT` logits of each lane and dismisses the rest. Unless more
than a few hundred tokens stay, whatever counts is among them, and a bisection in registers finds the threshold. It
proves what it found: nothing that was dismissed may lie above it, and no sum may be so near its target that fp32
rounding could have decided. Where the proof fails, passes over the row section the keys instead, four bits a pass, with
integer counts and fp64 masses.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rows import logits_at

KEPT = tl.constexpr(4)  # largest logits kept of each lane; `gather` names them
PIVOTS = tl.constexpr(16)  # a pass over the row leaves one of so many sections
ROUND = tl.constexpr(256)  # keys that one round of `least` looks at: 8 bits
LEAST_TARGET = tl.constexpr(1e-30)  # of a mass: top_p = 0 asks for the peak, whose weight is 1


@triton.constexpr_function
def zero_bits(dtype, mixed):
    """Low bits that are 0 in every fp32 logit of a row of this type; a mixed row fills them."""
    return 0 if mixed else {"bf16": 16, "fp16": 13}.get(dtype.name, 0)


@triton.jit
def key_of(x, SHIFT: tl.constexpr):
    """int32 keys in the order of the fp32 values `x`, in which -0 equals 0; see `zero_bits` for SHIFT."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def value_of(key, SHIFT: tl.constexpr):
    """fp32 of an int32 key."""
    bits = tl.where(key < 0, ~(~key << SHIFT), key << SHIFT)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def lowest_key(SHIFT: tl.constexpr):
    """int64 key of the most negative finite fp32. Keys are computed with in int64: their span is 2^32."""
    return tl.full((), -0x7F800000, tl.int64) >> SHIFT


@triton.jit
def scaled(x, top, temperature):
    """The z of logits `x`, rounded as the definition rounds it."""
    return tl.div_rn(x - top, temperature)


@triton.jit
def least(z, top, temperature):
    """The smallest fp32 x whose scaled value reaches `z`, fp64 and at most 0, which `top` reaches."""
    lane = tl.arange(0, ROUND).to(tl.int64)
    highest = key_of(top, 0).to(tl.int64)
    low = lowest_key(0)
    for shift in tl.static_range(24, -8, -8):  # the answer is one of the ROUND << shift keys from low upwards
        pivot = tl.minimum(low + (lane << shift), highest)
        short = scaled(value_of(pivot.to(tl.int32), 0), top, temperature).to(tl.float64) < z
        steps = tl.sum((short & (pivot < highest)).to(tl.int64), 0)
        low += tl.where(steps > 0, ((steps - 1) << shift) + 1, 0)
    return value_of(low.to(tl.int32), 0)


@triton.jit
def block_logits(row, start, V, SIZE: tl.constexpr):
    """fp32 logits of the columns start .. start+SIZE-1, -inf where there is none or the mask does not allow it."""
    column = start + tl.arange(0, SIZE)
    inside = column < row.size
    token = column
    if row.words is not None and row.vocab is not None:
        token = tl.load(row.vocab + column, mask=inside, other=-1)
        inside = inside & (token >= 0) & (token < V)
    return logits_at(row, column, inside, token)


@triton.jit
def gather(row, V, BLOCK: tl.constexpr):
    """([BLOCK, 2, 2] the KEPT largest logits of each lane, a bound of all others: none of them is larger).

    Lane i reads the columns i, i + BLOCK, ...; -inf fills lanes that hold fewer.
    """
    first = tl.full([BLOCK], -float("inf"), tl.float32)
    second = tl.full([BLOCK], -float("inf"), tl.float32)
    third = tl.full([BLOCK], -float("inf"), tl.float32)
    fourth = tl.full([BLOCK], -float("inf"), tl.float32)
    for start in range(0, row.size, BLOCK):
        x = block_logits(row, start, V, BLOCK)
        smaller = tl.minimum(first, x)
        first = tl.maximum(first, x)
        x = tl.minimum(second, smaller)
        second = tl.maximum(second, smaller)
        smaller = tl.minimum(third, x)
        third = tl.maximum(third, x)
        fourth = tl.maximum(fourth, smaller)
    return tl.join(tl.join(first, second), tl.join(third, fourth)), tl.max(fourth, 0)


@triton.jit
def bisect(keys, weights, low, high, target):
    """(the largest key t in [low, high) with W(t) >= target, W(t), W(t + 1)). W(t) is the weight of all keys from t on.

    W(high) is 0. Where no key reaches the target, t is low - 1 and W(t) is 0.
    """
    low -= 1
    reached, missed = 0.0, 0.0
    while high - low > 1:
        middle = low + (high - low) // 2
        weight = tl.sum(tl.where(keys >= middle.to(tl.int32), weights, 0.0))
        if weight >= target:
            low, reached = middle, weight
        else:
            high, missed = middle, weight
    return low, reached, missed


@triton.jit
def section(row, top, temperature, least_x, target, V, SHIFT: tl.constexpr, MASS: tl.constexpr, SIZE: tl.constexpr):
    """The largest logit x >= `least_x` at which the weight of the logits from x upwards reaches its target, else -inf.

    The weight is the number of logits, of which there shall be `target`, or with MASS their probability, which shall
    reach the share `target` of that of all logits from `least_x` upwards. Exact for any row: integers, and fp64.
    """
    ACC: tl.constexpr = tl.float64 if MASS else tl.int32
    lane = tl.arange(0, PIVOTS)
    low = tl.maximum(key_of(least_x, SHIFT).to(tl.int64), lowest_key(SHIFT))
    high = key_of(top, SHIFT).to(tl.int64) + 1  # W(low) >= wanted > W(high)
    above = tl.zeros((), ACC)  # W(high)
    wanted = tl.zeros((), ACC) if MASS else target  # the first pass finds the mass of which it is a share
    # A key says little of where a threshold may lie, a distance from the top does: the first pass goes by that.
    pivot = key_of(top - (PIVOTS - lane) * temperature, SHIFT).to(tl.int64)
    pivot = tl.where(lane == 0, low, tl.maximum(pivot, low))
    while high - low > 1:
        sums = tl.zeros([PIVOTS, SIZE], ACC)
        for start in range(0, row.size, SIZE):
            x = block_logits(row, start, V, SIZE)
            key = key_of(x, SHIFT)
            here = (x >= least_x) & (key >= low.to(tl.int32)) & (key < high.to(tl.int32))  # keys may be coarser than x
            if tl.max(here.to(tl.int32), 0) > 0:
                if MASS:
                    weight = tl.where(here, tl.exp(scaled(x, top, temperature).to(tl.float64)), 0.0)
                else:
                    weight = here.to(ACC)
                sums += tl.where(key[None, :] >= pivot.to(tl.int32)[:, None], weight[None, :], 0)
        weights = tl.sum(sums, 1) + above
        if MASS:
            wanted = tl.where(wanted > 0, wanted, tl.maximum(target * tl.max(weights, 0), LEAST_TARGET))
        reached = weights >= wanted
        above = tl.max(tl.where(reached, above, weights), 0)
        low = tl.max(tl.where(reached, pivot, low), 0)
        high = tl.min(tl.where(reached, high, tl.minimum(pivot, high)), 0)
        pivot = low + lane * ((high - low + PIVOTS - 1) // PIVOTS)
    return tl.where(high > low, value_of(low.to(tl.int32), SHIFT), -float("inf"))


@triton.jit
def cut(row, found, temperature, top_k, top_p, min_p, V, BLOCK: tl.constexpr):
    """(the smallest logit which the filters keep, the mass of those from it upwards; both fp32).

    The cut is -inf where nothing is filtered. The mass is the sum of exp((x - top) / temperature), or 0 where only
    another pass can tell it. The filters come in this order: top_k, top_p on what top_k left, min_p; ties stay.

    Args:
        row: sound, not greedy, not cut yet.
        found: its Lse.
        temperature: fp32 > 0.
        top_k: fp32; off at 0 and from the number of columns upwards.
        top_p: fp32; off from 1 upwards.
        min_p: fp32; off at 0.
        V: size of the vocabulary.
        BLOCK: columns of a block.
    """
    SHIFT: tl.constexpr = zero_bits(row.data.dtype.element_ty, row.other is not None)
    SIZE: tl.constexpr = BLOCK // 4  # a section holds PIVOTS sums for each of its lanes
    top = found.top
    x = tl.full((), -float("inf"), tl.float32)
    bound = x
    if min_p > 0:
        bound = least(tl.log(min_p.to(tl.float64)), top, temperature)
    mass = tl.zeros((), tl.float32)
    limited = (top_k > 0) & (top_k.to(tl.float64) < row.size.to(tl.float64))
    nucleus = top_p < 1
    if limited | nucleus:
        kept, dismissed = gather(row, V, BLOCK)
        keys = key_of(kept, SHIFT)
        # A threshold under what was dismissed is none.
        low = tl.maximum(key_of(dismissed, SHIFT).to(tl.int64), lowest_key(SHIFT))
        high = key_of(top, SHIFT).to(tl.int64) + 1
        if limited:
            count = tl.maximum(top_k.to(tl.int32), 1)
            key, reached, _ = bisect(keys, (keys >= low).to(tl.float32), low, high, count.to(tl.float32))
            if reached > 0:
                x = value_of(key.to(tl.int32), SHIFT)
            elif dismissed > -float("inf"):
                x = section(row, top, temperature, x, count, V, SHIFT, False, SIZE)
            if x > -float("inf"):
                x = least(scaled(x, top, temperature).to(tl.float64), top, temperature)
        kept = value_of(keys, SHIFT)
        weights = tl.exp(scaled(kept, top, temperature))
        if nucleus:
            among = tl.where(kept >= x, weights, 0.0)
            total = found.mass
            proven = x == -float("inf")
            if not proven:
                total = tl.sum(among)
                proven = dismissed < x
            wanted = tl.maximum(top_p * total, LEAST_TARGET)
            key, reached, missed = bisect(keys, among, low, high, wanted)
            # Relative error of a sum: a lane of `total` rounds twice a block, its exponentials a few times.
            error = (2 * tl.cdiv(row.size, BLOCK) + 64) * 5.9604644775390625e-08
            proven = proven & (reached >= wanted * (1 + error)) & (missed < wanted * (1 - error))
            if proven:
                x = value_of(key.to(tl.int32), SHIFT)
            else:
                x = section(row, top, temperature, x, top_p.to(tl.float64), V, SHIFT, True, SIZE)
            x = least(scaled(x, top, temperature).to(tl.float64), top, temperature)
        if dismissed < tl.maximum(x, bound):
            mass = tl.sum(tl.where(kept >= tl.maximum(x, bound), weights, 0.0))
    return tl.maximum(x, bound), mass
