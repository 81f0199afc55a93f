"""Benchmark results as a Markdown table and pictures: `python bench/report.py results.json --out out/bench`.

Reads what pytest-benchmark wrote. A benchmark stores in `extra_info` what it compares, all of it measured in one run:
numbers under `speedup_<baseline>` are times of a baseline divided by the candidate's, numbers under
`fraction_<limit>` are shares of a limit of this machine (read bandwidth, GFLOP/s). Bare times are not reported.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

KINDS = {"speedup": "times as fast as {}", "fraction": "share of {}"}


def measures(benchmark: dict) -> dict[tuple[str, str], float]:
    """(kind, against what) -> number, from one benchmark's extra_info."""
    found = {}
    for key, value in benchmark["extra_info"].items():
        kind, _, against = key.partition("_")
        if kind in KINDS and against and isinstance(value, (int, float)):
            found[kind, against] = float(value)
    return found


def case(benchmark: dict) -> str:
    """What tells one benchmark of a group from the next."""
    name = benchmark["name"]
    return name[name.index("[") + 1 : -1] if "[" in name else name.removeprefix("test_").removeprefix("bench_")


def grouped(results: dict) -> dict[str, list[dict]]:
    """Benchmarks by family and function, in the order in which they ran."""
    groups = defaultdict(list)
    for benchmark in results["benchmarks"]:
        path, _, function = benchmark["fullname"].partition("::")
        family = Path(path).stem.removeprefix("bench_")
        title = f"{family}: {function.partition('[')[0].removeprefix('test_').replace('_', ' ')}"
        groups[benchmark["group"] or title].append(benchmark)
    return dict(groups)


def number(kind: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0%}" if kind == "fraction" else f"{value:.2f}x"


def table(benchmarks: list[dict]) -> str:
    """One group as a Markdown table: a row for each case, a column for each comparison."""
    columns = list(dict.fromkeys(key for b in benchmarks for key in measures(b)))
    heads = ["case", *(KINDS[kind].format(against.replace("_", " ")) for kind, against in columns)]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * len(columns)]
    for benchmark in benchmarks:
        found = measures(benchmark)
        cells = [case(benchmark), *(number(key[0], found.get(key)) for key in columns)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine(results: dict) -> str:
    """Hardware, versions and commit, without which no figure is published."""
    info = results["machine_info"]
    cpu = info.get("cpu", {})
    commit = results.get("commit_info") or {}
    facts = {
        "processor": f"{cpu.get('brand_raw') or info.get('processor')}, {cpu.get('count', '?')} logical cores",
        "system": f"{info.get('system')} {info.get('release')}",
        "python": info.get("python_version"),
        **{key: info[key] for key in ("torch", "triton", "threads", "pinned", "isa", "gpu") if info.get(key)},
        "commit": (commit.get("id") or "unknown")[:12] + (" with changes" if commit.get("dirty") else ""),
        "measured": results.get("datetime"),
    }
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())


def picture(title: str, benchmarks: list[dict], path: Path) -> None:
    """One group as horizontal bars, a panel for each kind of number; 1 is marked where speed-ups are shown."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = list(dict.fromkeys(key for b in benchmarks for key in measures(b)))
    kinds = list(dict.fromkeys(kind for kind, _ in columns))
    height = 1.2 + 0.28 * len(benchmarks) * max(1, max(sum(k == kind for k, _ in columns) for kind in kinds))
    figure, axes = pyplot.subplots(
        1, len(kinds), figsize=(1.5 + 5.5 * len(kinds), height), sharey=True, squeeze=False, layout="constrained"
    )
    labels = [case(b) for b in benchmarks]
    for axis, kind in zip(axes[0], kinds, strict=True):
        series = [against for k, against in columns if k == kind]
        bar = 0.8 / len(series)
        for index, against in enumerate(series):
            values = [measures(b).get((kind, against), float("nan")) for b in benchmarks]
            places = [row + (index + 0.5) * bar - 0.4 for row in range(len(benchmarks))]
            drawn = axis.barh(places, values, bar, label=KINDS[kind].format(against.replace("_", " ")))
            axis.bar_label(drawn, [number(kind, v) if v == v else "" for v in values], padding=2, fontsize=7)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_xlabel({"speedup": "speed-up (right of the line: faster)", "fraction": "share of the limit"}[kind])
        axis.margins(x=0.12)
        axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(labels)), labels, fontsize=8)
    axes[0][0].invert_yaxis()
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def write(results: dict, out: Path) -> Path:
    """Write report.md and a PNG for each group under `out`; returns the path of the report."""
    out.mkdir(parents=True, exist_ok=True)
    parts = ["# Benchmarks", machine(results)]
    for title, benchmarks in grouped(results).items():
        compared = [b for b in benchmarks if measures(b)]
        if not compared:
            continue
        image = out / ("".join(c if c.isalnum() else "_" for c in title) + ".png")
        picture(title, compared, image)
        parts += [f"## {title}", table(compared), f"![{title}]({image.name})"]
    silent = [b["fullname"] for b in results["benchmarks"] if not measures(b)]
    if silent:
        parts += ["## Not reported", "These compare nothing:", "\n".join(f"- {name}" for name in silent)]
    report = out / "report.md"
    report.write_text("\n\n".join(parts) + "\n")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what pytest --benchmark-json wrote")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    arguments = parser.parse_args()
    report = write(json.loads(arguments.results.read_text()), arguments.out)
    sys.stdout.write(report.read_text())
    print(f"written to {report}")


if __name__ == "__main__":
    main()
