"""Philox4x32-10 in plain PyTorch: the definition of every random number this library uses.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The key is the seed; the counter is
(offset, stream, row, column / 4) and the lane column % 4. A coin is `(x >> 8) * 2^-24`, in [0, 1).

Gumbel noise is `-log(-log1p(-v))` with `v = min((x + 0.5) * 2^-32, 1 - 2^-24)`: x rounds to the nearest fp32, then
every operation rounds once. `v` is the distance of the uniform from 1; large noise comes from a small `v`, where fp32
is fine, and ends at 33 ln 2 = 22.9. The 24 bits of a coin would end at 17 in steps of up to ln 3, but one token of a
tail of 1e-3 over a vocabulary of 128256 is drawn first only with a noise of about 19, which would never come.
"""

from __future__ import annotations

import torch
from torch import Tensor

ACCEPT, FINAL, DRAFT, ORDER = 0, 1, 2, 3  # streams

_MUL = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_ROUNDS = 10


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 bits (as int64) for each counter; the inputs broadcast, int64, and wrap to 32 bits.

    The 64-bit seed is split into the two key words. Products of 32-bit words wrap in int64, which leaves their
    bits right; the mask after the shift drops the copied sign.
    """
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1, c2, c3 = c0 & _MASK, c1 & _MASK, c2 & _MASK, c3 & _MASK
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MUL[0], c2 * _MUL[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def words(seed: Tensor, offset: Tensor, stream: int, row: Tensor, column: Tensor) -> Tensor:
    """The 32-bit word (as int64) of each `column` of a row; all arguments broadcast."""
    column = column.to(torch.int64)
    zero = torch.zeros_like(column)
    lanes = torch.stack(
        torch.broadcast_tensors(*philox(seed, offset, zero + stream, row.to(torch.int64), column >> 2)), -1
    )
    return lanes.gather(-1, (column & 3).expand(lanes.shape[:-1])[..., None])[..., 0]


def coins(seed: Tensor, offset: Tensor, stream: int, row: Tensor, column: Tensor | None = None) -> Tensor:
    """fp32 coins in [0, 1); `column` defaults to 0."""
    column = torch.zeros_like(row, dtype=torch.int64) if column is None else column
    return (words(seed, offset, stream, row, column) >> 8).to(torch.float32) * 2.0**-24


def gumbel_argument(word: Tensor) -> Tensor:
    """fp32 v in [2^-33, 1 - 2^-24] of the Gumbel `-log(-log1p(-v))` that an int64 `word` of 32 bits makes."""
    return ((word.to(torch.float32) + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)


def gumbels(seed: Tensor, offset: Tensor, row: Tensor, token_ids: Tensor) -> Tensor:
    """fp32 standard Gumbel noise keyed by vocabulary id, stream DRAFT; the arguments broadcast."""
    return _gumbel(words(seed, offset, DRAFT, row, token_ids))


def gumbel_rows(seed: Tensor, offset: Tensor, row: Tensor, vocabulary: int) -> Tensor:
    """[..., vocabulary]: `gumbels` of the ids 0, 1, 2, ... for a quarter of the work; the arguments broadcast."""
    seed, offset, row = (value.to(torch.int64)[..., None] for value in (seed, offset, row))
    block = torch.arange((vocabulary + 3) // 4, device=seed.device)
    lanes = torch.broadcast_tensors(*philox(seed, offset, torch.full_like(block, DRAFT), row, block))
    return _gumbel(torch.stack(lanes, -1).flatten(-2)[..., :vocabulary])


def _gumbel(word: Tensor) -> Tensor:
    return -torch.log(-torch.log1p(-gumbel_argument(word)))
