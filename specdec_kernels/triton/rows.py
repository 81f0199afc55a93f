"""Row primitives: what a verifier needs to know of one vocabulary-wide row of logits.

No primitive keeps anything of the row's size: each reads the row block by block, in the dtype in which the model left
it.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

# Of a temperature near 0 the reciprocal overflows; a finite one still makes 0 * inverse = 0 at the peak.
LARGEST_INVERSE = tl.constexpr(1.7e38)


class Rows(NamedTuple):
    """The logits of all nodes and what one request makes of them. Strides are in elements."""

    data: tl.tensor  # pointer to [N, size] logits; None: no logits, each token was a point mass
    stride: tl.tensor
    column_stride: tl.tensor
    size: tl.tensor  # columns: V, or R with vocab
    words: tl.tensor  # pointer to the [N, ceil(V/32)] allowed bit mask over token ids, or None
    words_stride: tl.tensor
    word_stride: tl.tensor
    vocab: tl.tensor  # pointer to [R] ascending token ids of the columns; None: column = token id
    other: tl.tensor  # pointer to [N, size] logits that are mixed in, or None
    other_stride: tl.tensor
    other_column_stride: tl.tensor
    mix: tl.tensor  # fp32 share of `other`
    temperature: tl.tensor  # fp32
    top_k: tl.tensor  # fp32 each; None where no request filters
    top_p: tl.tensor
    min_p: tl.tensor


class Row(NamedTuple):
    """One row of logits and how it becomes probabilities."""

    data: tl.tensor  # pointer to the first logit; None: no row, the token was a point mass
    stride: tl.tensor  # elements between columns
    size: tl.tensor  # columns: V, or R with vocab
    words: tl.tensor  # pointer to the row of the allowed bit mask over token ids, or None
    words_stride: tl.tensor  # elements between words
    vocab: tl.tensor  # pointer to [R] ascending token ids of the columns; None: column = token id
    other: tl.tensor  # pointer to the first logit that is mixed in, or None
    other_stride: tl.tensor  # elements between its columns
    mix: tl.tensor  # fp32 share of `other`
    cut: tl.tensor  # fp32; smaller logits are filtered out
    inverse_temperature: tl.tensor  # fp32; 1 where greedy
    greedy: tl.tensor  # int1, a point mass at the largest logit instead of a softmax


class Lse(NamedTuple):
    """What passes over a row found."""

    top: tl.tensor  # fp32, the largest logit
    best: tl.tensor  # its lowest column
    mass: tl.tensor  # fp32, sum of exp((x - top) / temperature) over what the filters leave
    cut: tl.tensor  # fp32, smaller logits are filtered out


@triton.jit
def no_lse():
    """Lse of a row that was not read."""
    zero = tl.full((), 0.0, tl.float32)
    return Lse(top=zero, best=tl.full((), 0, tl.int32), mass=zero, cut=zero)


@triton.jit
def row_at(rows, i, cut_at):
    """Row i, of which logits below `cut_at` are filtered out."""
    hot = rows.temperature > 0
    data, words, other = rows.data, rows.words, rows.other
    if data is not None:
        data += i * rows.stride
    if words is not None:
        words += i * rows.words_stride
    if other is not None:
        other += i * rows.other_stride
    return Row(
        data=data, stride=rows.column_stride, size=rows.size, words=words, words_stride=rows.word_stride,
        vocab=rows.vocab, other=other, other_stride=rows.other_column_stride, mix=rows.mix, cut=cut_at,
        inverse_temperature=tl.minimum(1.0 / tl.where(hot, rows.temperature, 1.0), LARGEST_INVERSE), greedy=~hot,
    )  # fmt: skip


@triton.jit
def logits_at(row, column, inside, token):
    """fp32 logits of `column`, -inf where not `inside`, filtered out, or `token` is not allowed. NaN stays NaN."""
    x = tl.load(row.data + column.to(tl.int64) * row.stride, mask=inside, other=-float("inf")).to(tl.float32)
    if row.other is not None:
        y = tl.load(row.other + column.to(tl.int64) * row.other_stride, mask=inside, other=-float("inf"))
        x = tl.where(inside, (1.0 - row.mix) * x + row.mix * y.to(tl.float32), -float("inf"))
    if row.words is not None:
        word = tl.load(row.words + (token >> 5).to(tl.int64) * row.words_stride, mask=inside, other=0)
        x = tl.where(((word >> (token & 31)) & 1) != 0, x, -float("inf"))
    return tl.where(x < row.cut, -float("inf"), x)


@triton.jit
def first_in(out, start, BLOCK: tl.constexpr):
    """The smallest of the ids `out` that lies in start .. start+BLOCK-1; 2^31-1 where none does."""
    return tl.min(tl.where((out >= start) & (out - start < BLOCK), out, 2147483647), 0)


@triton.jit
def struck(values, out, start, filler, BLOCK: tl.constexpr):
    """`values` of the ids start .. start+BLOCK-1 with `filler` at the ids `out` (-1: none)."""
    v = start + tl.arange(0, BLOCK)
    left = out
    gone = first_in(left, start, BLOCK)
    while gone < 2147483647:
        values = tl.where(v == gone, filler, values)
        left = tl.where(left == gone, -1, left)
        gone = first_in(left, start, BLOCK)
    return values


@triton.jit
def lse(row, V, out, BLOCK: tl.constexpr):
    """One pass over a row without the columns `out` (None: all of it).

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
        if out is not None:
            x = struck(x, out, start, -float("inf"), BLOCK)
        best = tl.where(x > peak, column, best)
        new = tl.maximum(peak, x)
        base = tl.where(new == -float("inf"), 0.0, new)  # -inf - -inf would be NaN
        total = total * tl.exp((peak - base) * row.inverse_temperature)
        total += tl.exp((x - base) * row.inverse_temperature)
        peak = new
    top = tl.max(peak, 0)
    base = tl.where(top == -float("inf"), 0.0, top)
    mass = tl.sum(total * tl.exp((peak - base) * row.inverse_temperature), 0)
    return Lse(top=top, best=tl.min(tl.where(peak == top, best, row.size), 0), mass=mass, cut=row.cut)


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
def entropy(row, found, V, BLOCK: tl.constexpr):
    """Entropy in nats of a row of the target."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, row.size, BLOCK):
        column = start + lane
        z = (logits_at(row, column, column < row.size, column) - found.top) * row.inverse_temperature
        weight = tl.exp(z)
        total += tl.where(weight > 0, weight * z, 0.0)
    soft = tl.log(found.mass) - tl.sum(total, 0) / found.mass
    return tl.where(row.greedy, 0.0, soft)


@triton.jit
def column_of(row, token):
    """(column of `token`, whether the row has it): a binary search where the row has a trimmed vocabulary."""
    column = token
    if row.vocab is not None:
        column = token * 0
        span = row.size
        while span > 1:
            half = span // 2
            low = tl.load(row.vocab + column + half - 1) < token
            column = tl.where(low, column + half, column)
            span -= half
        column += (tl.load(row.vocab + column, mask=column < row.size, other=2147483647) < token).to(tl.int32)
        present = tl.load(row.vocab + column, mask=column < row.size, other=-1) == token
    else:
        present = token < row.size
    return column, present & (token >= 0)


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
