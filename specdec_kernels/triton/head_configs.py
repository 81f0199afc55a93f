"""Tiles and launch options of the head's kernels, as data: by device, by bytes of a stored element, by batch.

None of these was tuned: no GPU was at hand. They follow from three demands, in this order. What is in flight on an SM
(num_stages - 1 tiles of block_r x block_d, times the programs beside each other) must cover bandwidth times latency: on
an H200 36 bytes/ns x 1 us = 36 KiB, and twice that to be safe. Two programs must fit on an SM, so that one reads while
the other ranks. And a block holds all requests if it can, so that no row is read twice.

Up to the first batch of each table the fp32 units multiply. An H200 delivers 2.4e12 bf16 elements a second, 10.7 a
clock to each SM, and of its 128 lanes every element takes one instruction to convert and about 1.5 for each vector; so
4 vectors would fill half of them, 8 all. Tensor cores do 16 vectors in the time of one, so they take over early, with
rows of zeros where the batch has none.
"""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """How a scan is launched."""

    dot: bool  # tensor cores, or the fp32 units
    block_b: int  # hidden vectors of a program
    block_r: int  # rows of a tile
    block_d: int  # stored columns of a row at a time; int4 on tensor cores takes a group at a time
    num_warps: int
    num_stages: int
    beside: int  # programs on an SM


# device -> bytes of a stored element (int4 counts as 0) -> (largest batch, Config), ascending; the last takes the rest.
_HOPPER = {
    4: (
        (4, Config(False, 4, 32, 128, 4, 4, 2)),
        (16, Config(True, 16, 64, 64, 4, 4, 2)),
        (32, Config(True, 32, 64, 64, 4, 3, 2)),
        (64, Config(True, 64, 64, 32, 4, 4, 2)),
    ),
    2: (
        (2, Config(False, 2, 32, 256, 4, 4, 3)),
        (16, Config(True, 16, 64, 128, 4, 4, 2)),
        (32, Config(True, 32, 64, 128, 4, 4, 2)),
        (64, Config(True, 64, 128, 64, 4, 4, 2)),
        (256, Config(True, 128, 128, 64, 8, 4, 1)),
    ),
    1: (
        (1, Config(False, 1, 32, 512, 4, 4, 3)),
        (16, Config(True, 16, 64, 128, 4, 4, 2)),
        (64, Config(True, 64, 64, 128, 4, 3, 2)),
    ),
    0: (
        (1, Config(False, 1, 32, 256, 4, 4, 3)),
        (16, Config(True, 16, 64, 64, 4, 4, 2)),
        (64, Config(True, 64, 64, 64, 4, 3, 2)),
    ),
}


def _limited(table: dict, **most: int) -> dict:
    """`table` with at most these num_stages, or programs beside each other."""

    def limited(config: Config) -> Config:
        return config._replace(**{name: min(getattr(config, name), value) for name, value in most.items()})

    return {size: tuple((batch, limited(config)) for batch, config in rows) for size, rows in table.items()}


CONFIGS = {
    "sm_80": _limited(_HOPPER, num_stages=3),
    "sm_90": _HOPPER,
    "sm_100": _HOPPER,
    "sm_120": _limited(_HOPPER, num_stages=3),
    "gfx942": _limited(_HOPPER, num_stages=2, beside=2),  # two stages are one tile of LDS and one of registers
}
# Logits that a lane holds: with draws or exact sums several numbers of 64 bits belong to each.
LOGITS_OF_A_LANE, WIDE_LOGITS_OF_A_LANE = 64, 32
# A merge holds all candidates of a request in registers.
MOST_CANDIDATES = 16384
# Where a kernel can be launched before the one that it follows has ended (programmatic dependent launch), a merge costs
# its own time but not that of its launch, which would be 5% of the shortest scans.
OVERLAPPING = ("sm_90", "sm_100", "sm_120")
