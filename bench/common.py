"""What every benchmark shares: rounds in which all candidates take turns, the machine's limits, ratios for times.

A round runs every baseline, every limit and then the candidate, so that a disturbance of the machine meets all of
them; each keeps its best round. Ratios and shares of a limit go to `extra_info`, where bench/report.py finds them.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def require_pinned_threads() -> None:
    """Skip where threads may wander: short ops then vary by more than what is measured."""
    if os.environ.get("OMP_PROC_BIND", "").lower() not in ("true", "close", "spread", "master", "primary"):
        pytest.skip("threads are not pinned: set OMP_PROC_BIND=true OMP_PLACES=cores")


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def readers(tensor: Tensor) -> dict[str, Callable[[], object]]:
    """Ways to read all bytes of a contiguous tensor once; the fastest is the machine's read bandwidth."""
    flat = tensor.view(-1)
    ints, longs = flat.view(torch.int32), flat.view(torch.int64)
    return {"amax": lambda: torch.amax(ints), "sum": lambda: torch.sum(longs), "min": lambda: torch.amin(ints)}


def compare(
    benchmark,
    candidate: Callable[[], object],
    baselines: dict[str, Callable[[], object]],
    *,
    memory: Tensor | None = None,
    copy: tuple[Callable[[], object], int] | None = None,
    bytes_read: int = 0,
    rounds: int = 10,
) -> None:
    """Measure `candidate` against `baselines`, and against the bandwidth of this machine.

    Stores `speedup_<baseline>` (its time / the candidate's, best rounds), `median_speedup_<baseline>` (medians) and
    `fraction_<limit>` (bytes_read per second of the candidate / bytes per second of the limit) in the benchmark's
    extra_info, and prints them.

    Args:
        benchmark: pytest-benchmark's fixture.
        candidate, baselines: what is called.
        memory: gives the limit `read_bandwidth`, that of the fastest way to read this tensor.
        copy: gives the limit `copy_bandwidth`: a call, and the bytes that it reads and writes.
        bytes_read: what one call of the candidate has to read.
        rounds: how often everything is run.
    """
    require_pinned_threads()
    limits: dict[str, tuple[list[Callable[[], object]], int]] = {}
    if memory is not None:
        limits["read"] = (list(readers(memory).values()), memory.nbytes)
    if copy is not None:
        limits["copy"] = ([copy[0]], copy[1])
    others = {f"baseline {name}": f for name, f in baselines.items()}
    others |= {f"{name} {i}": f for name, (ways, _) in limits.items() for i, f in enumerate(ways)}
    seen: dict[str, list[float]] = {name: [] for name in others}

    def before_each_round():
        for name, function in others.items():
            seen[name].append(timed(function))

    benchmark.pedantic(candidate, setup=before_each_round, rounds=rounds, warmup_rounds=1)
    if benchmark.stats is None:  # --benchmark-disable: the candidate ran once, for its errors
        return
    seconds, best = benchmark.stats.stats.min, {name: min(times) for name, times in seen.items()}
    for name in baselines:
        benchmark.extra_info[f"speedup_{name}"] = best[f"baseline {name}"] / seconds
        middle = statistics.median(seen[f"baseline {name}"])
        benchmark.extra_info[f"median_speedup_{name}"] = middle / benchmark.stats.stats.median
    for name, (ways, moved) in limits.items():
        bandwidth = moved / min(best[f"{name} {i}"] for i in range(len(ways)))
        benchmark.extra_info[f"{name}_gb_per_s"] = bandwidth / 1e9
        benchmark.extra_info[f"fraction_{name}_bandwidth"] = bytes_read / seconds / bandwidth
    ratios = ", ".join(
        f"{name} {value:.2f}" for name, value in benchmark.extra_info.items() if isinstance(value, float)
    )
    print(f"\n{benchmark.name}: {ratios}")
