"""Sizes of tiles, by GPU and by shape: data, chosen by `choose`.

No GPU was at hand: these come from what `tests/triton_aot_attention.py --full` reports of the compiled kernels, whose
loop over the prefix must not spill and whose shared memory must let `per_sm` programs live on one SM. Once measured,
a GPU gets a table of its own.
"""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """One way to compile the attention kernels."""

    rows: int  # of a tile: nodes times query heads of one KV head
    slots: int  # of a block
    num_warps: int
    num_stages: int
    per_sm: int  # programs that one SM holds at a time; their number decides how finely slots are split


# Bytes of one slot's keys as they are multiplied -> (slots of a block, stages in shared memory).
_BLOCKS = {
    "large": {64: (128, 3), 128: (128, 2), 256: (64, 2), 512: (32, 2), 1024: (16, 2), 2048: (16, 1)},
    "medium": {64: (64, 3), 128: (64, 3), 256: (32, 3), 512: (16, 3), 1024: (16, 1), 2048: (16, 1)},
    "small": {64: (64, 2), 128: (64, 2), 256: (32, 2), 512: (16, 2), 1024: (16, 1), 2048: (16, 1)},
}
# Architectures by the shared memory of one program: 163 KB or more, 99 KB, 64 KB.
_MEMORY = {"sm_80": "large", "sm_90": "large", "sm_100": "large", "sm_103": "large"}


def choose(arch: str, wide: int, compute: int, rows: int, paged: bool) -> Config:
    """The configuration for one GPU and shape.

    Args:
        arch: e.g. `sm_90`, `gfx942`, `interpreter`.
        wide: the larger head size, a power of two.
        compute: bytes of a number that is multiplied.
        rows: the most rows that one request has for one KV head.
        paged: whether a slot's place has to be looked up first.
    """
    memory = _MEMORY.get(arch, "small" if arch.startswith("gfx") else "medium")
    slots, stages = _BLOCKS[memory][min(max(wide * compute, 64), 2048)]
    # The accumulator, [rows, wide] in fp32, lives in registers: at most 64 of them a thread, 32 where the operands of
    # products in fp32, which no tensor core does, live there too.
    most = max(min(16384 // wide, 128) if compute == 2 else min(4096 // wide, 32), 16)
    tile = 16
    while tile < min(rows, most):
        tile *= 2
    if memory == "large" and tile <= 32 and stages == 2:
        stages = 3  # small tiles leave memory for more loads under way
    if paged and stages > 1:
        stages += 1  # the load of the block table is a stage of its own
    num_warps = 8 if tile * wide > 8192 or tile == 128 else 4
    return Config(tile, slots, num_warps, stages, 1 if num_warps == 8 else 2)
