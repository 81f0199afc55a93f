"""What a program keeps of the logits that it computes: the k best of each request, and the sums of their softmax."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

LAST = tl.constexpr(2147483647)  # id behind all others
LARGEST_INVERSE = tl.constexpr(1.7e38)  # of a temperature near 0: finite, so that 0 * inverse is 0 at the peak
LOWEST = tl.constexpr(-105.0)  # e^-105 is 0 in fp32, and so is e^d d there


class Best(NamedTuple):
    """Lists [BLOCK_B, SLOTS] in no order. Free slots hold (-inf, LAST), slots that k leaves over (+inf, LAST)."""

    key: tl.tensor  # fp32 logits, or the fp64 keys of draws
    id: tl.tensor  # int32
    logit: tl.tensor  # fp32; of no meaning where the key is the logit


class Sums(NamedTuple):
    """Of each request, [BLOCK_B]: an anchor a, the sum of b^(t - a), and that of b^(t - a) * (t - a).

    In fp32 b is e, t a logit, and t - a is divided by the temperature. EXACT, in fp64, b is 2, t is logit * log2(e) /
    temperature, and a is whole, so that neither a tile nor a program nor a rank leaves a trace in a term. What is
    broken (NaN or +inf) makes the sum NaN, nothing finite leaves a = -inf and 0.
    """

    anchor: tl.tensor
    sum: tl.tensor
    weighted: tl.tensor


@triton.jit
def no_best(BLOCK_B: tl.constexpr, SLOTS: tl.constexpr, K: tl.constexpr, TYPE: tl.constexpr):
    """Lists of nothing."""
    free = (tl.arange(0, SLOTS) < K)[None, :] & (tl.arange(0, BLOCK_B) >= 0)[:, None]
    return Best(
        key=tl.where(free, -float("inf"), float("inf")).to(TYPE),
        id=tl.where(free, LAST, LAST),
        logit=tl.where(free, -float("inf"), -float("inf")),
    )


@triton.jit
def no_sums(BLOCK_B: tl.constexpr, EXACT: tl.constexpr):
    """Sums of nothing."""
    TYPE: tl.constexpr = tl.float64 if EXACT else tl.float32
    zero = tl.zeros([BLOCK_B], TYPE)
    return Sums(anchor=tl.full([BLOCK_B], -float("inf"), TYPE), sum=zero, weighted=zero)


@triton.jit
def kept(best, key, logit, tie, DRAWS: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr):
    """`best` and what of a tile is better: `key` and `logit` [BLOCK_B, BLOCK_R]; `tie` [BLOCK_R] = id * WIDTH + place.

    A round takes the best that is left of the tile, the first of its ties by id, in place of the worst of the list. As
    many rounds are needed as a request of the block finds better logits, K at most. The worst of a full list is the
    threshold of the tiles that follow: the first tile takes K rounds, and of the i-th a request wants K / i.

    Why eight rounds cost little more than one beside a kernel that is bound by memory: 128 rows of 4096 bf16 weights
    are 1 MiB, for which an SM of an H200, with 36 bytes/ns, has 50,000 cycles. A round is six instructions a logit
    (maximum; equal, select, minimum; equal, select), whatever D. For 16 requests a lane of four warps has 16 logits,
    which makes 100 issue slots of each scheduler, 800 for eight rounds; for 64 requests 3,000. That is 2% and 6% of
    the tile's time, and it is not added to it: the loads of the program beside this one go on. From 128 requests on
    tensor cores and not memory set the pace, and a program is alone on its SM: there eight rounds are some 12% to 20%
    of a first tile, and only fewer rounds, in later tiles, make them less.
    """
    LAST_TIE: tl.constexpr = 0x7FFFFFFFFFFFFFFF if tie.dtype == tl.int64 else 0x7FFFFFFF
    slot = tl.arange(0, best.key.shape[1])[None, :]
    chosen = best.logit
    rounds = 0
    going = True
    while going:
        top = tl.max(key, 1)
        first = tl.min(tl.where(key == top[:, None], tie[None, :], LAST_TIE), 1)
        here = tie[None, :] == first[:, None]
        id = (first // WIDTH).to(tl.int32)
        least = tl.min(best.key, 1)
        last = tl.max(tl.where(best.key == least[:, None], best.id, -1), 1)
        hit = (top > least) | ((top == least) & (top > -float("inf")) & (id < last))
        out = (best.key == least[:, None]) & (best.id == last[:, None])
        place = tl.min(tl.where(out, slot, best.key.shape[1]), 1)
        into = (slot == place[:, None]) & hit[:, None]
        chosen = best.logit
        if DRAWS:
            chosen = tl.where(into, tl.max(tl.where(here, logit, -float("inf")), 1)[:, None], best.logit)
        best = Best(key=tl.where(into, top[:, None], best.key), id=tl.where(into, id[:, None], best.id), logit=chosen)
        key = tl.where(here & hit[:, None], -float("inf"), key)
        rounds += 1
        going = (tl.max(hit.to(tl.int32), 0) > 0) & (rounds < K)
    return best


@triton.jit
def inverse_of(temperature, EXACT: tl.constexpr):
    """1 / temperature in fp32, log2(e) / temperature in fp64 where EXACT; temperature 0 counts as 1."""
    warm = tl.where(temperature > 0, temperature, 1.0)
    if EXACT:
        return 1.4426950408889634 / warm.to(tl.float64)  # log2(e)
    else:
        return tl.minimum(1.0 / warm, LARGEST_INVERSE)


@triton.jit
def power_of_two(n):
    """2^n of whole fp64 n <= 0, exact; 0 where that is no normal number."""
    bits = (tl.maximum(n, -1023.0).to(tl.int64) + 1023) << 52
    return tl.where(n < -1022.0, 0.0, bits.to(tl.float64, bitcast=True))


@triton.jit
def distance(a, b):
    """The difference a - b of a <= b; -inf where a is -inf, whatever b."""
    there = a > -float("inf")
    return tl.where(there, tl.where(there, a, 0.0) - tl.where(there, b, 0.0), -float("inf"))


@triton.jit
def moved(sums, anchor, inverse, EXACT: tl.constexpr):
    """`sums` with another `anchor`, which must not be lower."""
    shift = distance(sums.anchor, anchor)
    if EXACT:
        factor = power_of_two(shift)
        shift = tl.maximum(shift, -2000.0)
    else:
        shift = tl.maximum(shift * inverse, LOWEST)
        factor = tl.where(sums.anchor > -float("inf"), tl.exp(shift), 0.0)
    # What is broken stays NaN: its sum is not 0.
    weighted = tl.where(factor > 0, factor * (sums.weighted + shift * sums.sum), 0.0)
    total = tl.where(sums.sum == 0, 0.0, factor * sums.sum)
    broken = sums.sum != sums.sum
    return Sums(anchor=anchor, sum=tl.where(broken, sums.sum, total), weighted=weighted)


@triton.jit
def summed(sums, logits, sound, inverse, EXACT: tl.constexpr):
    """`sums` and those of `logits` [BLOCK_B, BLOCK_R]: finite or -inf; `sound` is False where one was NaN or +inf."""
    top = tl.max(logits, 1)
    real = logits > -float("inf")
    if EXACT:
        top = tl.where(top > -float("inf"), tl.floor(top.to(tl.float64) * inverse), -float("inf"))
        anchor = tl.maximum(sums.anchor, top)
        sums = moved(sums, anchor, inverse, True)
        base = tl.where(anchor > -float("inf"), anchor, 0.0)[:, None]
        t = tl.where(real, logits.to(tl.float64) * inverse[:, None], base)
        whole = tl.floor(t)
        # The fraction rounds to fp32 and so does its power; the rest is exact, and the same beside any anchor.
        fraction = tl.exp2((t - whole).to(tl.float32)).to(tl.float64)
        term = tl.where(real, fraction * power_of_two(tl.minimum(whole - base, 0.0)), 0.0)
        total, weighted = tl.sum(term, 1), tl.sum(tl.where(term > 0, term * (t - base), 0.0), 1)
    else:
        anchor = tl.maximum(sums.anchor, top)
        sums = moved(sums, anchor, inverse, False)
        base = tl.where(anchor > -float("inf"), anchor, 0.0)[:, None]
        d = tl.maximum((logits - base) * inverse[:, None], LOWEST)
        term = tl.where(real, tl.exp(d), 0.0)
        total, weighted = tl.sum(term, 1), tl.sum(term * d, 1)
    total = tl.where(sound, sums.sum + total, float("nan"))
    return Sums(anchor=anchor, sum=total, weighted=sums.weighted + weighted)
