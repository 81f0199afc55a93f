"""bench/report.py: ratios in, table and pictures out; bare times never."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "bench" / "report.py"


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("bench_report", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _benchmark(name, **extra):
    where = {"fullname": f"bench/bench_head.py::{name}", "name": name, "group": None}
    return {**where, "stats": {"min": 0.123456}, "extra_info": extra}


RESULTS = {
    "machine_info": {"processor": "x", "system": "Linux", "release": "6", "python_version": "3.11", "torch": "2.13"},
    "commit_info": {"id": "0123456789abcdef", "dirty": True},
    "datetime": "2026-01-01T00:00:00",
    "benchmarks": [
        _benchmark("test_topk[bf16-B1]", speedup_plain_torch=2.5, fraction_read_bandwidth=0.913),
        _benchmark("test_topk[fp32-B4]", speedup_plain_torch=3.25),
        _benchmark("test_silent[1]", rows=7),
    ],
}


def test_report(report, tmp_path):
    path = report.write(RESULTS, tmp_path / "out")
    text = path.read_text()
    assert "| case | times as fast as plain torch | share of read bandwidth |" in text
    assert "| bf16-B1 | 2.50x | 91% |" in text
    assert "| fp32-B4 | 3.25x |  |" in text
    assert "- commit: 0123456789ab with changes" in text
    assert "- bench/bench_head.py::test_silent[1]" in text
    assert "0.123" not in text
    (picture,) = path.parent.glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"({picture.name})" in text
