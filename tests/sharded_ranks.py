"""What the ranks of test_sharded.py run; a module of its own, because every rank is a fresh process that imports it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import specdec_kernels as sk
from head_cases import inputs, whole
from specdec_kernels import backends

INF = float("inf")
HEIGHT = 1000
# Where shards end: uneven ones, and one without rows.
ENDS = {1: [HEIGHT], 2: [707, HEIGHT], 4: [150, 150, 611, HEIGHT]}


class Case(NamedTuple):
    """A head, and how it is called; `by_row` holds the arguments that a shard takes its rows of."""

    hidden: Tensor
    weight: Tensor | sk.QuantizedHead
    k: int
    backend: str
    by_row: dict[str, Tensor]
    rest: dict
    ids: Tensor | None = None  # token_ids; None: consecutive rows

    def call(self, size: int, number: int, group) -> tuple:
        """The answer of one rank of `size`; without a group that of `head_topk` or `head_sample` on all rows."""
        low, high = [0, *ENDS[size]][number : number + 2]
        options = {name: values[low:high] for name, values in self.by_row.items()} | self.rest
        sampled = "rng" in options
        if group is None:
            names = {} if self.ids is None else {"token_ids": self.ids}
            op = sk.head_sample if sampled else sk.head_topk
        else:
            names = {"first_row": low} if self.ids is None else {"token_ids": self.ids[low:high]}
            op = sk.sharded_head_sample if sampled else sk.sharded_head_topk
            options["group"] = group
        return tuple(
            op(self.hidden, part_of(self.weight, low, high), self.k, backend=self.backend, **names, **options)
        )[:4]


def part_of(weight: Tensor | sk.QuantizedHead, low: int, high: int) -> Tensor | sk.QuantizedHead:
    """Some rows."""
    if isinstance(weight, sk.QuantizedHead):
        return weight._replace(values=weight.values[low:high], scales=weight.scales[low:high])
    return weight[low:high]


def served() -> list[str]:
    """The backends that have `head_part` here."""
    return [
        name for name in ("reference", "cpu") if backends.why_not("head_part", name, "cpu", dtype=torch.float32) is None
    ]


def cases() -> dict[str, Case]:
    """The same in every process."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for backend in served():
        for dtype in (torch.float32, torch.bfloat16):
            # The reference's matrix product may round by its shape, so its logits are whole numbers; ties all over.
            make = whole if backend == "reference" else inputs
            for batch in (1, 6):
                hidden, weight = make(batch, HEIGHT, 24, dtype, seed=batch)
                index = torch.arange(batch)
                rng = sk.Philox(index + 2**40, index * 5, index.to(torch.int32))
                warmth = torch.tensor([0.7, 0.0, 1.3, 1e-6, 4.0, 1.0])[:batch]
                bias = torch.where(torch.rand(HEIGHT, generator=generator) < 0.2, -INF, 1.0)
                bias[:150] = -INF  # a shard in which nothing is allowed
                scale = torch.rand(HEIGHT, generator=generator).round(decimals=1)
                names = torch.randperm(9000, generator=generator)[:HEIGHT].to(torch.int32)
                weighted = {"bias": bias, "scale": scale}
                label = f"{backend} {str(dtype).removeprefix('torch.')} B={batch}"
                plain = Case(hidden, weight, 8, backend, {}, {})
                found |= {
                    f"{label} topk": plain,
                    f"{label} draws": plain._replace(rest={"rng": rng, "temperature": warmth}),
                    f"{label} 64 draws, names": plain._replace(k=64, rest={"rng": rng}, ids=names),
                    f"{label} bias and scale": plain._replace(by_row=weighted, rest={"temperature": 0.8}),
                    f"{label} draws, bias and scale": plain._replace(by_row=weighted, rest={"rng": rng}, ids=names),
                }
        if backend == "cpu":  # products of a quantised weight are no whole numbers
            for kind in ("int8", "int4", "fp8"):
                hidden, weight = inputs(3, HEIGHT, 150, seed=7)
                quantised = Case(hidden, sk.quantize_head(weight, kind), 8, backend, {}, {})
                found[f"{backend} {kind}"] = quantised
                rng = sk.Philox(torch.arange(3), torch.arange(3) * 9)
                found[f"{backend} {kind} draws"] = quantised._replace(rest={"rng": rng, "temperature": 0.9})
        hidden, weight = whole(4, HEIGHT, 24, seed=9)
        tied = Case(hidden, weight, 64, backend, {}, {})
        few = torch.full((HEIGHT,), -INF)
        few[[3, 700, 998]] = 0.0
        sick = torch.zeros(HEIGHT)
        sick[640] = float("nan")
        dirty = hidden.clone()
        dirty[2, 5] = INF
        empty = Case(hidden[:0], weight, 3, backend, {}, {})
        found |= {
            f"{backend} ties": tied,
            f"{backend} fewer than k": tied._replace(k=5, by_row={"bias": few}),
            f"{backend} nothing": tied._replace(k=2, by_row={"bias": torch.full((HEIGHT,), -INF)}),
            f"{backend} NaN on one rank": tied._replace(k=2, by_row={"bias": sick}),
            f"{backend} one broken request": tied._replace(hidden=dirty, k=4),
            f"{backend} no request": empty,
        }
    return found


def run(rank: int, ranks: int, store: str, out: str) -> None:
    """One rank: all cases over everyone, and over pairs of ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    pairs = [dist.new_group([first, first + 1]) for first in range(0, ranks, 2)]
    groups = {ranks: (dist.group.WORLD, rank), 2: (pairs[rank // 2], rank % 2)}
    answers = {
        f"{name}, {size} ranks": case.call(size, number, group)
        for name, case in cases().items()
        for size, (group, number) in groups.items()
    }
    # The default group, and what a rank says that is no member of a group.
    plain = cases()[f"{served()[0]} ties"]
    low, high = [0, *ENDS[ranks]][rank : rank + 2]
    answers["default group"] = tuple(
        sk.sharded_head_topk(plain.hidden, plain.weight[low:high], plain.k, first_row=low, backend=plain.backend)
    )[:4]
    try:
        sk.sharded_head_topk(plain.hidden, plain.weight, first_row=0, group=pairs[1 - rank // 2])
    except ValueError as error:
        answers["stranger"] = str(error)
    torch.save(answers, f"{out}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
