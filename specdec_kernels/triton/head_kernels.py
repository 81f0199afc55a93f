"""The two kernels of the head: one reads the weight and keeps a few numbers of it, the other merges what was kept.

Nothing of size [B, R] exists outside registers unless the caller asked for it: a program leaves K candidates and three
sums for each request, and there are no more programs than run at once.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .head_noise import noise
from .head_select import LAST, Sums, inverse_of, kept, moved, no_best, no_sums, summed
from .head_weights import Hidden, Weight, dot, finished, gemv, tile_at


class Draws(NamedTuple):
    """What the draws of a block's requests depend on, [BLOCK_B] each; seed is None where nothing is drawn."""

    seed: tl.tensor  # int64
    offset: tl.tensor  # int64
    row: tl.tensor  # int32
    temperature: tl.tensor  # fp32


@triton.jit
def keys_of(logits, tile, draws, TIES: tl.constexpr, BLOCK_R: tl.constexpr):
    """What ranks the logits: themselves, or logit / temperature + noise in fp64.

    fp64, because near temperature 0 a quotient in fp32 is too coarse for the noise that is added to it.
    """
    if draws.seed is None:
        return logits
    else:
        hot = draws.temperature > 0
        inverse = (1.0 / tl.where(hot, draws.temperature, 1.0).to(tl.float64))[:, None]
        luck = noise(
            draws.seed[:, None], draws.offset[:, None], draws.row[:, None], tile.id, tile.start, TIES == "plain",
            BLOCK_R,
        )  # fmt: skip
        exact = logits.to(tl.float64)
        return tl.where(hot[:, None], exact * inverse + luck.to(tl.float64), exact)


