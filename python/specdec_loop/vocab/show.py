"""The choice of a size as a table and as a picture."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from .choice import Choice
from .latency import Latency


def table(choice: Choice, measured: Tensor, title: str, caption: str) -> Table:
    """What the model says of the measured sizes and the chosen one."""
    result = Table(title=title, caption=caption, caption_justify="left")
    for name in ("rows", "head, ms", "coverage", "tokens\nper call", "round, ms", "speed-up"):
        result.add_column(name, justify="right", no_wrap=True)
    result.add_column("")
    for size in sorted({*measured.tolist(), choice.size}):
        place = int(torch.searchsorted(choice.sizes, size))
        result.add_row(
            str(size),
            f"{choice.head_seconds[place] * 1e3:.3f}",
            f"{choice.coverage[place]:.2%}",
            f"{choice.efficiency[place]:.2f}",
            f"{choice.round_seconds[place] * 1e3:.2f}",
            f"{choice.speedup[place]:.2f}x",
            "chosen" if size == choice.size else "",
            style="bold green" if size == choice.size else None,
        )
    return result


def picture(choice: Choice, latency: Latency, path: Path, title: str) -> None:
    """Draw latency and coverage over the rows, and what they make together, with the chosen size in both."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    sizes, chosen = choice.sizes.tolist(), choice.place
    left.plot(sizes, choice.head_seconds * 1e3, color="C0")
    left.plot(latency.sizes, latency.seconds * 1e3, "o", color="C0", markersize=4)
    left.set_ylabel("head, ms (dots: measured)", color="C0")
    left.set_ylim(bottom=0)
    covered = left.twinx()
    covered.plot(sizes, choice.coverage * 100, color="C1")
    covered.plot(choice.size, choice.coverage[chosen] * 100, "o", color="C3")
    covered.set_ylabel("held-out tokens covered, %", color="C1")
    covered.set_ylim(top=101)
    right.plot(sizes, choice.speedup, color="C2")
    right.plot(choice.size, choice.speedup[chosen], "o", color="C3")
    right.set_ylabel("speed-up over plain decoding")
    whole = f"{choice.speedup[chosen]:.2f}x; all {sizes[-1]} rows {choice.speedup[-1]:.2f}x"
    right.set_title(f"{choice.size} rows: {whole}", fontsize=10)
    for axes in (left, right):
        axes.axvline(choice.size, color="C3", linestyle=":", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("rows of the head")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
