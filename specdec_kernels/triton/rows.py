"""Row primitives: what a verifier needs to know of one vocabulary-wide row of logits.

No primitive keeps anything of the row's size: each reads the row block by block, in the dtype in which the model left
it.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Row(NamedTuple):
    """One row of logits and how it becomes probabilities."""

    data: tl.tensor  # pointer to the first logit; None: no row, the token was a point mass
    stride: tl.tensor  # elements between columns
    size: tl.tensor  # columns: V, or R with vocab
    words: tl.tensor  # pointer to the row of the allowed bit mask over token ids, or None
    words_stride: tl.tensor  # elements between words
    vocab: tl.tensor  # pointer to [R] ascending token ids of the columns; None: column = token id
    inverse_temperature: tl.tensor  # fp32; 1 where greedy
    greedy: tl.tensor  # int1, a point mass at the largest logit instead of a softmax


class Lse(NamedTuple):
    """What one pass over a row finds."""

    top: tl.tensor  # fp32, the largest logit
    best: tl.tensor  # its lowest column
    mass: tl.tensor  # fp32, sum of exp((x - top) / temperature)


@triton.jit
def logits_at(row, column, inside, token):
    """fp32 logits of `column`, -inf where not `inside` or where the mask does not allow `token`."""
    x = tl.load(row.data + column.to(tl.int64) * row.stride, mask=inside, other=-float("inf")).to(tl.float32)
    if row.words is not None:
        word = tl.load(row.words + (token >> 5).to(tl.int64) * row.words_stride, mask=inside, other=0)
        x = tl.where(((word >> (token & 31)) & 1) != 0, x, -float("inf"))
    return x


@triton.jit
def lse(row, V, BLOCK: tl.constexpr):
    """One pass over a row; see Lse.

    Each lane keeps its own running maximum and sum, so that the loop has no reduction in it. The sum also tells whether
    the row is sound: a finite largest logit adds 1, nothing finite leaves 0, and NaN or +inf make it NaN.
    """
    lane = tl.arange(0, BLOCK)
    peak = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    best = lane
    for start in range(0, row.size, BLOCK):
        column = start + lane
        inside = column < row.size
        token = column
        if row.words is not None and row.vocab is not None:
            token = tl.load(row.vocab + column, mask=inside, other=-1)
            inside = inside & (token >= 0) & (token < V)
        x = logits_at(row, column, inside, token)
        best = tl.where(x > peak, column, best)
        new = tl.maximum(peak, x)
        base = tl.where(new == -float("inf"), 0.0, new)  # -inf - -inf would be NaN
        total = total * tl.exp((peak - base) * row.inverse_temperature)
        total += tl.exp((x - base) * row.inverse_temperature)
        peak = new
    top = tl.max(peak, 0)
    base = tl.where(top == -float("inf"), 0.0, top)
    mass = tl.sum(total * tl.exp((peak - base) * row.inverse_temperature), 0)
    return Lse(top=top, best=tl.min(tl.where(peak == top, best, row.size), 0), mass=mass)


@triton.jit
def is_sound(found):
    """Whether the row held something finite and neither NaN nor +inf."""
    return (found.mass > 0.0) & (found.mass < float("inf"))


@triton.jit
def prob(row, found, x, column):
    """Probability of `column`, whose logit is `x`."""
    soft = tl.exp((x - found.top) * row.inverse_temperature) / found.mass
    return tl.where(row.greedy, (column == found.best).to(tl.float32), soft)


@triton.jit
def logprob(row, found, x, column):
    """Logarithm of `prob`, without the underflow."""
    soft = (x - found.top) * row.inverse_temperature - tl.log(found.mass)
    return tl.where(row.greedy, tl.where(column == found.best, 0.0, -float("inf")), soft)


@triton.jit
def column_of(row, token):
    """(column of `token`, whether the row has it): a binary search where the row has a trimmed vocabulary."""
    if row.vocab is None:
        low = token
        present = token < row.size
    else:
        low = token * 0
        high = low + row.size
        while low < high:
            middle = low + (high - low) // 2
            if tl.load(row.vocab + middle) < token:
                low = middle + 1
            else:
                high = middle
        present = tl.load(row.vocab + low, mask=low < row.size, other=-1) == token
    return low, present


@triton.jit
def block_columns(row, start, cursor, v, inside, BLOCK: tl.constexpr):
    """(columns of the tokens `v` = start .. start+BLOCK-1, whether the row has them, the next block's cursor).

    Both the vocabulary and the row's ids ascend, so one cursor walks the ids while the blocks walk the vocabulary, and
    the ids that fall into one block are at most BLOCK. Their histogram says which tokens are there, its running sum
    where. Nothing of size V is ever written.
    """
    if row.vocab is None:
        column, present = v, inside
    else:
        slot = cursor + tl.arange(0, BLOCK)
        ids = tl.load(row.vocab + slot, mask=slot < row.size, other=-1)
        here = (ids >= start) & (ids - start < BLOCK)
        count = tl.histogram(tl.where(here, ids - start, 0), BLOCK, mask=here)
        column = cursor + tl.cumsum(count, 0) - count
        present = inside & (count > 0) & (column < row.size)
        cursor += tl.sum(here.to(tl.int32), 0)
    return column, present, cursor


@triton.jit
def residual_block(start, cursor, c, target, p_found, draft, q_found, drafted, BLOCK: tl.constexpr):
    """(weights (p - c q)+ of the tokens start .. start+BLOCK-1, the next block's cursor).

    Without a draft row q is a point mass at `drafted`. The target is not greedy: then its token is known.
    """
    v = start + tl.arange(0, BLOCK)
    inside = v < target.size
    weights = prob(target, p_found, logits_at(target, v, inside, v), v)
    if c > 0:
        if draft.data is None:
            q = (v == drafted).to(tl.float32)
        else:
            column, present, cursor = block_columns(draft, start, cursor, v, inside, BLOCK)
            q = tl.where(present, prob(draft, q_found, logits_at(draft, column, present, v), column), 0.0)
        weights = tl.maximum(weights - c * q, 0.0)
    return weights, cursor


@triton.jit
def residual_mass(c, target, p_found, draft, q_found, drafted, BLOCK: tl.constexpr):
    """Sum of (p - c q)+, in fp64 over block sums."""
    total = tl.full((), 0.0, tl.float64)
    cursor = 0
    for start in range(0, target.size, BLOCK):
        weights, cursor = residual_block(start, cursor, c, target, p_found, draft, q_found, drafted, BLOCK)
        total += tl.sum(weights, 0).to(tl.float64)
    return total


@triton.jit
def draw(ticket, c, target, p_found, draft, q_found, drafted, BLOCK: tl.constexpr):
    """The first token at which the running sum of (p - c q)+ exceeds `ticket`, fp64 in [0, residual mass).

    Block sums find the block, a scan of that block finds the token. Where rounding leaves the scan at or under the
    ticket, the last token with weight is drawn, never one without.
    """
    lane = tl.arange(0, BLOCK)
    before = tl.full((), 0.0, tl.float64)
    token = p_found.best
    cursor = 0
    start = 0
    while start < target.size:
        weights, cursor = residual_block(start, cursor, c, target, p_found, draft, q_found, drafted, BLOCK)
        last = tl.max(tl.where(weights > 0, lane, -1), 0)
        token = tl.where(last >= 0, start + last, token)
        after = before + tl.sum(weights, 0).to(tl.float64)
        if after > ticket:
            above = (tl.cumsum(weights, 0) > (ticket - before).to(tl.float32)) & (weights > 0)
            token = start + tl.min(tl.where(above, lane, last), 0)
            start = target.size
        else:
            before = after
            start += BLOCK
    return token