@triton.jit
def looked_at(
    best, sums, hidden, weight, draws, start, group, member, all_logits,
    FORMAT: tl.constexpr, TIES: tl.constexpr, EXACT: tl.constexpr, K: tl.constexpr, DOT: tl.constexpr,
    TYPE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """`best` and `sums` with the tile at `start` of the rows of `group`, for the requests that are `member`."""
    tile = tile_at(weight, start, group, BLOCK_R)
    if DOT:
        logits = dot(hidden, weight, tile, FORMAT, BLOCK_B, BLOCK_R, BLOCK_D, STAGES, TYPE, PRECISION)
    else:
        logits = gemv(hidden, weight, tile, FORMAT, BLOCK_B, BLOCK_R, BLOCK_D, STAGES)
    logits = finished(logits, weight, tile, member, FORMAT)
    if all_logits is not None:
        at = start + tl.arange(0, BLOCK_R)
        b = hidden.first + tl.arange(0, BLOCK_B)
        out = all_logits + b[:, None] * weight.count + at[None, :]
        tl.store(out, logits, mask=member[:, None] & (at < weight.count)[None, :])
    fine = logits < float("inf")
    sound = tl.min(fine.to(tl.int32), 1) > 0
    logits = tl.where(fine, logits, -float("inf"))
    sums = summed(sums, logits, sound, inverse_of(draws.temperature, EXACT), EXACT)
    # A token may be named by more than one row; its rows are told apart by their places in the tile.
    tie = tile.id
    if TIES == "short":
        tie = tile.id * BLOCK_R + tl.arange(0, BLOCK_R)
    elif TIES == "long":
        tie = tile.id.to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    key = keys_of(logits, tile, draws, TIES, BLOCK_R)
    best = kept(best, key, logits, tie, draws.seed is not None, 1 if TIES == "plain" else BLOCK_R, K)
    return best, sums


@triton.jit(do_not_specialize=["B", "G"])
def scan_kernel(
    hidden,  # [B, D]
    weight,  # [V, D], or [V, 64 * groups] bytes of int4; fp8 as bytes
    scale,  # [V] fp32, or [V, groups] of int4; or None
    bias,  # [V], or None
    rows,  # [R], or [G, R] with row_groups, or [B, R]; int32; or None
    row_groups,  # [B] int32, or None
    token_ids,  # [V] int32, or None
    temperatures,  # [B] fp32; None: the number below
    seed,  # [B] int64, or None: nothing is drawn
    offset,  # [B] int64
    row,  # [B] int32, or None
    keys,  # [B, programs, K] fp64; fp32 where nothing is drawn
    ids,  # [B, programs, K] int32
    logits,  # [B, programs, K] fp32; None where keys are logits
    sums,  # [B, programs, 3] fp32; fp64 where EXACT
    all_logits,  # [B, R] fp32, or None
    temperature,
    B,
    D,
    V,
    R,
    G,
    hidden_stride,
    hidden_column_stride,
    weight_stride,
    weight_column_stride,
    rows_stride,  # 0 where all requests share rows
    FORMAT: tl.constexpr,  # dense, int8, fp8, int4
    GROUPING: tl.constexpr,  # shared, own, groups: whose rows a request looks at
    TIES: tl.constexpr,  # plain: ids ascend and none comes twice; short, long: what holds id * BLOCK_R
    EXACT: tl.constexpr,
    K: tl.constexpr,
    SLOTS: tl.constexpr,  # power of two >= K
    DOT: tl.constexpr,
    TYPE: tl.constexpr,  # of the operands of DOT
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The tiles program_id(1), program_id(1) + programs, .. of the rows, for block program_id(0) of the requests.

    Blocks come first in the grid: where there are several, those that read the same rows run beside each other, and all
    but one find them in the L2 cache.
    """
    if OVERLAP:  # the merge may be launched as soon as all programs run; it waits for their end before it reads
        gdc_launch_dependents()
    first = tl.program_id(0).to(tl.int64) * BLOCK_B
    program, programs = tl.program_id(1), tl.num_programs(1)
    b = first + tl.arange(0, BLOCK_B)
    member = b < B
    heat = tl.zeros([BLOCK_B], tl.float32) + temperature
    if temperatures is not None:
        heat = tl.load(temperatures + b, mask=member, other=1.0)
    key, position, line = None, None, None
    if seed is not None:
        key, position = tl.load(seed + b, mask=member, other=0), tl.load(offset + b, mask=member, other=0)
        line = tl.zeros([BLOCK_B], tl.int32)
        if row is not None:
            line = tl.load(row + b, mask=member, other=0)
    draws = Draws(seed=key, offset=position, row=line, temperature=heat)
    vectors = Hidden(data=hidden, stride=hidden_stride, column_stride=hidden_column_stride, first=first, size=B)
    matrix = Weight(
        data=weight, stride=weight_stride, column_stride=weight_column_stride, scale=scale, bias=bias, rows=rows,
        rows_stride=rows_stride, token_ids=token_ids, height=V, dim=D, count=R,
    )  # fmt: skip
    best = no_best(BLOCK_B, SLOTS, K, keys.dtype.element_ty)
    found = no_sums(BLOCK_B, EXACT)
    for tile in range(program, tl.cdiv(R, BLOCK_R), programs):
        if GROUPING == "groups":
            # Requests of one group read its rows once, wherever in the block they stand; neighbours in the batch do.
            group = tl.load(row_groups + b, mask=member, other=0)
            group = tl.where((group >= 0) & (group < G), group, -1)
            open = member
            while tl.max(open.to(tl.int32), 0) > 0:
                this = tl.min(tl.where(open, group, LAST), 0)
                same = open & (group == this)
                best, found = looked_at(
                    best, found, vectors, matrix, draws, tile * BLOCK_R, this, same, all_logits,
                    FORMAT, TIES, EXACT, K, DOT, TYPE, PRECISION, BLOCK_B, BLOCK_R, BLOCK_D, STAGES,
                )  # fmt: skip
                open = open & ~same
        else:
            group = first if GROUPING == "own" else first * 0
            best, found = looked_at(
                best, found, vectors, matrix, draws, tile * BLOCK_R, group, member, all_logits,
                FORMAT, TIES, EXACT, K, DOT, TYPE, PRECISION, BLOCK_B, BLOCK_R, BLOCK_D, STAGES,
            )  # fmt: skip
    slot = tl.arange(0, SLOTS)
    out = (b[:, None] * programs + program) * K + slot[None, :]
    inside = member[:, None] & (slot < K)[None, :]
    tl.store(keys + out, best.key, mask=inside)
    tl.store(ids + out, best.id, mask=inside)
    if logits is not None:
        tl.store(logits + out, best.logit, mask=inside)
    out = sums + (b * programs + program) * 3
    tl.store(out, found.anchor, mask=member)
    tl.store(out + 1, found.sum, mask=member)
    tl.store(out + 2, found.weighted, mask=member)


@triton.jit(do_not_specialize=["programs"])
def merge_kernel(
    keys,  # what scan_kernel left
    ids,
    logits,
    sums,
    temperatures,
    out_keys,  # [B, K] fp64, or None
    out_logits,  # [B, K] fp32
    out_tokens,  # [B, K] int32
    out_lse,  # [B] fp32; None where EXACT
    out_entropy,  # [B] fp32; None where EXACT
    out_sums,  # [B, 3] fp64; None but where EXACT
    temperature,
    programs,
    EXACT: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,  # power of two >= programs
    SIZE: tl.constexpr,  # power of two >= programs * K
    OVERLAP: tl.constexpr,
):
    """The results of request program_id(0). All it has to look at fits in registers, so rounds are short."""
    if OVERLAP:
        gdc_wait()
    b = tl.program_id(0).to(tl.int64)
    heat = tl.cast(temperature, tl.float32)
    if temperatures is not None:
        heat = tl.load(temperatures + b)
    lane = tl.arange(0, WIDTH)
    at = sums + (b * programs + lane) * 3
    inside = lane < programs
    parts = Sums(
        anchor=tl.load(at, mask=inside, other=-float("inf")).to(tl.float64),
        sum=tl.load(at + 1, mask=inside, other=0.0).to(tl.float64),
        weighted=tl.load(at + 2, mask=inside, other=0.0).to(tl.float64),
    )
    inverse = 1.0 / tl.where(heat > 0, heat, 1.0).to(tl.float64)
    anchor = tl.max(parts.anchor, 0)
    parts = moved(parts, anchor + tl.zeros([WIDTH], tl.float64), inverse, EXACT)
    total, weighted = tl.sum(parts.sum, 0), tl.sum(parts.weighted, 0)
    sound = total == total
    if EXACT:
        tl.store(out_sums + b * 3, anchor)
        tl.store(out_sums + b * 3 + 1, total)
        tl.store(out_sums + b * 3 + 2, tl.where(sound, weighted, float("nan")))
    else:
        whole = tl.where(total > 0, total, 1.0)
        mass = tl.log(whole)
        lse = tl.where(total == 0, -float("inf"), tl.where(sound, anchor * inverse + mass, float("nan")))
        entropy = tl.where(total == 0, 0.0, tl.where(sound, mass - weighted / whole, float("nan")))
        tl.store(out_lse + b, lse.to(tl.float32))
        tl.store(out_entropy + b, entropy.to(tl.float32))

    lane = tl.arange(0, SIZE)
    at = b * programs * K + lane
    inside = lane < programs * K
    key = tl.load(keys + at, mask=inside, other=-float("inf"))
    tie = tl.load(ids + at, mask=inside, other=LAST).to(tl.int64) * SIZE + lane
    logit = key
    if logits is not None:
        logit = tl.load(logits + at, mask=inside, other=-float("inf"))
    key = tl.where(sound, key, -float("inf"))
    for i in range(K):
        top = tl.max(key, 0)
        first = tl.min(tl.where(key == top, tie, 0x7FFFFFFFFFFFFFFF), 0)
        here = tie == first
        real = top > -float("inf")
        value = top
        if logits is not None:
            value = tl.where(real, tl.max(tl.where(here, logit, -float("inf")), 0), -float("inf"))
        tl.store(out_logits + b * K + i, value.to(tl.float32))
        tl.store(out_tokens + b * K + i, tl.where(real, (first // SIZE).to(tl.int32), -1))
        if out_keys is not None:
            tl.store(out_keys + b * K + i, top.to(tl.float64))
        key = tl.where(here, -float("inf"), key)
