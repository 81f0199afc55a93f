"""What a head of some rows costs on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from specdec_kernels import Philox, head_sample, head_topk

from .rows import select_rows

LEAST_ROUNDS = 3


class Latency(NamedTuple):
    """Seconds of a head, as a curve over its rows."""

    sizes: Tensor  # [n] int64, ascending: the sizes that were measured
    seconds: Tensor  # [n] fp64, never falling

    @classmethod
    def of_samples(cls, sizes: Sequence[int], samples: Tensor) -> Latency:
        """The curve below noisy measurements.

        Whatever disturbs a measurement adds to it, so the best of the rounds counts. More rows never take less time,
        so what a size took bounds all smaller ones: a size that was disturbed in every round is put right by the next.

        Args:
            sizes: n sizes, ascending, each once.
            samples: [rounds, n] seconds > 0.

        Raises:
            ValueError: sizes or samples that do not fit.
        """
        sizes, samples = torch.as_tensor(sizes, dtype=torch.int64), torch.as_tensor(samples, dtype=torch.float64)
        if sizes.ndim != 1 or not len(sizes) or not bool((sizes.diff() > 0).all()):
            raise ValueError(f"sizes: expected ascending sizes, each once, got {sizes.tolist()}")
        if samples.ndim != 2 or samples.shape[0] < 1 or samples.shape[1] != len(sizes):
            raise ValueError(f"samples: expected shape [rounds, {len(sizes)}], got {list(samples.shape)}")
        if not bool((samples > 0).all() and samples.isfinite().all()):
            raise ValueError(
                f"samples: expected finite seconds > 0, got {float(samples.min())}..{float(samples.max())}"
            )
        best = samples.amin(0)
        return cls(sizes, best.flip(0).cummin(0).values.flip(0))

    def at(self, sizes: Tensor | Sequence[int]) -> Tensor:
        """[m] fp64 seconds at any sizes within the measured ones, linear between them.

        Raises:
            ValueError: a size outside of what was measured.
        """
        sizes = torch.as_tensor(sizes)
        low, high = int(self.sizes[0]), int(self.sizes[-1])
        if len(sizes) and not (int(sizes.min()) >= low and int(sizes.max()) <= high):
            raise ValueError(f"sizes: expected {low}..{high}, as measured, got {int(sizes.min())}..{int(sizes.max())}")
        return torch.from_numpy(np.interp(sizes.numpy(), self.sizes.numpy(), self.seconds.numpy()))


def time_calls(
    calls: Sequence[Callable[[], object]],
    *,
    device: torch.device | str = "cpu",
    between: Callable[[], object] | None = None,
    rounds: int = 20,
    seconds: float = 30.0,
    label: str = "measuring",
    console: Console | None = None,
) -> Tensor:
    """Time calls in turn, round by round, so that what the machine does besides falls on all of them.

    Args:
        calls: n functions without arguments. Each runs a second time before it is timed, so that it finds in the caches
            what it left there itself, and nothing of a neighbour that reads the same memory.
        device: whose work a call's time includes.
        between: runs between those two, outside the time: what a decoder does between two such calls, which decides
            what of the first is still in the caches.
        rounds: how often each is timed.
        seconds: no round begins after this time, but three rounds are run.
        label, console: a progress bar and where it goes; None for none.

    Returns:
        [rounds, n] fp64 seconds.
    """
    if rounds < LEAST_ROUNDS:
        raise ValueError(f"rounds: expected >= {LEAST_ROUNDS}, got {rounds}")
    wait = partial(torch.cuda.synchronize, device) if torch.device(device).type == "cuda" else lambda: None
    samples: list[list[float]] = []
    began = time.perf_counter()
    for _ in track(range(rounds), label, console=console, disable=console is None):
        if len(samples) >= LEAST_ROUNDS and time.perf_counter() - began > seconds:
            break
        row = []
        for call in calls:
            call()
            if between is not None:
                between()
            wait()
            start = time.perf_counter()
            call()
            wait()
            row.append(time.perf_counter() - start)
        samples.append(row)
    return torch.tensor(samples, dtype=torch.float64)


@torch.no_grad()
def measure_head(
    weight: Tensor,
    order: Tensor,
    sizes: Sequence[int],
    *,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    batch: int = 1,
    temperature: float = 0.0,
    between: Callable[[], object] | None = None,
    rounds: int = 20,
    seconds: float = 30.0,
    console: Console | None = None,
) -> Latency:
    """Measure a head on its own weight, with the rows that each size would gather; all V rows without a gather.

    Args:
        weight: [V, D], where it lies and as it is: nothing is copied.
        order: [V] integer, all ids, best first (see `frequency_order`).
        sizes: ascending sizes in 1..V.
        bias, scale: of the head ops, [V].
        batch: requests that are drafted for at once.
        temperature: 0 times `head_topk` with k = 1, as greedy chains call it; above, `head_sample`, which also writes
            the logits that verification needs as q.
        between, rounds, seconds, console: see `time_calls`.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(batch, weight.shape[1], generator=generator).to(weight)
    options = {"bias": bias, "scale": scale}
    if temperature > 0:
        zeros = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        op = partial(
            head_sample, hidden, weight, 1, rng=Philox(zeros, zeros), temperature=temperature, return_logits=True
        )
    else:
        op = partial(head_topk, hidden, weight, 1)
    whole = weight.shape[0]
    calls = [
        partial(op, rows=None if size == whole else select_rows(order, size).to(weight.device), **options)
        for size in sizes
    ]
    samples = time_calls(
        calls, device=weight.device, between=between, rounds=rounds, seconds=seconds, label="head", console=console
    )
    return Latency.of_samples(sizes, samples)
