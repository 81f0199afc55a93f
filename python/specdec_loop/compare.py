"""Several ways of decoding the same prompts, side by side: progress bars, a table, a picture, coloured text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .drafters import Drafter
from .generate import generate
from .statistics import Statistics

PLAIN = "autoregressive"


class Method(NamedTuple):
    """A way of decoding."""

    name: str
    drafter: Drafter | None
    options: dict  # of `generate`


@dataclass
class Outcome:
    """What one method made of the prompts."""

    method: Method
    statistics: Statistics = field(default_factory=Statistics)
    tokens: list[list[int]] = field(default_factory=list)
    from_draft: list[list[bool]] = field(default_factory=list)


def make_console() -> Console:
    """A console wide enough for the table where the output is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=116)


def compare(
    target: PreTrainedModel,
    methods: Sequence[Method],
    prompts: Sequence[Tensor],
    console: Console,
    *,
    max_new_tokens: int,
    seconds: float | None = None,
    **options,
) -> list[Outcome]:
    """Decode the prompts, one at a time, with each method.

    Args:
        target: the model whose output it is.
        methods: the first one sets the pace for `seconds`.
        prompts: [P] integer tensors.
        console: where the progress bars go.
        max_new_tokens: tokens for each prompt.
        seconds: the first method takes no new prompt after this time, and the others decode what it did.
        options: of `generate`, for every method.
    """
    outcomes = []
    bars = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"))
    with Progress(*bars, TimeElapsedColumn(), console=console) as progress:
        tasks = [progress.add_task(method.name, start=False, total=len(prompts) * max_new_tokens) for method in methods]
        for method, task in zip(methods, tasks, strict=True):
            outcome = Outcome(method)
            # The first forwards of a process set up threads and buffers; nobody's time should hold them.
            _decode(target, method, prompts[0], max_new_tokens=4, **options)
            began = time.perf_counter()
            progress.start_task(task)
            for number, prompt in enumerate(prompts):
                if not outcomes and number and seconds is not None and time.perf_counter() - began > seconds:
                    prompts = prompts[:number]
                    for each in tasks:
                        progress.update(each, total=number * max_new_tokens)
                    break

                def advance(_, tokens, task=task):
                    progress.advance(task, len(tokens))

                result = _decode(
                    target, method, prompt, max_new_tokens=max_new_tokens, token_callback=advance, **options
                )
                progress.update(task, completed=(number + 1) * max_new_tokens)
                outcome.statistics.add(result.statistics)
                outcome.tokens += result.tokens
                outcome.from_draft += result.from_draft
            progress.stop_task(task)
            outcomes.append(outcome)
    return outcomes


def _decode(target, method: Method, prompt: Tensor, **options):
    return generate(target, method.drafter, prompt[None], **{**options, **method.options})


def differing(outcomes: Sequence[Outcome]) -> list[str]:
    """One line for each method whose tokens are not those of plain decoding: where it left them first."""
    plain = next((outcome for outcome in outcomes if outcome.method.name == PLAIN), None)
    lines = []
    for outcome in outcomes if plain is not None else ():
        for number, (ours, theirs) in enumerate(zip(outcome.tokens, plain.tokens, strict=True)):
            if ours != theirs:
                place = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), -1)
                lines.append(f"{outcome.method.name}: prompt {number} differs from {PLAIN} at new token {place}")
                break
    return lines


def table(outcomes: Sequence[Outcome], title: str, *, greedy: bool) -> Table:
    """The figures of each method; speed-up is over plain decoding, if that was one of them."""
    plain = next((outcome for outcome in outcomes if outcome.method.name == PLAIN), None)
    result = Table(title=title)
    result.add_column("method", no_wrap=True)
    figures = (
        "tokens/s",
        "speed-up",
        "accepted",
        "tokens\nper call",
        "drafter\nMB",
        "MBSU",
        "draft/target/\nverify time",
    )
    for name in figures:
        result.add_column(name, justify="right", no_wrap=True)
    if greedy and plain is not None:
        result.add_column("same\ntokens", no_wrap=True)
    wrong = {line.split(":")[0] for line in differing(outcomes)}
    for outcome in outcomes:
        stats = outcome.statistics
        spent = [stats.seconds[phase] for phase in ("draft", "target", "verify")]
        total = max(sum(spent), 1e-9)
        row = [
            outcome.method.name,
            f"{stats.tokens_per_second:.1f}",
            "" if plain is None else f"{stats.tokens_per_second / plain.statistics.tokens_per_second:.2f}x",
            f"{stats.acceptance_rate:.0%}" if stats.drafted else "",
            f"{stats.block_efficiency:.2f}",
            f"{stats.drafter_bytes / 1e6:.1f}" if stats.drafter_bytes else "",
            f"{stats.mbsu:.2f}",
            "/".join(f"{part / total:.0%}" for part in spent),
        ]
        if greedy and plain is not None:
            row.append("[red]no" if outcome.method.name in wrong else "[green]yes")
        result.add_row(*row)
    return result


def coloured(outcome: Outcome, number: int, tokenizer: PreTrainedTokenizerBase) -> Text:
    """The text of one prompt's continuation, accepted draft tokens in green."""
    text = Text()
    shown = ""
    tokens = outcome.tokens[number]
    for i, accepted in enumerate(outcome.from_draft[number]):
        # Decoding what stands before shows where a token's own characters begin, also inside a character.
        whole = tokenizer.decode(tokens[: i + 1])
        if not whole.endswith("\N{REPLACEMENT CHARACTER}"):
            text.append(whole[len(shown) :], style="green" if accepted else "bold")
            shown = whole
    return text


def picture(outcomes: Sequence[Outcome], path: Path, title: str) -> None:
    """Draw, for each method, tokens per second, MBSU, and how often a draft is accepted at each depth."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    speed, cost, depth = figure.subplots(1, 3, width_ratios=(1, 0.8, 1))
    names = [outcome.method.name for outcome in outcomes]
    statistics = [outcome.statistics for outcome in outcomes]
    _bars(speed, names, [stats.tokens_per_second for stats in statistics], "{:.1f}")
    speed.set_xlabel("tokens per second (higher is better)")
    _bars(cost, names, [stats.mbsu for stats in statistics], "{:.2f}")
    cost.tick_params(labelleft=False)
    cost.set_xlabel(
        "memory-bound speed-up: tokens per call / bytes read\n(by the drafter with its head and the target)"
    )
    for number, (name, stats) in enumerate(zip(names, statistics, strict=True)):
        if stats.drafted:
            label = f"{name}: {stats.block_efficiency:.2f} tokens per call, {stats.acceptance_rate:.0%} of drafts"
            depths = range(1, len(stats.acceptance_at) + 1)
            depth.plot(depths, stats.acceptance_at, marker="o", color=f"C{number}", label=label)
    depth.set_xlabel("depth in the draft")
    depth.set_ylabel("rounds accepted that deep")
    depth.set_ylim(0, 1.02)
    depth.xaxis.get_major_locator().set_params(integer=True)
    depth.grid(alpha=0.3)
    if depth.lines:
        depth.legend(fontsize=8)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _bars(axes, names: list[str], values: list[float], form: str) -> None:
    """One bar for each method, the first on top, each with its value."""
    bars = axes.barh(names, values, color=[f"C{number}" for number in range(len(names))])
    axes.bar_label(bars, [form.format(value) for value in values], padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.14)
