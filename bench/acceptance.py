"""Acceptance of every tree verifier beside the optimum: `python bench/acceptance.py [--out out/acceptance]`.

Takes rows of both models' logits at the same positions of held-out source code, from the shipped pair. For one node
with k = 1..8 children: how often one of them is accepted, averaged over the rows, in closed form where there is one and
as `verify_tree` decides over random draws. Writes report.md, acceptance.json and acceptance.png. The exit status is 1
if a verifier accepts more than is possible, or not what its closed form says.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import acceptance_rates as rates
import torch
from acceptance_measured import Row, make_row, measure
from torch import Tensor
from tqdm import tqdm

from specdec_loop import tiny
from specdec_loop.vocab import select_rows

EXPLANATION = """\
What bounds a verifier depends on how its siblings are drawn. For i.i.d. draws (multi_round, k_seq; traversal_iid, which
on one node decides as multi_round does) the optimum is exact. For draws without replacement (without_replacement,
traversal, which differ only from depth 2 on) the figure is an UPPER BOUND on the optimum: every set of tokens gives
one, and only prefixes of the tokens in order of q/p are tried. greedy_multi and target_only (here: the k best tokens of
q) draft deterministically, but for the last sibling of greedy_multi; each reaches the optimum of its own draft, which
is another than that of random draws. Figures without ± are closed forms; beside them, how far verify_tree was off."""
TEMPERATURES = (1.0, 0.6)
PLACES = torch.linspace(32, 127, 8).long().tolist()  # of each passage, where rows are taken
SIGMAS = 5.0  # that a measured mean may be off
IID, WITHOUT = "optimum, i.i.d. draws", "upper bound, without replacement"
CLOSED_FORMS = {
    IID: rates.optimum,
    WITHOUT: rates.bound_without_replacement,
    "multi_round": rates.multi_round,
    "k_seq": rates.k_seq,
    "greedy_multi": rates.greedy_multi,
    "target_only": rates.target_only,
}
BOUNDS = {  # target_only and greedy_multi are the optimum of their drafts
    "multi_round": IID,
    "k_seq": IID,
    "without_replacement": WITHOUT,
    "traversal": WITHOUT,
    "greedy_multi": "greedy_multi",
    "target_only": "target_only",
}
STYLES = {
    IID: {"color": "black", "linestyle": "--"},
    WITHOUT: {"color": "tab:gray", "linestyle": ":", "linewidth": 2},
    "multi_round": {"color": "tab:blue"},
    "k_seq": {"color": "tab:orange"},
    "without_replacement": {"color": "tab:green"},
    "traversal": {"color": "tab:red", "linestyle": (0, (2, 3))},
    "greedy_multi": {"color": "tab:purple"},
    "target_only": {"color": "tab:brown"},
}


class Curve(NamedTuple):
    """Acceptance for k = 1..most siblings, averaged over the rows; [most] fp64 each."""

    closed: Tensor | None  # the closed form
    measured: Tensor | None  # as verify_tree decides
    error: Tensor | None  # standard error of `measured` over draws and coins, the rows given


def curves(rows: list[Row], most: int, trials: int, seed: int = 0, backend: str | None = None) -> dict[str, Curve]:
    """The curve of every bound and method."""
    generator = torch.Generator().manual_seed(seed)
    exact = {name: [] for name in CLOSED_FORMS}
    measured = {name: [] for name in BOUNDS}
    for row in tqdm(rows, unit="row", leave=False):
        for name, form in CLOSED_FORMS.items():
            exact[name].append(form(row.p, row.q, most))
        for name, found in measured.items():
            found.append(measure(name, row, most, trials, generator, backend))
    result = {}
    for name in STYLES:
        mean = error = None
        if name in measured:
            each = torch.stack(measured[name])
            mean, error = each.mean(0), (each * (1 - each) / (trials - 1)).sum(0).sqrt() / len(rows)
        closed = torch.stack(exact[name]).mean(0) if name in exact else None
        result[name] = Curve(closed, mean, error)
    return result


def complaints(found: dict[str, Curve], decisions: int) -> list[str]:
    """What cannot be: acceptance above the bound, or decisions that are not what the closed form says.

    decisions: how many each measured mean is of; its resolution where every estimate of an error is 0.
    """
    lines = []
    for name, bound in BOUNDS.items():
        (closed, measured, error), limit = found[name], found[bound].closed
        slack = SIGMAS * error + 1 / decisions
        if closed is not None and bool((closed > limit + rates.ACCURACY).any()):
            lines.append(f"{name}: closed form {closed.tolist()} above {bound} {limit.tolist()}")
        if bool((measured > limit + slack).any()):
            lines.append(f"{name}: measured {measured.tolist()} above {bound} {limit.tolist()}")
        if closed is not None and bool(((measured - closed).abs() > slack).any()):
            lines.append(f"{name}: measured {measured.tolist()}, closed form {closed.tolist()}")
    return lines


def table(found: dict[str, Curve]) -> str:
    """One condition as a Markdown table, in percent."""
    most = len(found[IID].closed)
    heads = ["accepted, %", *(f"k={k}" for k in range(1, most + 1)), "measured - closed form, at most"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (most + 1)]
    for name, (closed, measured, error) in found.items():
        check = ""
        if closed is None:
            pairs = zip(measured.tolist(), error.tolist(), strict=True)
            cells = [f"{100 * rate:.1f} ± {100 * off:.1f}" for rate, off in pairs]
        else:
            cells = [f"{100 * rate:.1f}" for rate in closed.tolist()]
            if measured is not None:
                off = measured - closed
                at = int(off.abs().argmax())
                check = f"{100 * float(off[at]):+.1f} ± {100 * float(error[at]):.1f}"
        lines.append("| " + " | ".join([name, *cells, check]) + " |")
    return "\n".join(lines)


@torch.inference_mode()
def collect(positions: int) -> tuple[Tensor, Tensor, tiny.Pair]:
    """Logits [positions, V] fp32 of target and drafter after the same held-out text, and the pair they come from."""
    pair = tiny.load()
    prompts = tiny.heldout_prompts(-(-positions // len(PLACES)), PLACES[-1] + 1, pair.tokenizer)
    target, draft = (torch.cat([model(row[None]).logits[0, PLACES] for row in prompts]).float() for model in pair[:2])
    return target[:positions], draft[:positions], pair


def picture(conditions: dict[str, dict], path: Path, title: str) -> None:
    """A panel for each condition: acceptance over k, bounds dashed, measurements as dots with two standard errors."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(2, len(conditions))
    rows = -(-len(conditions) // columns)
    figure = Figure(figsize=(6 * columns, 4.6 * rows + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for panel, (name, found) in zip(panels, conditions.items(), strict=False):
        for method, curve in found.items():
            line = curve.measured if curve.closed is None else curve.closed
            k = range(1, len(line) + 1)
            panel.plot(k, 100 * line, label=method, **STYLES[method])
            if curve.measured is not None:
                dots = {"fmt": ".", "markersize": 4, "color": STYLES[method]["color"], "linewidth": 1.2}
                panel.errorbar(k, 100 * curve.measured, 200 * curve.error, **dots)
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("siblings k")
        panel.set_ylabel("one of them is accepted, %")
        panel.grid(alpha=0.3)
        panel.label_outer()
    for panel in panels[len(conditions) :]:
        panel.set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.suptitle(
        f"{title}\nlines: closed forms where there are; dots: verify_tree, two standard errors", fontsize=11
    )
    figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200, help="positions of held-out text")
    parser.add_argument("--trials", type=int, default=64, help="draws that verify_tree decides for a row")
    parser.add_argument("--most", type=int, default=8, help="largest number of siblings")
    parser.add_argument("--head-rows", type=int, default=8000, help="size of the trimmed head")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", help="force one for verify_tree")
    parser.add_argument("--out", type=Path, default=Path("out/acceptance"))
    arguments = parser.parse_args()
    target, draft, pair = collect(arguments.rows)
    trimmed = select_rows(pair.vocab_order, arguments.head_rows, force=pair.tokenizer.all_special_ids)
    conditions, wrong = {}, []
    for vocab, head in ((None, "whole head"), (trimmed, f"head of {len(trimmed)} rows")):
        for temperature in TEMPERATURES:
            name = f"temperature {temperature}, {head}"
            rows = [make_row(*pair_of_rows, vocab, temperature) for pair_of_rows in zip(target, draft, strict=True)]
            print(name, file=sys.stderr)
            seed = arguments.seed + len(conditions)  # their errors are independent
            found = curves(rows, arguments.most, arguments.trials, seed, arguments.backend)
            wrong += [f"{name}: {line}" for line in complaints(found, len(rows) * arguments.trials)]
            conditions[name] = found
    arguments.out.mkdir(parents=True, exist_ok=True)
    title = f"Acceptance of one node's k siblings, {len(target)} rows of the shipped pair on held-out source code"
    picture(conditions, arguments.out / "acceptance.png", title)
    parts = ["# Acceptance beside the optimum", EXPLANATION, f"{title}; {arguments.trials} draws of each."]
    for name, found in conditions.items():
        parts += [f"## {name}", table(found)]
    parts += ["![acceptance](acceptance.png)", *(f"WRONG: {line}" for line in wrong)]
    text = "\n\n".join(parts) + "\n"
    (arguments.out / "report.md").write_text(text)
    numbers = {
        name: {
            method: {key: value.tolist() for key, value in curve._asdict().items() if value is not None}
            for method, curve in found.items()
        }
        for name, found in conditions.items()
    }
    facts = {"options": {key: str(value) for key, value in vars(arguments).items()}, "torch": torch.__version__}
    (arguments.out / "acceptance.json").write_text(json.dumps({**facts, "acceptance": numbers}, indent=1) + "\n")
    print(text)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
